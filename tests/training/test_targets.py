"""What training aims at where answers are patterns, and that questions without answers are none."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from stages.corpus.arrow import FOUND, write_rows
from stages.settings.data import Data
from stages.training.targets import POSITIVES, aimed, has_answers

PASSAGES = [
    {"id": "p0", "title": "Lake 12", "text": "It is 40 m deep, then 55 m."}, {"id": "p1", "title": "Lake 13", "text": "Deep."},
    {"id": "p2", "title": "Tarn", "text": "A valley, 7 km long."},
]  # fmt: skip
QUESTIONS = [
    {"id": "a", "question": "How deep?", "answers": [r"\d+ miles", r"\d+ m\b"], "positive_ids": ["p0"]},
    {"id": "b", "question": "Which lake?", "answers": [r"lake \d+"], "positive_ids": ["p1", "p0"]},
    {"id": "c", "question": "How long?", "answers": [r"\d+ km"], "positive_ids": []},  # found by the stage positives
    {"id": "d", "question": "How high?", "answers": [r"\d+ feet"], "positive_ids": ["p0"]},
    {"id": "e", "question": "Why?", "answers": ["none"], "positive_ids": []},
]  # fmt: skip
SHIPPED = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["data"]


def rows(questions: list[dict]) -> dict[str, Dataset]:
    return {"train": Dataset.from_list(questions), "passages": Dataset.from_list(PASSAGES)}


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(POSITIVES / "train.arrow", FOUND, [{"question": 2, "passage": 2}])


def test_of_patterns_it_is_what_they_match_in_the_questions_own_passages(found, capsys):
    data = Data(**(SHIPPED | {"answers_are": "regex", "unanswerable": "none"}))
    chosen, kept = aimed(data, "train", rows(QUESTIONS))
    assert kept == [0, 1, 2, 4] and chosen["id"] == ["a", "b", "c", "e"]
    assert list(chosen["answers"]) == [["40 m"], ["Lake 13", "Lake 12"], ["7 km"], ["none"]]
    assert "1 of 5 train questions have no passage with a match and are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="train.arrow: no answer pattern matches in a passage"):
        aimed(data, "train", rows(QUESTIONS[3:4]))


def test_of_texts_it_is_the_answers(found):
    data = Data(**SHIPPED)
    chosen, kept = aimed(data, "train", rows(QUESTIONS))
    assert kept == list(range(5)) and list(chosen["answers"]) == [row["answers"] for row in QUESTIONS]
    without = {"id": "f", "question": "Who?", "answers": [], "positive_ids": ["p0"]}
    assert has_answers(Dataset.from_list(QUESTIONS)) and not has_answers(Dataset.from_list([without] * 2))
