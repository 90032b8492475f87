"""Passages found for several forward passes of an update at once: one encoder's pass and one search in place of many.

What a pass of two questions takes is mostly the host's time between an encoder's small kernels. Their contexts are packed
before the first of the passes, too: the host then waits for the device once. The update is the same sum of gradients.
"""

from typing import Any, NamedTuple

from torch import Tensor

from stages.packed.packing import PackedAnswers
from stages.rag.batches import RagBatch


class Found(NamedTuple):
    """What is known of B questions before the generator reads."""

    rows: Tensor  # [B, K] passages
    scores: Tensor  # [B, K], with gradient
    packed: PackedAnswers  # the contexts and their answers
    context_tokens: Tensor  # real tokens of the contexts


def finds_ahead(rag: Any) -> bool:
    """Whether that may be done: where what ranks passages keeps little for the way back, beside a generator's contexts."""
    return bool(rag.packed) and not rag.passage_encoder and not rag.reranker


def found_ahead(
    rag: Any, batch: RagBatch, sizes: list[int], retriever_gradient: str = "exact"
) -> tuple[Tensor, Tensor, list[tuple[RagBatch, Found]]]:
    """Parts of a batch, of these sizes, each with what one search found for all of them.

    Before them the scores, and the same without their past, where the parts' backward passes end: what these leave there
    as `grad` goes on through the first.
    """
    rows, scores = rag.find(batch, retriever_gradient)
    cut = scores.detach().requires_grad_(scores.requires_grad)
    parts, first = [], 0
    for size in sizes:
        some = slice(first, first + size)
        part, first = batch.part(some), first + size
        ids, mask = rag.contexts(part, rows[some])
        parts.append((part, Found(rows[some], cut[some], rag.pack(part, ids, mask), mask.sum())))
    return scores, cut, parts
