"""The retriever's losses and their gradients against closed forms in float64."""

import numpy as np
import pytest
import torch

from stages.generation.marginalization import log_prior, sequence_nll
from stages.generation.retriever_losses import LOSS, gold_nll

B, K, T = 5, 4, 3


def problem():
    """Scores [B, K] with missing passages, all of them in the last row, and likelihoods under each passage alone."""
    drawn = torch.Generator().manual_seed(3)
    scores = torch.randn(B, K, dtype=torch.float64, generator=drawn) * 3
    alone = -torch.rand(B, K, T, dtype=torch.float64, generator=drawn) * 4
    mask = torch.tensor([[True] * 3, [True, False, False], [True, True, False], [True] * 3, [True, True, False]])
    scores[2, 3] = scores[3, 1:] = scores[4] = -torch.inf
    return scores.requires_grad_(), alone, mask


def softmax(values):
    shares = np.exp(values - values.max())
    return shares / shares.sum()


@pytest.fixture
def in_double(monkeypatch):
    """The prior is fp32's; here it keeps what it is given."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)


@pytest.mark.parametrize("name", LOSS)
def test_loss_and_gradient_are_the_formulas(name, in_double):
    scores, alone, mask = problem()
    found = LOSS[name](log_prior(scores), alone, mask)
    found.sum().backward()
    assert found.dtype == torch.float64
    likelihoods = (alone * mask[:, None]).sum(-1).numpy()
    for row in range(B):
        present = ~np.isinf(scores[row].detach().numpy())
        if not present.any():  # answered from the question alone, whose context is the first
            assert found[row].item() == pytest.approx(-likelihoods[row, 0] if name == "emdr2" else 0, abs=1e-12)
            assert not scores.grad[row].any()
            continue
        prior, given = softmax(scores[row].detach().numpy()[present]), likelihoods[row, present]
        if name == "emdr2":
            expected = -np.log((prior * np.exp(given)).sum())
            wanted = softmax(np.log(prior) + given)
        else:
            wanted = softmax(given)
            expected = (wanted * (np.log(wanted) - np.log(prior))).sum()
        assert found[row].item() == pytest.approx(expected, abs=1e-12)
        np.testing.assert_allclose(scores.grad[row].numpy()[present], prior - wanted, atol=1e-12)
        assert not scores.grad[row].numpy()[~present].any()


@pytest.mark.parametrize("name", LOSS)
def test_the_likelihoods_get_no_gradient(name):
    scores, alone, mask = problem()
    alone.requires_grad_()
    LOSS[name](log_prior(scores), alone, mask).sum().backward()
    assert alone.grad is None and scores.grad.any()


def test_emdr2_is_what_rag_sequence_minimises():
    scores, alone, mask = problem()
    assert torch.equal(LOSS["emdr2"](log_prior(scores), alone, mask), sequence_nll(log_prior(scores), alone, mask))


def test_distillation_is_zero_where_the_prior_is_what_the_answers_say():
    _, alone, mask = problem()
    scores = (alone * mask[:, None]).sum(-1)
    assert LOSS["perplexity_distillation"](log_prior(scores), alone, mask).abs().max() < 1e-6


def test_of_gold_passages_it_is_their_share_of_the_prior_and_the_gradient_prior_minus_shares_among_themselves():
    scores, _, _ = problem()
    gold = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = gold_nll(scores, gold)
    found.sum().backward()
    for row, some in enumerate(gold.numpy()):
        if not some.any():
            assert found[row] == 0 and not scores.grad[row].any()
            continue
        prior = softmax(scores[row].detach().numpy())
        wanted = np.where(some, prior, 0) / prior[some].sum()
        assert found[row].item() == pytest.approx(-np.log(prior[some].sum()), abs=1e-12)
        np.testing.assert_allclose(scores.grad[row].numpy(), prior - wanted, atol=1e-12)
    assert found[3] == 0, "the only candidate"
