"""MRR@10 and nDCG@10 of a ranking, as trec_eval computes them; MS MARCO and BEIR report them through pytrec_eval."""

import math
from collections.abc import Iterable, Mapping, Sequence

from stages.corpus.recall import recalls

RANKED = 10


def reciprocal_rank(found: Sequence[int], gold: Mapping[int, float], k: int = RANKED) -> float:
    """1 / the place of the first gold passage among the first k, 0 where there is none (trec_eval's recip_rank)."""
    return next((1 / place for place, row in enumerate(found[:k], start=1) if row in gold), 0.0)


def ndcg(found: Sequence[int], gold: Mapping[int, float], k: int = RANKED) -> float:
    """Discounted gain of the first k over that of the best order of `gold`, in [0, 1] (trec_eval's ndcg_cut).

    The gain is the grade itself, the discount log2(1 + place) (Järvelin and Kekäläinen 2002).
    """
    gains = [gold.get(row, 0.0) for row in found[:k]]
    return _discounted(gains) / _discounted(sorted(gold.values(), reverse=True)[:k])


def retrieval_scores(
    found: Sequence[Sequence[int]], golds: Sequence[Mapping[int, float]], depths: Iterable[int]
) -> dict[str, float]:
    """Percent, over the questions that have gold passages: recall at the depths, MRR@10, nDCG@10; empty without any.

    `found`: rows of passages, best first, for each question; `golds`: {row: grade above 0}, empty where none is known.
    `recall_at_k` asks for one gold passage (recall.py); where a question has several, `recall_of_all_at_k` is the share of
    them among the first k (trec_eval's and BEIR's recall).
    """
    known = [(rows, gold) for rows, gold in zip(found, golds, strict=True) if gold]
    if not known:
        return {}
    depths, count = list(depths), len(known)
    scores = recalls([[row in gold for row in rows] for rows, gold in known], depths)
    if any(len(gold) > 1 for _, gold in known):
        for k in depths:
            shares = [len(gold.keys() & set(rows[:k])) / len(gold) for rows, gold in known]
            scores[f"recall_of_all_at_{k}"] = 100.0 * math.fsum(shares) / count
    for name, score in (("mrr", reciprocal_rank), ("ndcg", ndcg)):
        scores[f"{name}_at_{RANKED}"] = 100.0 * math.fsum(score(*pair) for pair in known) / count
    return scores


def _discounted(gains: Iterable[float]) -> float:
    return math.fsum(gain / math.log2(1 + place) for place, gain in enumerate(gains, start=1))
