"""Retrieval scored alone: the same passages as an evaluation with answers, and none of what answers have."""

import pytest

from stages.evaluate import summary
from stages.evaluation.answering import evaluate
from stages.evaluation.errors import table_row
from stages.evaluation.retrieval import evaluate_retrieval
from stages.evaluation.scoring import Rules
from stages.params import load_params
from stages.reporting.experiment import NEEDED
from stages.verdicts.description import evaluation_text
from stages.verdicts.of_evaluation import evaluation_signs
from tests.evaluation.test_answering import ASKED, GOLD_ROWS, PASSAGES, SETTINGS
from tests.tiny_rag import tiny_rag

OF_GOLD = ("recall", "mrr", "ndcg")


def unanswered():
    return ASKED.remove_columns("answers").add_column("answers", [[]] * len(ASKED))


def test_without_answers_retrieval_scores_as_with_them():
    with_answers, rows = evaluate(tiny_rag(), ASKED, PASSAGES, GOLD_ROWS, SETTINGS, "sequence")
    alone, predictions = evaluate_retrieval(tiny_rag(), unanswered(), PASSAGES, GOLD_ROWS, SETTINGS)
    names = [name for name in with_answers if name.startswith(OF_GOLD)]
    assert {"recall_at_1", "recall_at_5", "recall_at_20", "mrr_at_10", "ndcg_at_10"} == set(names)
    assert {name: alone[name] for name in alone if name.startswith(OF_GOLD)} == {
        name: pytest.approx(with_answers[name]) for name in names
    }
    assert not [name for name in alone if "em" in name.split("_") or "f1" in name or name.startswith("answer")]
    for one, other in zip(predictions, rows, strict=True):
        assert [passage["id"] for passage in one["passages"]] == [passage["id"] for passage in other["passages"]]
        assert (one["gold_known"], one["gold_rank"]) == (other["gold_known"], other["gold_rank"])
        assert one.keys() >= NEEDED and one["em"] is None and table_row(one)["probability"] is None
    assert [row["kind"] for row in predictions[7:]] == ["not judged"] * 2
    assert "MRR@10" in summary(alone, "test") and "7 test questions without answers" in summary(alone, "test")
    verdicts = evaluation_signs(alone, load_params().signs)
    assert verdicts.tags == {"sign.em": "n/a"} and "Retrieval alone on 9 test" in evaluation_text(
        alone, "test", verdicts
    )


def test_further_depths_are_measured_and_the_oracle_takes_the_best_grade():
    settings = SETTINGS.model_copy(update={"further_depths": [3]})
    metrics, _ = evaluate_retrieval(tiny_rag(), unanswered(), PASSAGES, GOLD_ROWS, settings)
    assert metrics["recall_at_1"] <= metrics["recall_at_3"] <= metrics["recall_at_5"]
    graded = [{0: 1.0, 5: 2.0}] + [{}] * 8
    metrics, rows = evaluate(tiny_rag(), ASKED, PASSAGES, graded, settings, "sequence")
    only = evaluate(tiny_rag(), ASKED, PASSAGES, [{5: 1.0}] + [{}] * 8, settings, "sequence")[1]
    assert rows[0]["with_gold_passage"] == only[0]["with_gold_passage"]
    assert metrics["answer_recall_at_3"] <= metrics["answer_recall_at_5"] and "recall_of_all_at_3" in metrics


def test_nothing_to_measure_is_told():
    with pytest.raises(ValueError, match="no question to evaluate has an answer or names a passage"):
        evaluate_retrieval(tiny_rag(), unanswered(), PASSAGES, [{}] * 9, SETTINGS)


def test_questions_with_and_without_an_answer_have_lines_of_their_own():
    answers = [["none"] if place % 3 == 0 else some for place, some in enumerate(ASKED["answers"])]
    asked = ASKED.remove_columns("answers").add_column("answers", answers)
    metrics, rows = evaluate(tiny_rag(), asked, PASSAGES, GOLD_ROWS, SETTINGS, "sequence", rules=Rules("en", "none"))
    without = [row for row in rows if row["answers"] == ["none"]]
    assert metrics["questions_without_answer"] == len(without) == 3
    assert all(row["answer_rank"] is None for row in without)  # no passage holds the word by which none is meant
    for name in ("em", "f1"):
        total = 3 * metrics[f"no_ans_{name}"] + 6 * metrics[f"has_ans_{name}"]
        assert metrics[name] == pytest.approx(total / 9)
    assert "no_ans_em" not in evaluate(tiny_rag(), ASKED, PASSAGES, GOLD_ROWS, SETTINGS, "sequence")[0]
