"""Recall@k, as the open-domain question-answering literature defines it (Karpukhin et al. 2020)."""

from collections.abc import Sequence


def recall_at(hits: Sequence[Sequence[bool]], k: int) -> float:
    """Percent of questions with at least one hit among their first k passages.

    `hits` holds, for each question, one flag a retrieved passage, best passage first.
    """
    return 100.0 * sum(any(row[:k]) for row in hits) / len(hits) if hits else 0.0
