"""From states to log-probabilities of given tokens, without all logits at once: a vocabulary of 150,000 words would take
GiB for a batch's answers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from stages.generation import marginalization

# Most logits to hold at once in the loss: 2**24 are 64 MB in fp32. More are computed again in the backward pass.
LOGITS_AT_ONCE = 2**24


class _StatesAlone(BaseModelOutput):
    """A decoder's output of which a family may read whatever it wants: it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def token_log_probs(
    head: nn.Module, bias: Tensor | None, states: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """log p(target) [N] in fp32 of `targets` [N] where the logits are `head(states) + bias`, states [N, H]."""
    vocab = head.weight.shape[0]
    project, bias = _prepared(head, bias, states)

    def logits_of(states: Tensor) -> Tensor:
        logits = project(states)
        if bias is not None:
            logits = logits + bias
        return logits[:, :vocab] if label_smoothing else logits

    return _in_pieces(logits_of, vocab, states, targets, label_smoothing)


def padded_log_probs(generator: Any, contexts: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """log p(target) [R, T] in fp32 of `targets` [R, T] under encoded contexts, by any family's Generator.

    Its decoder runs once over all rows; what its library's model does behind it, in pieces where that is much.
    """
    vocab = generator.model.get_output_embeddings().weight.shape[0]
    if targets.numel() * vocab <= LOGITS_AT_ONCE or not generator.past_modules:
        logits = generator.logits(contexts, targets)
        return marginalization.token_log_probs(logits[:, None], targets, label_smoothing)[:, 0]
    states = generator.states(contexts, targets)
    scored = _in_pieces(generator.logits_behind, vocab, states.flatten(0, 1), targets.flatten(), label_smoothing)
    return scored.view_as(targets)


def logits_behind(model: nn.Module, states: Tensor, **inputs) -> Tensor:
    """Logits [N, V] of the decoder's `states` [N, H], by the library's whole model: heads, scalings and caps are its own.

    `inputs` are any of a forward pass; the decoder, which gives `states` in place of its own, does not look at them.
    """
    decoder = model.get_decoder()
    assert "forward" not in vars(decoder)
    decoder.forward = lambda *_, **__: _StatesAlone(last_hidden_state=states[None])
    try:
        return model(use_cache=False, **inputs).logits[0]
    finally:
        del decoder.forward


def _in_pieces(
    logits_of: Callable[[Tensor], Tensor], vocab: int, states: Tensor, targets: Tensor, label_smoothing: float
) -> Tensor:
    def score(states: Tensor, targets: Tensor) -> Tensor:
        return marginalization.token_log_probs(logits_of(states)[None, None], targets[None], label_smoothing)[0, 0]

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
