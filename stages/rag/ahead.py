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
    scores: Tensor  # [B, K], with gradient where the retriever learns
    gold_nll: Tensor | None = None  # [B], with gradient
    packed: PackedAnswers | None = None  # the contexts and their answers, where they are packed already
    context_tokens: Tensor | None = None  # real tokens of these contexts


def finds_ahead(rag: Any) -> bool:
    """Whether that may be done: where what ranks passages keeps little for the way back, beside a generator's contexts."""
    return bool(rag.packed) and not rag.passage_encoder and not rag.reranker


def found_ahead(
    rag: Any, batch: RagBatch, sizes: list[int], retriever_gradient: str = "exact", known: Found | None = None
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[RagBatch, Found]]]:
    """Parts of a batch, of these sizes, each with what one search found for all of them.

    Before them what their backward passes end at, the scores (and gold_nll): each with its past and without. What is left
    as `grad` at the second goes on through the first. What is `known` of the batch is not searched for.
    """
    rows, scores, golds = known[:3] if known else rag.find(batch, retriever_gradient)
    ends = [(one, one.detach().requires_grad_(one.requires_grad)) for one in (scores, golds) if one is not None]
    cut, nll = ends[0][1], ends[1][1] if golds is not None else None
    parts, first = [], 0
    for size in sizes:
        some = slice(first, first + size)
        part, first = batch.part(some), first + size
        ids, mask = rag.contexts(part, rows[some])
        of_golds = nll if nll is None else nll[some]
        parts.append((part, Found(rows[some], cut[some], of_golds, rag.pack(part, ids, mask), mask.sum())))
    return ends, parts
