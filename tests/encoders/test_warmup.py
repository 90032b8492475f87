"""The retriever's warm-up: its loss by hand, its negatives, its determinism, what it learns."""

import pytest
import torch
from transformers import DPRContextEncoder

from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder
from stages.encoders.loading import as_role
from stages.encoders.mining import HardNegatives
from stages.encoders.own_passages import OwnPassages
from stages.encoders.warmup import WarmUp, in_batch_loss, optimizer_and_schedule
from tests.tiny_rag import QUESTIONS, TEXTS, TITLES, tiny_rag


def same(rows: list[int]) -> torch.Tensor:
    """Whose own passage each column is, where a passage's row is all that there is to know."""
    return torch.tensor([[row == other for other in rows] for row in rows])


def test_loss_is_the_cross_entropy_of_the_own_passage():
    questions, passages = torch.randn(4, 3), torch.randn(4, 3)
    expected = 0.0
    for i in range(4):
        scores = [float(questions[i] @ passages[j]) for j in range(4)]
        expected -= scores[i] - torch.tensor(scores).logsumexp(0).item()
    assert in_batch_loss(questions, passages, torch.eye(4).bool()).item() == pytest.approx(expected / 4, rel=1e-5)


def test_the_scale_multiplies_the_scores():
    questions, passages, gold = torch.randn(4, 3), torch.randn(4, 3), torch.eye(4).bool()
    assert in_batch_loss(questions, passages, gold, 5.0).item() == pytest.approx(
        in_batch_loss(5 * questions, passages, gold).item(), rel=1e-5
    )


def test_a_passage_that_two_questions_share_is_no_negative():
    questions, passages = torch.randn(3, 5), torch.randn(3, 5)
    passages[2] = passages[0]
    loss = in_batch_loss(questions, passages, same([4, 7, 4]))
    kept = [in_batch_loss(questions[rows], passages[rows], same([0, 1])) for rows in ([0, 1], [2, 1])]
    middle = -(questions[1] @ passages.T).log_softmax(-1)[1]
    first = -(questions[0] @ passages[:2].T).log_softmax(-1)[0]
    last = -(questions[2] @ passages[1:].T).log_softmax(-1)[1]
    assert loss.item() == pytest.approx((first + middle + last).item() / 3, rel=1e-5)
    assert all(torch.isfinite(value) for value in kept)


def by_hand(questions, passages, rows) -> float:
    total = 0.0
    for i, question in enumerate(questions):
        seen = [j for j in range(len(passages)) if j == i or rows[j] != rows[i]]
        scores = torch.stack([question @ passages[j] for j in seen])
        total += (scores.logsumexp(0) - question @ passages[i]).item()
    return total / len(questions)


@pytest.mark.parametrize(
    "rows",
    [
        [4, 7, 9, 1, 2],  # two hard negatives
        [4, 7, 9, 7, 2],  # one is another question's own passage
        [4, 7, 4, 4, 7],  # and two questions are about one passage
        [4, 7, 9, 1, 1],  # mined twice
    ],
)
def test_hard_negatives_are_further_columns_except_where_they_are_the_own_passage(rows):
    questions, vectors = torch.randn(3, 5), torch.randn(10, 5)
    loss = in_batch_loss(questions, vectors[rows], same(rows)[:3])
    assert loss.item() == pytest.approx(by_hand(questions, vectors[rows], rows), rel=1e-5)


def warmed(steps: int):
    encoder = tiny_rag().encoder
    passage_encoder = Encoder(as_role(encoder.model, DPRContextEncoder), encoder.tokenizer)
    warm_up = WarmUp(encoder, passage_encoder, torch.device("cpu"))
    questions = TokenStore.from_rows(encoder.question_rows(QUESTIONS, 24))
    passages = TokenStore.from_rows(passage_encoder.passage_rows(TITLES, TEXTS, 48))
    positives = OwnPassages([[row] for row in range(len(QUESTIONS))], passages)
    before = warm_up.validate(questions, passages, positives, 9)
    if steps:
        warm_up.train(questions, passages, positives, steps=steps, batch_size=6, learning_rate=1e-2, seed=3)
    return before, warm_up.validate(questions, passages, positives, 9), warm_up


def test_it_learns_and_moves_both_encoders_the_same_way_each_time():
    before, after, warm_up = warmed(25)
    assert after < 0.7 * before
    again = warmed(25)
    assert again[1] == after
    question, passage = warm_up.question_encoder.model, warm_up.context_encoder.model
    assert not torch.equal(question.question_encoder.encode_proj.weight, passage.ctx_encoder.encode_proj.weight)


def test_no_steps_pass_the_encoders_through():
    before, after, _ = warmed(0)
    assert before == after


