"""The losses against the formulas written out in double precision, and the gradients they promise."""

import math

import pytest
import torch
import torch.nn.functional as F

from stages.generation import marginalization as m

B, K, T, V = 3, 4, 5, 11


def case(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, K, generator=generator, dtype=dtype) * 3
    logits = torch.randn(B, K, T, V, generator=generator, dtype=dtype) * 2
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([5, 1, 3])[:, None]  # one answer of a single token
    return scores, logits, targets, mask


def reference(scores, logits, targets, mask):
    """The three losses and the posterior with plain Python floats."""
    sequence, token, average, posteriors = [], [], [], []
    for b in range(len(scores)):
        prior = [math.exp(s) for s in scores[b].tolist()]
        prior = [p / sum(prior) for p in prior]
        steps = int(mask[b].sum())
        p_token = [
            [
                math.exp(logits[b, k, t, targets[b, t]].item()) / sum(math.exp(x) for x in logits[b, k, t].tolist())
                for t in range(steps)
            ]
            for k in range(len(prior))
        ]
        joint = [p * math.prod(row) for p, row in zip(prior, p_token, strict=True)]
        sequence.append(-math.log(sum(joint)))
        token.append(
            -sum(math.log(sum(p * row[t] for p, row in zip(prior, p_token, strict=True))) for t in range(steps))
        )
        average.append(-sum(math.log(math.prod(row)) for row in p_token) / len(prior))
        posteriors.append([value / sum(joint) for value in joint])
    return (torch.tensor(values) for values in (sequence, token, average, posteriors))


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_posterior_equal_the_formulas(seed):
    scores, logits, targets, mask = case(seed)
    sequence, token, average, posterior = reference(scores.double(), logits.double(), targets, mask)
    prior, token_lp = m.log_prior(scores), m.token_log_probs(logits, targets)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(m.sequence_nll(prior, token_lp, mask), sequence, **close)
    torch.testing.assert_close(m.token_nll(prior, token_lp, mask), token, **close)
    torch.testing.assert_close(m.average_nll(prior, token_lp, mask), average, **close)
    torch.testing.assert_close(m.posterior(prior, token_lp, mask), posterior, **close)


def test_gradient_on_the_scores_is_prior_minus_posterior():
    scores, logits, targets, mask = case()
    scores.requires_grad_()
    prior, token_lp = m.log_prior(scores), m.token_log_probs(logits, targets)
    m.sequence_nll(prior, token_lp, mask).sum().backward()
    expected = prior.detach().exp() - m.posterior(prior.detach(), token_lp, mask)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 0.05


def test_token_gradient_by_finite_differences():
    scores, logits, targets, mask = case()
    token_lp = logits.double().log_softmax(-1).gather(-1, targets[:, None, :, None].expand(B, K, T, 1)).squeeze(-1)

    def loss(values):
        return m.token_nll(values.log_softmax(-1), token_lp, mask).sum()

    assert torch.autograd.gradcheck(loss, scores.double().requires_grad_())


def test_averaging_gives_the_retriever_exactly_nothing():
    scores, logits, targets, mask = case()
    scores.requires_grad_()
    loss = m.average_nll(m.log_prior(scores), m.token_log_probs(logits, targets), mask).sum()
    assert not loss.requires_grad or torch.autograd.grad(loss, scores, allow_unused=True)[0] in (None, 0)


@pytest.mark.parametrize("nll", [m.sequence_nll, m.token_nll])
def test_a_one_token_answer_carries_the_prior(nll):
    scores, logits, targets, _ = case()
    mask = torch.arange(T) < torch.ones(B, 1)
    token_lp = m.token_log_probs(logits, targets)
    flat, peaked = nll(m.log_prior(scores * 0), token_lp, mask), nll(m.log_prior(scores), token_lp, mask)
    expected = -(m.log_prior(scores) + token_lp[:, :, 0]).logsumexp(-1)
    torch.testing.assert_close(peaked, expected)
    assert (flat - peaked).abs().max() > 0.1


@pytest.mark.parametrize("nll", list(m.NLL.values()))
def test_what_stands_in_the_padding_changes_nothing(nll):
    scores, logits, targets, mask = case()
    garbage = torch.where(mask, targets, (targets + 3) % V)
    noisy = torch.where(mask[:, None, :, None], logits, logits * 50 + 7)
    prior = m.log_prior(scores)
    torch.testing.assert_close(
        nll(prior, m.token_log_probs(noisy, garbage), mask), nll(prior, m.token_log_probs(logits, targets), mask)
    )


@pytest.mark.parametrize("nll", list(m.NLL.values()))
def test_a_missing_passage_contributes_nothing_and_no_nan(nll):
    scores, logits, targets, mask = case()
    without = nll(m.log_prior(scores[:, :3]), m.token_log_probs(logits[:, :3], targets), mask)
    scores[:, 3] = float("-inf")
    scores.requires_grad_()
    logits.requires_grad_()
    found = nll(m.log_prior(scores), m.token_log_probs(logits, targets), mask)
    torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-5)
    (found.sum() + 0 * scores[:, :3].sum()).backward()
    assert torch.isfinite(scores.grad).all() and torch.isfinite(logits.grad).all()
    assert not scores.grad[:, 3].any() and not logits.grad[:, 3].any()


def test_label_smoothing_is_that_of_the_cross_entropy():
    _, logits, targets, _ = case()
    found = m.token_log_probs(logits, targets, 0.2)
    for k in range(K):
        expected = F.cross_entropy(logits[:, k].flatten(0, 1), targets.flatten(), label_smoothing=0.2, reduction="none")
        torch.testing.assert_close(-found[:, k].flatten(), expected)


def test_half_precision_logits_are_summed_in_fp32():
    _, logits, targets, _ = case()
    assert m.token_log_probs(logits.bfloat16(), targets).dtype == torch.float32
    assert m.log_prior(torch.randn(2, 3).bfloat16()).dtype == torch.float32


def test_entropy_is_a_share_of_its_maximum():
    prior = m.log_prior(torch.tensor([[0.0, 0, 0, 0], [50, 0, 0, 0], [3, 3, float("-inf"), float("-inf")]]))
    assert m.normalized_entropy(prior).tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-4)
    assert torch.isfinite(m.normalized_entropy(m.log_prior(torch.zeros(2, 1)))).all()


def test_a_question_for_which_nothing_was_found_is_answered_from_itself_alone_and_teaches_the_retriever_nothing():
    """The first context is the question alone and has all of the prior; the other question is as it was."""
    found = torch.tensor([0.5, -math.inf, 1.5])
    scores = torch.stack([torch.full((3,), -math.inf), found]).requires_grad_()
    prior = m.log_prior(scores)
    assert prior[0].tolist() == [0.0, -math.inf, -math.inf]
    assert torch.equal(prior[1], found.log_softmax(-1))
    token_lp = torch.randn(2, 3, 4).sub(3).requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool)
    for name, nll in m.NLL.items():
        losses = nll(m.log_prior(scores), token_lp, mask)
        assert losses[0].item() == pytest.approx(-token_lp[0, 0].sum().item(), rel=1e-5), name
        of_scores, of_tokens = torch.autograd.grad(losses.sum(), (scores, token_lp), allow_unused=name == "average")
        assert of_scores is None or (torch.isfinite(of_scores).all() and not of_scores[0].any()), name
        assert torch.isfinite(of_tokens).all() and of_tokens[0, 0].all() and not of_tokens[0, 1:].any(), name
    assert m.posterior(prior, token_lp, mask)[0].tolist() == [1.0, 0.0, 0.0]
    assert m.normalized_entropy(prior)[0].item() == 0.0
