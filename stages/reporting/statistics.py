"""How sure the numbers of a report are: intervals by bootstrap over questions, paired tests, calibration.

The numbers are scipy.stats', whose import alone takes a quarter of the report's time.
"""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
PERMUTATIONS = 10_000
SEED = 13
NORMAL = 1.959963984540054  # standard deviations on either side of a mean that hold 95 %


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, over `count` questions."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Paired:
    """A score of two experiments on the same questions; `difference` is first less second.

    `p`: for EM McNemar's exact test on the questions that one of them alone answers, for F1 a permutation test that flips
    the signs of the differences.
    """

    difference: Interval
    p: float


@dataclass(frozen=True)
class Bin:
    """Probabilities between two bounds: their mean, and the share that turned out true."""

    predicted: float
    observed: Interval


def interval(values: list[float]) -> Interval | None:
    """Bootstrap over the questions (percentiles), from a value a question; None without any."""
    if not values:
        return None
    sample = np.asarray(values, float)
    mean = float(sample.mean())
    if len(sample) < 2 or np.ptp(sample) == 0:
        return Interval(mean, mean, mean, len(sample))
    draw, means = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES // 100):
        means.append(sample[draw.integers(0, len(sample), (100, len(sample)))].mean(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(mean, float(low), float(high), len(sample))


def proportion(true: list[bool]) -> Interval | None:
    """A share in [0, 1] with Wilson's interval, which holds for few questions and for shares of 0 and 1 too."""
    if not true:
        return None
    count, share = len(true), sum(map(bool, true)) / len(true)
    width = NORMAL * math.sqrt(share * (1 - share) / count + (NORMAL / count / 2) ** 2)
    middle, whole = share + NORMAL**2 / count / 2, 1 + NORMAL**2 / count
    # A share of 0 or 1 is the interval's end, whatever rounding makes of it.
    return Interval(share, min(share, (middle - width) / whole), max(share, (middle + width) / whole), count)


def paired(first: list[float], second: list[float], yes_or_no: bool) -> Paired:
    """Two experiments' values of the same questions, at least one; `yes_or_no`: they are 0 or 1."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    if yes_or_no:
        alone, others = int((differences > 0).sum()), int((differences < 0).sum())
        # Twice the smaller tail of a fair coin.
        tail = sum(math.comb(alone + others, some) for some in range(min(alone, others) + 1))
        p = min(1.0, 2 * tail / 2 ** (alone + others))
    else:
        p = sign_flips(differences)
    return Paired(interval(differences.tolist()), float(p))


def sign_flips(differences: np.ndarray) -> float:
    """Two-sided p of a paired permutation test (Dror et al. 2018) by 10,000 draws, itself among them as the first.

    scipy's permutation_test gives the same and takes 12 s for 5,000 questions; this, half a second.
    """
    draw, extreme = np.random.default_rng(SEED), 1
    observed = abs(differences.sum()) - 1e-9
    for _ in range(PERMUTATIONS // 100):
        signs = 2.0 * draw.integers(0, 2, (100, len(differences)), dtype=np.int8) - 1
        extreme += int((abs(signs @ differences) >= observed).sum())
    return extreme / (PERMUTATIONS + 1)


def by_rank(rows: list[dict], n_docs: int) -> dict[str, Interval | None]:
    """EM in [0, 1] by the place of the gold passage: '1', '2', ..., tens from 10 on, and 'not read'. Where no question names one,
    by the place of the first passage with an answer."""
    labels = [_place(rank, n_docs) for rank in range(1, n_docs + 1)]
    groups: dict[str, list[bool]] = {label: [] for label in [*labels, "not read"]}
    for row in rows:
        rank = row["gold_rank"] if row["gold_known"] else row["answer_rank"]
        groups[_place(rank, n_docs)].append(bool(row["em"]))
    return {label: proportion(values) for label, values in groups.items()}


def _place(rank: int | None, n_docs: int) -> str:
    if rank is None or rank > n_docs:
        return "not read"
    if rank < 10:
        return str(rank)
    return f"{rank // 10 * 10} to {min(n_docs, rank // 10 * 10 + 9)}"


def calibration(pairs: list[tuple[float, bool]], bins: int = 10) -> list[Bin]:
    """Of (probability, came true): bins of equal width, those that hold any; shares in [0, 1]."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for probability, true in pairs:
        groups.setdefault(min(int(probability * bins), bins - 1), []).append((probability, true))
    return [
        Bin(float(np.mean([one for one, _ in group])), proportion([true for _, true in group]))
        for _, group in sorted(groups.items())
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error (Guo et al. 2017): mean distance of predicted and observed, weighted by the bins' size."""
    total = sum(one.observed.count for one in bins)
    return sum(one.observed.count * abs(one.predicted - one.observed.mean) for one in bins) / max(1, total)