def second_round(pool: torch.Tensor | None, seed: int = 5):
    """Loss over all passages before and after a round with one hard negative a question, and the encoders."""
    _, _, warm_up = warmed(0)
    questions = TokenStore.from_rows(warm_up.question_encoder.question_rows(QUESTIONS, 24))
    passages = TokenStore.from_rows(warm_up.context_encoder.passage_rows(TITLES, TEXTS, 48))
    rows = torch.arange(len(QUESTIONS))
    positives = OwnPassages([[row] for row in rows.tolist()], passages)
    negatives = None if pool is None else HardNegatives(pool, 1)

    @torch.no_grad()
    def hard_loss() -> float:
        wanted = torch.cat([rows, (rows + 1) % 9])
        return warm_up.loss(questions, passages, rows, wanted, positives.among(rows, wanted)).item()

    before = hard_loss()
    warm_up.train(
        questions, passages, positives, steps=25, batch_size=6, learning_rate=1e-2, seed=seed, negatives=negatives
    )
    return before, hard_loss(), warm_up


def weights(warm_up: WarmUp) -> list[torch.Tensor]:
    return [p for e in (warm_up.question_encoder, warm_up.context_encoder) for p in e.model.parameters()]


def alike(one: WarmUp, other: WarmUp) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


NEIGHBOURS = (torch.arange(9)[:, None] + torch.tensor([1, 2, 3])) % 9


def test_a_round_with_hard_negatives_lowers_their_loss_the_same_way_for_the_same_seed():
    before, after, warm_up = second_round(NEIGHBOURS)
    assert after < 0.7 * before
    assert alike(warm_up, second_round(NEIGHBOURS)[2])
    assert not alike(warm_up, second_round(None)[2])


def test_questions_with_empty_pools_train_as_without_hard_negatives():
    nothing = torch.full((9, 3), -1)
    assert alike(second_round(nothing)[2], second_round(None)[2])


def test_tokens_are_gathered_where_they_are_whatever_the_offsets_say():
    store = TokenStore.from_rows([[5, 6], [7], [8, 9, 10]])
    ids, lengths = TokenStore(store.tokens.to("meta"), store.offsets).padded(torch.tensor([2, 1]), 9, 0)
    assert ids.shape == (2, 3) and ids.is_meta and lengths.is_meta


def test_no_column_of_a_questions_own_passages_is_a_negative_of_it():
    """Question 0 has two positives; the second one is question 1's too, and a copy of it is a hard negative."""
    texts = [[5], [6, 7], [8], [6, 7], [9]]
    own = OwnPassages([[0, 1], [1], [2]], TokenStore.from_rows(texts))
    rows, wanted = torch.arange(3), torch.tensor([0, 1, 2, 3, 4])
    assert own.among(rows, wanted).tolist() == [
        [True, True, False, True, False],
        [False, True, False, True, False],
        [False, False, True, False, False],
    ]
    questions, passages = torch.randn(3, 5), torch.randn(5, 5)
    scores = questions @ passages.T
    seen = [[0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    expected = sum(scores[i, columns].logsumexp(0) - scores[i, i] for i, columns in enumerate(seen)) / 3
    assert in_batch_loss(questions, passages, own.among(rows, wanted)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_the_positive_is_drawn_anew_from_all_of_a_questions_own():
    own = OwnPassages([[0], [1, 2, 3]], TokenStore.from_rows([[5], [6], [7], [8]]))

    def draws(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [own.draw(torch.tensor([1, 0]), generator).tolist() for _ in range(50)]

    assert draws(1) == draws(1) != draws(2)
    assert {row for row, _ in draws(1)} == {1, 2, 3} and {row for _, row in draws(1)} == {0}
    assert own.first(torch.tensor([1, 0])).tolist() == [1, 0]


def test_a_single_positive_takes_nothing_from_the_generator():
    own = OwnPassages([[0], [1]], TokenStore.from_rows([[5], [6]]))
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    own.draw(torch.tensor([1, 0]), generator)
    assert torch.equal(generator.get_state(), before)


def test_the_warm_up_leaves_out_every_own_passage_and_reads_each_of_them(monkeypatch):
    """Through WarmUp.train: what it hands to the loss, step by step."""
    _, _, warm_up = warmed(0)
    questions = TokenStore.from_rows(warm_up.question_encoder.question_rows(QUESTIONS, 24))
    passages = TokenStore.from_rows(warm_up.context_encoder.passage_rows(TITLES, TEXTS, 48))
    own = OwnPassages([[row, (row + 1) % 9] for row in range(9)], passages)
    drawn, loss = set(), warm_up.loss

    def watched(questions, passages, rows, wanted, mine):
        drawn.update(zip(rows.tolist(), wanted.tolist(), strict=False))
        for at, row in enumerate(rows.tolist()):
            assert mine[at].tolist() == [other in (row, (row + 1) % 9) for other in wanted.tolist()]
        return loss(questions, passages, rows, wanted, mine)

    monkeypatch.setattr(warm_up, "loss", watched)
    warm_up.train(questions, passages, own, steps=20, batch_size=6, learning_rate=1e-3, seed=3)
    assert drawn == {(row, passage) for row in range(9) for passage in (row, (row + 1) % 9)}


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_to_zero_behind_the_last():
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    optimizer, schedule = optimizer_and_schedule([weight], 0.5, 20, torch.device("cpu"))
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.25, 0.5, *(0.5 * (20 - step) / 18 for step in range(2, 20))])
    assert schedule.get_last_lr() == [0.0]
