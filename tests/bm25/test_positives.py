"""Positives are hits that contain an answer; they are searched for where a warm-up reads them, and nowhere else."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from stages import positives as stage
from stages.bm25 import lexical_search, positives
from stages.bm25.positives import find_positives
from stages.corpus.arrow import PASSAGES, QUESTIONS, read_rows, write_rows
from stages.machine.entry import run

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "The tower stands in a town.",
    "The tower of Oslo is high.",
    "The tower, the tower, the tower!",
    "Oslo has a park.",
]


def corpus() -> list[dict]:
    return [{"id": name, "title": "", "text": text} for name, text in zip("abcd", TEXTS, strict=True)]


def test_the_positive_is_the_first_hit_with_an_answer():
    passages, questions = Dataset.from_list(corpus()), ["Where is the tower?"] * 3
    answers = [["OSLO"], ["Bergen"], ["Slo"]]
    assert find_positives(passages, questions, answers, depth=3).tolist() == [1, -1, -1]
    assert find_positives(passages, questions[:1], answers[:1], depth=1).tolist() == [-1]
    assert find_positives(passages, [], [], depth=3).tolist() == []


def test_forks_find_what_one_process_finds(monkeypatch):
    monkeypatch.setattr(positives, "QUESTIONS_A_TASK", 3)
    monkeypatch.setattr(lexical_search, "QUESTIONS_A_TASK", 3)
    rows = [{"id": str(i), "title": f"Tower {i}", "text": f"Tower number{i} is {10 * i} m high."} for i in range(60)]
    questions = [f"How high is tower number{i}?" for i in range(60)]
    answers = [[f"{10 * i} m"] if i % 3 else ["nowhere"] for i in range(60)]
    found = [find_positives(Dataset.from_list(rows), questions, answers, 10, processes) for processes in (1, 3)]
    assert found[0].tolist() == found[1].tolist() == [i if i % 3 else -1 for i in range(60)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with prepared questions; called with changes of `retriever` and `data.positives`, it runs the stage."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("data/prepared/passages.arrow"), PASSAGES, corpus())
    for split in ("train", "validation", "test"):
        rows = [
            {
                "id": str(i),
                "question": "Where is the tower?",
                "answers": ["Oslo"],
                "positive_ids": ["a"] if i == 1 else [],
            }
            for i in range(4)
        ]
        write_rows(Path(f"data/prepared/{split}.arrow"), QUESTIONS, rows)

    def found(retriever: dict, **changes) -> dict[str, list[dict]]:
        values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        values["retriever"] |= retriever
        values["data"]["positives"] |= changes
        values["runtime"]["threads"] = 2
        Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        run(stage.main)
        assert sorted(path.name for path in Path("data/positives").glob("*.arrow")) == [
            "train.arrow",
            "validation.arrow",
        ]
        return {split: list(read_rows(Path(f"data/positives/{split}.arrow"))) for split in ("train", "validation")}

    return found


HARD = {"count": 1, "steps": 5, "depth": 30, "skip": 0}
NONE = {"count": 0, "steps": 0, "depth": 30, "skip": 0}


@pytest.mark.parametrize("retriever", [{"steps": 3}, {"steps": 0, "hard_negatives": HARD}])
def test_questions_that_name_none_get_one_where_a_warm_up_reads_it(project, retriever):
    assert project(retriever)["train"] == [{"question": row, "passage": 1} for row in (0, 2, 3)]
    assert project(retriever, questions=2)["validation"] == [{"question": row, "passage": 1} for row in (0, 2)]


def test_few_positives_are_told_with_an_example(project, capsys, monkeypatch):
    monkeypatch.setattr(
        positives, "hits_with_answers", lambda passages, hits, answers, patterns: [[False] * len(row) for row in hits]
    )
    assert project({"steps": 3})["train"] == []
    said = capsys.readouterr().out
    assert (
        "warning: an answer stands" in said
        and "0 of 3 train questions" in said
        and "'Where is the tower?' with ['Oslo']" in said
    )


def test_without_a_warm_up_nothing_is_searched(project, monkeypatch):
    def never(*_):
        raise AssertionError("searched for nobody")

    monkeypatch.setattr(lexical_search, "shards_of", never)
    monkeypatch.setattr(lexical_search, "search", never)
    assert project({"steps": 0, "hard_negatives": NONE}) == {"train": [], "validation": []}
    assert project({"steps": 3}, depth=0) == {"train": [], "validation": []}


def test_forks_share_the_search_of_the_stage(project, monkeypatch):
    asked = []

    def noted(passages, questions, answers, depth, processes, language, patterns):
        asked.append(processes)
        return find_positives(passages, questions, answers, depth, processes, language, patterns)

    monkeypatch.setattr(positives, "find_positives", noted)
    project({"steps": 3})
    assert asked == [2, 2]
