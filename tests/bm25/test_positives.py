"""Positives are hits that contain an answer."""

from datasets import Dataset
from stages.reading.positives import find_positives, lacking


def test_the_positive_is_the_first_hit_with_an_answer():
    texts = [
        "The tower stands in a town.", "The tower of Oslo is high.", "The tower, the tower, the tower!", "Oslo has a park.",
    ]  # fmt: skip
    passages = Dataset.from_dict({"id": list("abcd"), "title": [""] * 4, "text": texts})
    rows = [
        {"question": "Where is the tower?", "answers": ["the OSLO!"], "positive_ids": []},
        {"question": "Where is the tower?", "answers": ["Bergen"], "positive_ids": []},
        {"question": "Where is the tower?", "answers": ["Slo"], "positive_ids": []},
    ]
    assert find_positives(passages, rows, depth=3) == 1
    assert [row["positive_ids"] for row in rows] == [["b"], [], []]
    assert find_positives(passages, [rows[0] | {"positive_ids": []}], depth=1) == 0


def test_questions_that_have_a_positive_and_test_questions_are_not_searched_for():
    def row(name, positives):
        return {"id": name, "positive_ids": positives}

    questions = {
        "train": [row("a", []), row("b", ["p"]), row("c", [])],
        "validation": [row("d", [])],
        "test": [row("e", [])],
    }
    assert [question["id"] for question in lacking(questions, None)] == ["a", "c", "d"]
    assert [question["id"] for question in lacking(questions, 1)] == ["a", "d"]
