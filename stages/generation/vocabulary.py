"""From states to log-probabilities of given tokens, without all logits at once: a vocabulary of 150,000 words would take
GiB for a batch's answers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.generation import marginalization

# Most logits to hold at once in the loss: 2**24 are 64 MB in fp32. More are computed again in the backward pass.
LOGITS_AT_ONCE = 2**24


def token_log_probs(
    head: nn.Module, bias: Tensor | None, states: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """log p(target) [N] in fp32 of `targets` [N] where the logits are `head(states) + bias`, states [N, H]."""
    vocab = head.weight.shape[0]
    project, bias = _prepared(head, bias, states)

    def score(states: Tensor, targets: Tensor) -> Tensor:
        logits = project(states)
        if bias is not None:
            logits = logits + bias
        if label_smoothing:
            logits = logits[:, :vocab]
        return marginalization.token_log_probs(logits[None, None], targets[None], label_smoothing)[0, 0]

    rows = max(1, LOGITS_AT_ONCE // vocab)
    if len(states) <= rows:
        return score(states, targets)
    return torch.cat(
        [
            checkpoint(score, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(states.split(rows), targets.split(rows), strict=True)
        ]
    )


def _prepared(head: nn.Module, bias: Tensor | None, states: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """The projection to the vocabulary and its bias, for all pieces of the loss; on a GPU cast once and in rows of 8."""
    # An adapter's module is more than its weights.
    if not states.is_cuda or type(head) is not nn.Linear or head.bias is not None:
        return head, bias
    weight = head.weight
    if torch.is_autocast_enabled("cuda"):
        weight = weight.to(torch.get_autocast_dtype("cuda"))
    missing = -len(weight) % 8
    if bias is None and missing:
        bias = weight.new_zeros(len(weight))
    if bias is not None:
        weight, bias = in_rows_of_8(weight, bias)
    return partial(F.linear, weight=weight), bias


def in_rows_of_8(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [V, H] and bias [V] of the projection to the vocabulary, filled up by impossible words to a multiple of 8.

    Their logits are -inf: behind V, no log p and no gradient changes. A GPU's matrix products are several times slower
    where the vocabulary's size is odd, as BART's is.
    """
    missing = -len(weight) % 8
    if not missing:
        return weight, bias
    return F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=float("-inf"))
