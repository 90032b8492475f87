"""Prepare from own files, in the forms that people have them in; the embedded sample as it was."""

import csv
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages import prepare, tokens
from stages.corpus.arrow import read_rows
from stages.machine.entry import run
from stages.reading.airports import render_sample

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to run in; called with changes of `data`, it runs prepare and returns its rows by file."""
    monkeypatch.chdir(tmp_path)

    def prepared(**changes) -> dict[str, list[dict]]:
        values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        for part in ("question_encoder", "context_encoder", "generator"):
            values["models"][part] = str(ROOT / values["models"][part])
        for key, value in changes.items():
            values["data"][key] = values["data"][key] | value if isinstance(value, dict) else value
        Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        run(prepare.main)
        run(tokens.main)
        return {name: list(read_rows(Path(f"data/prepared/{name}.arrow"))) for name in (*SPLITS, "passages")}

    return prepared


def write_jsonl(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def towers(count: int) -> list[dict]:
    cities = ["Oslo", "Paris", "Rome", "Lima"]
    return [{"title": f"Tower {i}", "text": f"Tower number{i} stands in {cities[i % 4]}."} for i in range(count)]


def test_old_files_need_no_mapping(project):
    """Three files as earlier trainers wrote them: one answer field each, no positives, no ids."""
    write_jsonl(
        "nq_train.jsonl", [{"question": f"Where is tower number{i}?", "answer": ["Oslo"]} for i in range(0, 40, 4)]
    )
    write_jsonl("nq_validation.jsonl", [{"question": "Where is tower number1?", "short_answers": ["Paris"]}])
    write_jsonl("passages.jsonl", towers(40))
    files = {"train": "nq_train.jsonl", "validation": "nq_validation.jsonl", "passages": "passages.jsonl"}
    rows = project(source="files", files=files, shares={"test": 0.2})
    assert [len(rows[name]) for name in (*SPLITS, "passages")] == [8, 1, 2, 40]
    assert rows["validation"][0] == {
        "id": "validation-000001", "question": "Where is tower number1?", "answers": ["Paris"], "positive_ids": [], "grades": [],
    }  # fmt: skip
    assert rows["passages"][0] == {"id": "1", "title": "Tower 0", "text": "Tower number0 stands in Oslo."}
    # What is found by answer is the warm-up's (stages/positives.py): here and in evaluation none counts as given.
    assert all(row["positive_ids"] == [] for split in SPLITS for row in rows[split])


def test_dpr_s_passages_and_question_tables(project):
    with gzip.open("psgs_w100.tsv.gz", "wt", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "text", "title"])
        writer.writerows([i + 1, row["text"] + ' It is "high".', row["title"]] for i, row in enumerate(towers(30)))
    with open("train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answers", "positive_ids"])
        writer.writerows([f"Where is tower number{i}?", "['Oslo', 'Christiania']", i + 1] for i in range(30))
    files = {"train": "train.csv", "passages": "psgs_w100.tsv.gz"}
    rows = project(source="files", files=files, shares={"validation": 0.1, "test": 0.1})
    assert [len(rows[name]) for name in (*SPLITS, "passages")] == [24, 3, 3, 30]
    assert rows["passages"][4] == {"id": "5", "title": "Tower 4", "text": 'Tower number4 stands in Oslo. It is "high".'}
    for row in rows["train"]:
        assert row["answers"] == ["Oslo", "Christiania"]
        assert f"number{int(row['positive_ids'][0]) - 1}?" in row["question"]
    offsets = np.load("data/tokens/offsets.npy")
    assert len(offsets) == 31 and (np.diff(offsets) > 0).all()


def test_the_same_data_and_seed_are_the_same_bytes(project):
    write_jsonl("train.jsonl", [{"question": f"Where is tower number{i}?", "answer": "Oslo"} for i in range(40)])
    write_jsonl("passages.jsonl", towers(40))
    digests = []
    for _ in range(2):
        project(source="files", files={"train": "train.jsonl", "passages": "passages.jsonl"})
        written = sorted(file for folder in ("prepared", "tokens") for file in Path("data", folder).iterdir())
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in written])
    assert digests[0] == digests[1] and len(digests[0]) == 8  # four Arrow files, two arrays, two manifests


def test_validation_without_answers_beside_answered_training_is_refused_here(project):
    """Not hours later, by the train stage."""
    write_jsonl("train.jsonl", [{"question": f"Where is tower number{i}?", "answer": "Oslo"} for i in range(40)])
    write_jsonl("validation.jsonl", [{"question": "Where is tower number1?", "positive_ids": ["1"]}])
    write_jsonl("passages.jsonl", towers(40))
    files = {"train": "train.jsonl", "validation": "validation.jsonl", "passages": "passages.jsonl"}
    with pytest.raises(SystemExit, match="^error: validation.jsonl:1: 1 of 1 validation questions have no answer"):
        project(source="files", files=files)
    assert not Path("data/prepared").exists()


def test_the_sample_is_what_is_rendered(project):
    sizes = {"passages": 60, "train_questions": 50, "validation_questions": 5, "test_questions": 5}
    rows = project(sample=sizes)
    passages, questions = render_sample(**sizes, seed=13)
    assert rows["passages"] == passages
    ungraded = {split: [row | {"grades": None} for row in some] for split, some in questions.items()}
    assert {split: rows[split] for split in SPLITS} == ungraded
    assert Path("data/unusable.jsonl").read_bytes() == b""
