"""What lies outside the pipeline: where it is found, what is noted of it, and that `inputs` notes no more than that."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from stages import inputs
from stages.machine.entry import run
from stages.storage import manifest
from stages.storage.outside_files import describe, describe_model, find

ROOT = Path(__file__).resolve().parents[2]


def test_a_path_counts_from_here_then_from_the_repository(tmp_path, monkeypatch):
    there, here = tmp_path / "repository", tmp_path / "copy"
    for folder in (there, here):
        (folder / "own").mkdir(parents=True)
    (there / "own/a.jsonl").write_text("there")
    monkeypatch.chdir(here)
    assert find("own/a.jsonl") == Path("own/a.jsonl")
    monkeypatch.setenv("DVC_ROOT", str(there))
    assert find("own/a.jsonl") == there / "own/a.jsonl"
    assert find("facebook/bart-large") == Path("facebook/bart-large")
    (here / "own/a.jsonl").write_text("here")
    assert find("own/a.jsonl") == Path("own/a.jsonl") and find(str(there)) == there


def test_the_same_in_a_temporary_run_and_in_the_repository(tmp_path, monkeypatch):
    """What is noted names the path as the parameter does, or every temporary run would find something new."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    here = describe("model", "models.generator")
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert describe("model", "models.generator") == here and list(here) == ["model/config.json"]


def test_content_counts_not_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("a.jsonl")
    file.write_text("one")
    first = describe("a.jsonl", "key")
    file.unlink()
    file.write_text("one")
    assert describe("a.jsonl", "key") == first and list(first) == ["a.jsonl"]
    file.write_text("two")
    assert describe("a.jsonl", "key") != first


def test_every_byte_of_a_large_file_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manifest, "WHOLE_FILE_LIMIT", 2**20)
    content = bytearray(5 * 2**20)
    seen = []
    for position in (None, 0, len(content) // 2, len(content) - 1):
        if position is not None:
            content[position] = 1
        Path("a").write_bytes(content)
        seen.append(describe("a", "key")["a"])
    assert len({json.dumps(one) for one in seen}) == 4
    assert seen[-1] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_hidden_files_of_a_model_folder_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model/.cache").mkdir(parents=True)
    Path("model/config.json").write_text("{}")
    before = describe("model", "key")
    Path("model/.cache/lock").write_text("x")
    Path("model/.DS_Store").write_text("x")
    assert describe("model", "key") == before


@pytest.mark.parametrize("name", ["facebook/bart-large", "t5-small"])
def test_a_hub_name_is_noted_as_such(name):
    assert describe_model(name, "models.generator") == {name: "hub"}


@pytest.mark.parametrize(
    "name", ["./model", "/no/such/model", "data/tinny", "my/own/model", "../model", "~/no-such-model"]
)
def test_a_path_that_leads_nowhere_is_named_with_its_key(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^models.generator: .* not found; relative paths count from") as error:
        describe_model(name, "models.generator")
    assert "\n" not in str(error.value)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "passages.jsonl", "validation.jsonl"):
        Path(name).write_text("{}")
    for name in ("encoder", "generator"):
        Path(f"models/{name}").mkdir(parents=True)
        Path(f"models/{name}/config.json").write_text("{}")
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["models"] |= {
        "question_encoder": "./models/encoder", "context_encoder": "./models/encoder", "generator": "./models/generator",
    }  # fmt: skip
    values["data"] |= {"source": "files"}
    values["data"]["files"] |= {"train": "train.jsonl", "passages": "passages.jsonl"}
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    run(inputs.main)
    return values


def noted() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path("data/inputs").iterdir()}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("passages.jsonl", "data.json"), ("train.jsonl", "data.json"), ("./models/encoder/config.json", "encoders.json"),
        ("./models/generator/config.json", "generator.json"), ("validation.jsonl", None),
    ],
)  # fmt: skip
def test_a_changed_file_changes_what_is_noted_of_it_alone(project, file, changes):
    before = noted()
    assert set(before) == {"data.json", "encoders.json", "generator.json", "index.json"}
    run(inputs.main)
    assert noted() == before
    Path(file).write_text('{"changed": 1}')
    run(inputs.main)
    assert {name for name in before if noted()[name] != before[name]} == ({changes} if changes else set())


@pytest.mark.parametrize("missing", ["passages.jsonl", "./models/generator", "./models/encoder"])
def test_something_missing_is_one_line_with_its_key_and_leaves_what_was_noted(project, missing):
    before = noted()
    Path(missing).rename("elsewhere")
    with pytest.raises(SystemExit) as end:
        run(inputs.main)
    assert f"{missing} not found" in str(end.value.code) and "\n" not in str(end.value.code)
    assert str(end.value.code).startswith(("error: data.files.passages:", "error: models."))
    assert noted() == before


def test_the_sample_reads_no_file_of_data(project):
    project["data"]["source"] = "sample"
    project["data"]["files"]["train"] = "no longer there.jsonl"
    Path("params.yaml").write_text(yaml.safe_dump(project), encoding="utf-8")
    run(inputs.main)
    assert json.loads(noted()["data.json"]) == {}
