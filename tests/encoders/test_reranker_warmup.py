"""The reranker's warm-up: what its loss counts, what it draws, and that it learns to rank."""

import math

import torch

from stages.corpus.token_store import TokenStore
from stages.encoders.mining import HardNegatives
from stages.encoders.reranker_warmup import asked_rows, batches, listwise_loss, warm_up_reranker
from tests.tiny_rag import LENGTHS, QUESTIONS, TITLES, tiny_reranker

CPU = torch.device("cpu")


def test_the_loss_is_the_first_passages_among_those_that_are_there():
    scores = torch.tensor([[1.0, 2.0, 50.0], [0.5, 0.5, 0.5]])
    rows = torch.tensor([[3, 4, -1], [5, 6, 7]])
    expected = (math.log(1 + math.e) + math.log(3)) / 2
    torch.testing.assert_close(listwise_loss(scores, rows).item(), expected)


def warmed(steps=40):
    reranker = tiny_reranker()
    store = TokenStore.from_rows(reranker.encoder.question_rows(QUESTIONS, LENGTHS.question_tokens))
    every = torch.arange(len(TITLES))
    pool = torch.stack([torch.cat([every[every != row], torch.tensor([-1])]) for row in every])
    positives = torch.stack([every, torch.full_like(every, -1)], dim=1)
    warm_up_reranker(
        reranker.encoder, store, reranker.tokens, positives, HardNegatives(pool, 4), steps=steps, batch_size=4,
        learning_rate=1e-2, seed=3, device=CPU,
    )  # fmt: skip
    return reranker, store


def test_it_learns_to_rank_and_the_same_again():
    (reranker, store), (again, _) = warmed(), warmed()
    for one, other in zip(reranker.encoder.model.parameters(), again.encoder.model.parameters(), strict=True):
        assert torch.equal(one, other)
    candidates = torch.arange(len(TITLES)).expand(len(TITLES), -1)

    def mean_rank(some):
        scores = some.scores_of_all(asked_rows(store, torch.arange(len(TITLES)), CPU), candidates)
        return (scores > scores.diagonal()[:, None]).sum(1).float().mean().item()

    assert mean_rank(reranker) < mean_rank(tiny_reranker()) - 1


def test_every_question_comes_once_an_epoch():
    rows = torch.cat(list(batches(9, steps=6, batch_size=3, seed=1))).tolist()
    assert sorted(rows[:9]) == sorted(rows[9:]) == list(range(9)) and rows[:9] != rows[9:]
    assert [len(some) for some in batches(3, steps=2, batch_size=7, seed=1)] == [7, 7]


def test_each_question_draws_its_own_different_negatives():
    pool = torch.tensor([[4, 5, 6, 7], [8, -1, -1, -1]])
    drawn = HardNegatives(pool, 3).draw_each(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 3) and len(set(drawn[0].tolist())) == 3 and set(drawn[0].tolist()) <= {4, 5, 6, 7}
    assert drawn[1].tolist() == [8, -1, -1]
