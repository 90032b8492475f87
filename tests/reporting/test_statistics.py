"""Intervals and tests against what is known of them."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap, permutation_test

from stages.reporting.statistics import (
    Bin,
    Interval,
    by_rank,
    calibration,
    calibration_error,
    interval,
    paired,
    proportion,
)  # fmt: skip


def test_the_bootstrap_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(50, 10, 2000).tolist()
    found = interval(values)
    error = np.std(values) / len(values) ** 0.5
    assert found.mean == pytest.approx(np.mean(values))
    assert found.high - found.mean == pytest.approx(1.96 * error, rel=0.1)
    assert found.mean - found.low == pytest.approx(1.96 * error, rel=0.1)
    assert interval(values) == found  # drawn from a seed: the same report again


def test_intervals_are_scipys():
    values = np.random.default_rng(5).random(83)
    wanted = bootstrap((values,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=13).confidence_interval
    found = interval(values.tolist())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    for right, count in ((0, 3), (3, 3), (1, 2), (61, 400), (399, 400)):
        wanted = binomtest(right, count).proportion_ci(method="wilson")
        found = proportion([True] * right + [False] * (count - right))
        assert (found.mean, found.low, found.high) == pytest.approx((right / count, wanted.low, wanted.high), abs=1e-12)


def test_intervals_of_few_values():
    assert interval([]) is None and proportion([]) is None
    assert interval([40.0]) == Interval(40, 40, 40, 1) and interval([1.0, 1.0]) == Interval(1, 1, 1, 2)
    none_of_three = proportion([False] * 3)
    assert (none_of_three.mean, none_of_three.low) == (0, 0) and none_of_three.high == pytest.approx(0.5615, abs=1e-4)


def test_mcnemars_exact_test_counts_the_questions_that_one_alone_answers():
    first = [1] * 9 + [0] * 2 + [1] * 50 + [0] * 50
    second = [0] * 9 + [1] * 2 + [1] * 50 + [0] * 50
    found = paired(first, second, yes_or_no=True)
    assert found.p == pytest.approx(2 * binom.cdf(2, 11, 0.5))
    assert found.difference.mean == pytest.approx(7 / 111)
    assert paired(first, first, yes_or_no=True).p == 1
    for alone, others in ((1, 0), (3, 3), (20, 35), (700, 600)):
        found = paired([1] * alone + [0] * others, [0] * alone + [1] * others, yes_or_no=True)
        assert found.p == pytest.approx(binomtest(alone, alone + others).pvalue)


def test_the_permutation_test_of_f1_is_scipys():
    first, second = np.random.default_rng(3).random((2, 40))
    first += 0.15
    wanted = permutation_test(
        (first - second,), lambda some, axis: np.mean(some, axis=axis), permutation_type="samples", vectorized=True, rng=0,
    ).pvalue  # fmt: skip
    found = paired(first.tolist(), second.tolist(), yes_or_no=False)
    assert 0.01 < wanted < 0.3 and found.p == pytest.approx(wanted, abs=0.02)
    exact = 2 / 2**4  # all signs alike is the most extreme of 16 flips
    assert paired([0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4], yes_or_no=False).p == pytest.approx(exact, abs=0.02)
    assert paired([0.5, 0.6], [0.5, 0.6], yes_or_no=False).p == 1


def row(em, gold_rank=None, answer_rank=None, gold_known=True):
    return {"em": em, "gold_rank": gold_rank, "answer_rank": answer_rank, "gold_known": gold_known}


def test_em_by_the_place_of_the_gold_passage():
    rows = [row(1, 1), row(0, 1), row(1, 2), row(0, 7), row(0), row(1, None, 2, gold_known=False)]
    found = by_rank(rows, n_docs=3)
    assert list(found) == ["1", "2", "3", "not read"] and found["3"] is None
    assert [(found[place].mean, found[place].count) for place in ("1", "2", "not read")] == [(0.5, 2), (1, 2), (0, 2)]
    assert list(by_rank([], n_docs=22))[8:] == ["9", "10 to 19", "20 to 22", "not read"]


def test_calibration_puts_probabilities_into_tenths():
    bins = calibration([(0.05, False), (0.07, True), (0.95, True), (1.0, True)])
    assert [(one.predicted, one.observed.mean, one.observed.count) for one in bins] == [
        (pytest.approx(0.06), 0.5, 2), (pytest.approx(0.975), 1.0, 2),
    ]  # fmt: skip
    assert calibration_error(bins) == pytest.approx((2 * 0.44 + 2 * 0.025) / 4)
    assert calibration([]) == [] and calibration_error([]) == 0


def test_a_calibrated_prior_has_no_error():
    draw = np.random.default_rng(1)
    probabilities = draw.random(20000)
    bins = calibration(list(zip(probabilities.tolist(), (draw.random(20000) < probabilities).tolist(), strict=True)))
    assert len(bins) == 10 and all(isinstance(one, Bin) for one in bins) and calibration_error(bins) < 0.02
