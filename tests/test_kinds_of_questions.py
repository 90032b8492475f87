"""Questions without answers, unanswerable ones and those answered by patterns, through the whole pipeline."""

import json
from pathlib import Path

import pytest

from stages import recall
from stages.machine.entry import run
from tests.whole_way import whole_way

pytestmark = pytest.mark.slow
PLACES = {
    "Orven": "Tarn", "Miro": "Kest", "Sula": "Brane", "Pelk": "Dorn", "Ruvo": "Hask", "Ilda": "Noor", "Varn": "Quill",
    "Osk": "Lemm", "Tiva": "Rook", "Yarrow": "Fenn",
}  # fmt: skip


def rows(answers) -> dict[str, list[dict]]:
    """A passage and a question a lake; `answers`: of a place's number and valley."""
    passages = [
        {"id": f"p{i}", "title": f"Lake {lake}", "text": f"Lake {lake} lies in the valley of {valley}."}
        for i, (lake, valley) in enumerate(PLACES.items())
    ]
    asked = [
        {
            "id": f"q{i}", "question": f"In which valley lies Lake {lake}?", "positive_ids": [f"p{i}"],
            **({} if (given := answers(i, valley)) is None else {"answers": given}),
        }
        for i, (lake, valley) in enumerate(PLACES.items())
    ]  # fmt: skip
    return {"passages": passages, "train": asked[:6], "validation": asked[6:8], "test": asked[8:]}


def test_without_answers_the_retriever_is_trained_and_measured_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metrics, predictions = whole_way(rows(lambda i, valley: None), evaluate={"further_depths": [10]})
    assert metrics["recall_at_1"] == metrics["recall_at_10"] == metrics["mrr_at_10"] == metrics["ndcg_at_10"] == 100.0
    assert "em" not in metrics and all(isinstance(value, int | float) for value in metrics.values())
    assert [row["kind"] for row in predictions] == ["found first"] * 2
    assert json.loads(Path("metrics/train.json").read_text())["steps"] == 0
    said = capsys.readouterr().out
    assert "the train questions have no answers: nothing is trained jointly" in said and "MRR@10 100.0" in said
    page = Path("data/report/report.html").read_text(encoding="utf-8")
    assert "Where the gold passage stands" in page and "In which valley lies Lake Tiva?" in page
    assert "Retrieval alone" not in page and "EM by the place" not in page
    monkeypatch.setattr(
        "sys.argv", ["recall", "--split", "test", "--trained", "--depths", "1", "3", "--out", "out.json"]
    )
    run(recall.main)
    measured = json.loads(Path("out.json").read_text())
    assert set(measured["bm25"]) == {"recall_at_1", "recall_at_3", "mrr_at_10", "ndcg_at_10"}
    assert measured["hybrid_1"]["mrr_at_10"] == metrics["mrr_at_10"]


def test_unanswerable_questions_are_learned_and_scored_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics, predictions = whole_way(
        rows(lambda i, valley: [] if i % 2 else [valley]), data={"unanswerable": "unanswerable"}
    )
    assert metrics["questions_without_answer"] == 1 and metrics["answer_recall_at_5"] == 100.0
    assert metrics["em"] == (metrics["has_ans_em"] + metrics["no_ans_em"]) / 2
    assert [row["answers"] for row in predictions] == [["Rook"], ["unanswerable"]]


def test_patterns_train_on_what_they_match_and_are_matched_by_what_is_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions = rows(lambda i, valley: [valley[:2].lower() + r"\w+"])
    for row in questions["train"]:
        del row["positive_ids"]  # found by BM25, then matched in
    metrics, predictions = whole_way(questions, data={"answers_are": "regex"})
    assert metrics["answer_recall_at_1"] == metrics["em"] == metrics["f1"] == 100.0
    assert [row["prediction"] for row in predictions] == ["Rook", "Fenn"]
