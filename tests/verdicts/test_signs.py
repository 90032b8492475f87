"""Verdicts: each sign turns bad beyond its threshold, names the remedy, and stays silent about what was not measured."""

import math

import pytest

from stages.params import load_params
from stages.verdicts.of_evaluation import evaluation_signs
from stages.verdicts.of_training import training_signs

LIMITS = load_params().signs
METRICS = {"val_loss_before_training": 4.0, "val_loss_per_sequence": 2.0, "seconds_per_batch": 0.4}
POINT = {
    "step": 9, "val_loss_per_sequence": 2.0, "prior_entropy": 0.5, "distinct_passages": 0.9, "gpu_utilization": 90.0,
    "gpu_memory": 85.0,
}  # fmt: skip

FIRST = {"step": 3, "val_loss_per_sequence": 1.95}


def verdict(name, metrics=None, point=None, on_gpu=True):
    found = training_signs([FIRST, POINT | (point or {})], METRICS | (metrics or {}), LIMITS, on_gpu)
    return next(sign for sign in found.signs if sign.name == name), found


@pytest.mark.parametrize(
    ("name", "metrics", "point"),
    [
        ("val_loss", {"val_loss_per_sequence": 3.95}, {}),
        ("overfitting", {}, {"val_loss_per_sequence": 2.1}),
        ("speed", {"seconds_per_batch": 1.2}, {}),
        ("retrieval", {}, {"distinct_passages": 0.1}),
        ("prior", {}, {"prior_entropy": 0.995}),
        ("gpu_utilization", {}, {"gpu_utilization": 20.0}),
        ("gpu_memory", {}, {"gpu_memory": 30.0}),
    ],
)
def test_bad_beyond_the_threshold_with_the_remedy(name, metrics, point):
    assert verdict(name)[0].good is True
    sign, all_of_them = verdict(name, metrics, point)
    assert sign.good is False and sign.remedy in all_of_them.text and all_of_them.tags[f"sign.{name}"] == "bad"
    assert sum(other.good is False for other in all_of_them.signs) == 1
    assert verdict(name)[0].remedy not in verdict(name)[1].text


def test_a_cpu_has_no_verdict_on_speed_and_gpu():
    point = {key: value for key, value in POINT.items() if not key.startswith("gpu")}
    found = training_signs([point], METRICS | {"seconds_per_batch": 9.0}, LIMITS, on_gpu=False)
    assert {sign.name for sign in found.signs if sign.good is None} == {"speed", "gpu_utilization", "gpu_memory"}


def test_overfitting_is_told_from_the_losses_that_are_finite_and_names_the_steps():
    losses = {0: 24.7, 750: 2.9, 2250: 2.77, 3000: math.inf, 7120: 3.87}
    points = [POINT | {"step": step, "val_loss_per_sequence": loss} for step, loss in losses.items()]
    sign = next(sign for sign in training_signs(points, METRICS, LIMITS, True).signs if sign.name == "overfitting")
    assert "at step 2250 of 7120, the last 40 % above it" in sign.finding and "max_steps near 2250" in sign.remedy
    none = training_signs([POINT | {"val_loss_per_sequence": math.nan}], METRICS, LIMITS, True)
    assert "sign.overfitting" not in none.tags


def test_evaluation():
    good = evaluation_signs({"em": 40.0, "oracle_em": 60.0, "closed_book_em_of_oracle_questions": 5.0}, LIMITS)
    assert all(sign.good for sign in good.signs)
    bad = evaluation_signs({"em": 4.8, "oracle_em": 5.0, "closed_book_em_of_oracle_questions": 5.0}, LIMITS)
    assert [sign.good for sign in bad.signs] == [False, False] and "4.8" in bad.text


def test_reading_is_judged_on_the_same_questions_and_not_at_all_where_no_gold_passage_is_known():
    """Closed book is easy on the questions that name no passage: of them the verdict must not speak."""
    metrics = {"em": 40.0, "oracle_em": 20.0, "closed_book_em": 30.0, "closed_book_em_of_oracle_questions": 10.0}
    assert evaluation_signs(metrics, LIMITS).tags["sign.reads_passages"] == "good"
    unknown = evaluation_signs({"em": 4.0, "closed_book_em": 30.0, "answer_recall_at_5": 50.0}, LIMITS)
    assert unknown.tags["sign.reads_passages"] == "n/a" and "ignores" not in unknown.text
    assert "answer_recall_at_5" in unknown.text and "oracle_em" not in unknown.text


def test_a_validation_loss_that_is_not_finite_is_bad_at_the_end_and_unknown_at_the_start():
    known = {name: value for name, value in METRICS.items() if name != "val_loss_before_training"}
    assert training_signs([POINT], known, LIMITS, False).tags["sign.val_loss"] == "n/a"
    del known["val_loss_per_sequence"]
    assert training_signs([POINT], known, LIMITS, False).tags["sign.val_loss"] == "bad"


def test_questions_without_passages_were_answered_only_where_there_are_answers():
    lost = {"questions": 9, "questions_without_passages": 2}
    alone, answered = evaluation_signs(lost, LIMITS).text, evaluation_signs(lost | {"em": 4.0}, LIMITS).text
    assert "2 of 9 questions found no passage" in alone and "answered" not in alone
    assert "2 of 9 questions found no passage and were answered from themselves" in answered
