"""The RAG likelihoods (Lewis et al. 2020, section 2.1) and the mistake they are compared with.

Shapes: B questions, K retrieved passages each, T answer tokens (EOS included, padded), V vocabulary.
"""

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """log p(y_t | y_<t, x, z) in fp32: logits [B, K, T, V] and targets [B, T] give [B, K, T].

    Label smoothing mixes the target with the uniform distribution inside each token's distribution, before anything is
    marginalised: (1 - e) log p(y_t) + e mean_v log p(v).
    """
    logits = logits.float()
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets[:, None, :, None].expand(*logits.shape[:3], 1)).squeeze(-1)
    log_probs = chosen - normalizer
    if label_smoothing:
        log_probs = (1 - label_smoothing) * log_probs + label_smoothing * (logits.mean(-1) - normalizer)
    return log_probs


def log_prior(doc_scores: Tensor) -> Tensor:
    """log p(z | x): log-softmax over the retrieved passages of doc_scores [B, K]; -inf (no passage) stays -inf.

    A question for which nothing was found is answered from itself alone: its first column, whose context is the question
    without a passage, has log prior 0, and no gradient reaches the retriever.
    """
    scores = doc_scores.float()
    alone = torch.full_like(scores, -torch.inf)
    alone[..., 0] = 0.0
    return torch.where((scores == -torch.inf).all(-1, keepdim=True), alone, scores).log_softmax(-1)


def sequence_nll(prior: Tensor, token_lp: Tensor, mask: Tensor) -> Tensor:
    """RAG-Sequence: -logsumexp_z [ log p(z|x) + sum_t log p(y_t|..., z) ], nats a question [B].

    The prior enters once a sequence, so a one-token answer carries it too. `mask` [B, T] is True at answer tokens.
    """
    return -(prior + answer_log_probs(token_lp, mask)).logsumexp(-1)


def token_nll(prior: Tensor, token_lp: Tensor, mask: Tensor) -> Tensor:
    """RAG-Token: -sum_t logsumexp_z [ log p(z|x) + log p(y_t|..., z) ], nats a question [B]."""
    per_token = (prior[:, :, None] + token_lp).logsumexp(1)
    return -per_token.masked_fill(~mask, 0.0).sum(-1)


def average_nll(prior: Tensor, token_lp: Tensor, mask: Tensor) -> Tensor:
    """The old recipe: the mean over passages of each passage's NLL, nats a question [B].

    The prior is not in it: the gradient on the retriever's scores is exactly zero. Missing passages are left out.
    """
    present = ~prior.isinf()
    losses = -answer_log_probs(token_lp, mask).masked_fill(~present, 0.0)
    return losses.sum(-1) / present.sum(-1)


def posterior(prior: Tensor, token_lp: Tensor, mask: Tensor) -> Tensor:
    """p(z | x, y) [B, K]: what the retriever's prior should have been for this answer."""
    return (prior + answer_log_probs(token_lp, mask)).softmax(-1)


def normalized_entropy(prior: Tensor) -> Tensor:
    """Entropy of each prior over log K, in [0, 1]: 1 is flat, 0 is certain; [B]."""
    entropy = -(prior.exp() * prior.masked_fill(prior.isinf(), 0.0)).sum(-1)
    return entropy / torch.tensor(float(max(prior.shape[-1], 2))).log()


def answer_log_probs(token_lp: Tensor, mask: Tensor) -> Tensor:
    """log p(y|x, z) [B, K] of the tokens' [B, K, T]."""
    return token_lp.masked_fill(~mask[:, None, :], 0.0).sum(-1)


NLL = {"sequence": sequence_nll, "token": token_nll, "average": average_nll}
