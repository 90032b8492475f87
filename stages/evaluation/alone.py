"""What dense search and BM25 find alone, beside the recall of what was read: what each part of retrieval brings."""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from stages.compute.out_of_memory import in_batches
from stages.corpus.recall import recall_at
from stages.rag.batches import Examples
from stages.rag.model import Rag

Flags = Iterable[Sequence[bool]]


def flags_alone(
    rag: Rag, examples: Examples, gold: Sequence[Collection[int]], has_answer: Callable[[list[list[int]]], Flags],
    depths: Sequence[int], batch_size: int,
) -> list[dict[str, bool]]:  # fmt: skip
    """For each of N questions {"bm25_recall_at_1": True, "dense_recall_at_1": False, ...}.

    By the `gold` passages' rows over the questions that name some; where none does over all questions by their answers'
    words, as `bm25_answer_recall_at_1`: `has_answer` tells of rows [N, depth] which hold one. Empty for the others, where
    retrieval is dense alone (its recall is the model's) and for depths beyond the hits that BM25 kept.
    """
    found: dict[str, list[list[int]]] = {}
    if examples.hits is not None or rag.reranker:
        found["dense"] = dense_rows(rag, examples, max(depths), batch_size)
    if examples.hits is not None:
        found["bm25"] = examples.hits.rows[:, : max(depths)].tolist()
    flags: list[dict[str, bool]] = [{} for _ in gold]
    by_id = any(map(len, gold))
    for name, rows in found.items():
        kept = [k for k in depths if name == "dense" or k <= examples.hits.rows.shape[1]]
        in_gold = ([row in some for row in of_one] for some, of_one in zip(gold, rows, strict=True))
        right = in_gold if by_id else has_answer(rows)
        for of_one, some, is_right in zip(flags, gold, right, strict=True):
            if some or not by_id:
                of_one |= {f"{name}_{'' if by_id else 'answer_'}recall_at_{k}": any(is_right[:k]) for k in kept}
    return flags


def recall_alone(flags: Iterable[dict[str, bool]]) -> dict[str, float]:
    """Percent of the questions that have each of the flags."""
    flags = [some for some in flags if some]
    return {name: recall_at([[some[name]] for some in flags], 1) for name in (flags[0] if flags else ())}


@torch.no_grad()
def dense_rows(rag: Rag, examples: Examples, depth: int, batch_size: int) -> list[list[int]]:
    """The `depth` best rows of every question by the inner product alone; -1: no more."""

    def search(some: list[int]) -> tuple[torch.Tensor]:
        batch = rag.batch(examples, some)
        return (rag.index.search(rag.encode_questions(batch), depth),)

    return torch.cat([rows for (rows,) in in_batches(len(examples), batch_size, search)]).tolist()
