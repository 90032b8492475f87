"""The retriever's warm-up: its loss by hand, its negatives, its determinism, what it learns."""

import pytest
import torch
from tiny_rag import QUESTIONS, TEXTS, TITLES, tiny_rag
from transformers import DPRContextEncoder

from stages.contexts import TokenStore
from stages.encoders import Encoder, as_role
from stages.warmup import WarmUp, in_batch_loss


def test_loss_is_the_cross_entropy_of_the_own_passage():
    questions, passages = torch.randn(4, 3), torch.randn(4, 3)
    expected = 0.0
    for i in range(4):
        scores = [float(questions[i] @ passages[j]) for j in range(4)]
        expected -= scores[i] - torch.tensor(scores).logsumexp(0).item()
    assert in_batch_loss(questions, passages, torch.arange(4)).item() == pytest.approx(expected / 4, rel=1e-5)


def test_the_scale_multiplies_the_scores():
    questions, passages, gold = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4)
    assert in_batch_loss(questions, passages, gold, 5.0).item() == pytest.approx(
        in_batch_loss(5 * questions, passages, gold).item(), rel=1e-5
    )


def test_a_passage_that_two_questions_share_is_no_negative():
    questions, passages = torch.randn(3, 5), torch.randn(3, 5)
    passages[2] = passages[0]
    loss = in_batch_loss(questions, passages, torch.tensor([4, 7, 4]))
    kept = [in_batch_loss(questions[rows], passages[rows], torch.tensor([0, 1])) for rows in ([0, 1], [2, 1])]
    middle = -(questions[1] @ passages.T).log_softmax(-1)[1]
    first = -(questions[0] @ passages[:2].T).log_softmax(-1)[0]
    last = -(questions[2] @ passages[1:].T).log_softmax(-1)[1]
    assert loss.item() == pytest.approx((first + middle + last).item() / 3, rel=1e-5)
    assert all(torch.isfinite(value) for value in kept)


def warmed(steps: int):
    encoder = tiny_rag().encoder
    passage_encoder = Encoder(as_role(encoder.model, DPRContextEncoder), encoder.tokenizer)
    warm_up = WarmUp(encoder, passage_encoder, torch.device("cpu"))
    questions = TokenStore.from_rows(encoder.question_rows(QUESTIONS, 24))
    passages = TokenStore.from_rows(passage_encoder.passage_rows(TITLES, TEXTS, 48))
    positives = torch.arange(len(QUESTIONS))
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
