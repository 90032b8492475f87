"""Recall@k, as the open-domain question-answering literature defines it (Karpukhin et al. 2020)."""

from collections.abc import Iterable, Sequence


def recall_at(hits: Sequence[Sequence[bool]], k: int) -> float:
    """Percent of questions, of at least one, with at least one hit among their first k passages.

    `hits` holds, for each question, one flag a retrieved passage, best passage first.
    """
    return 100.0 * sum(any(row[:k]) for row in hits) / len(hits)


def recalls(hits: Sequence[Sequence[bool]], depths: Iterable[int], prefix: str = "") -> dict[str, float]:
    """`recall_at_k` for each of the depths; of no question none, which is not a recall of 0."""
    return {f"{prefix}recall_at_{k}": recall_at(hits, k) for k in depths} if hits else {}
