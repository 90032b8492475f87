"""What lies outside the pipeline: where it is found, what is noted of it, and that `inputs` notes no more than that."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages import inputs
from stages.encoders.loading import load_encoder
from stages.generation.generator import load_generator
from stages.machine.entry import run
from stages.storage import manifest
from stages.storage.outside_files import describe, describe_model, find, split_revision

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
    monkeypatch.setattr(inputs, "check_once", lambda params, parts: None)  # these models are files by name alone
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
    assert set(before) == {"data.json", "encoders.json", "generator.json", "index.json", "reranker.json"}
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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("data/tiny/generater", "data/tiny/generator"), ("./data/tinny/generator", "data/tiny/generator"),
        ("data/tiny/other", None), ("data/tiny/generator/x/y/z", None),
    ],
)  # fmt: skip
def test_a_mistyped_folder_is_told_with_what_was_meant(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/tiny/generator").mkdir(parents=True)
    with pytest.raises(ValueError, match="models.generator: .* not found") as error:
        describe_model(name, "models.generator")
    assert str(error.value).endswith(f"; did you mean {meant}?") if meant else "did you mean" not in str(error.value)


def test_the_folder_that_was_meant_may_lie_at_the_real_root(tmp_path, monkeypatch):
    (tmp_path / "root/my_model").mkdir(parents=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    with pytest.raises(ValueError, match="did you mean my_model\\?"):
        describe("./my_modle", "models.generator")


@pytest.mark.parametrize("load", [load_generator, lambda name: load_encoder(name, "models.question_encoder")])
def test_a_mistyped_folder_that_could_be_a_hub_name_is_told_when_nothing_loads(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "my_model").mkdir()
    with pytest.raises(ValueError) as error:
        load("my-model")
    expected = "; there is no folder my-model here, so the hub was asked for it; did you mean my_model?"
    assert str(error.value).endswith(expected) and "\n" not in str(error.value)


def test_a_revision_belongs_to_a_hub_name_and_not_to_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_revision("facebook/bart-large@0123abc") == ("facebook/bart-large", {"revision": "0123abc"})
    assert split_revision("facebook/bart-large") == ("facebook/bart-large", {})
    assert describe_model("a/b@refs/pr/1", "models.generator") == {"a/b@refs/pr/1": "hub"}
    (tmp_path / "model@2").mkdir()
    assert split_revision("model@2") == ("model@2", {})


def hub(folder: Path) -> list[str]:
    """A hub's cache with two revisions of an encoder and of a generator; `main` is the second. Returns their names."""
    revisions = ["1" * 40, "2" * 40]
    for kind, field in (("encoder", "attention_probs_dropout_prob"), ("generator", "attention_dropout")):
        repository = folder / f"models--own--{kind}"
        for revision, value in zip(revisions, (0.25, 0.5), strict=True):
            snapshot = repository / "snapshots" / revision
            shutil.copytree(ROOT / "data/tiny" / kind, snapshot)
            config = json.loads((snapshot / "config.json").read_text())
            (snapshot / "config.json").write_text(json.dumps(config | {field: value}))
            for optional in (
                "modules.json", "config_sentence_transformers.json", "adapter_config.json", "added_tokens.json",
                "special_tokens_map.json", "chat_template.jinja", "model.safetensors.index.json", "processor_config.json",
            ):  # fmt: skip
                absent = repository / ".no_exist" / revision / optional
                absent.parent.mkdir(parents=True, exist_ok=True)
                absent.touch()
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(revisions[1])
    return revisions


LOAD = """
import sys
from stages.encoders.loading import load_encoder
from stages.generation.generator import load_generator
from stages.generation.tokenizer import load_tokenizer
for at in sys.argv[1:]:
    encoder = load_encoder(f"own/encoder{at}", "models.question_encoder")
    generator = load_generator(f"own/generator{at}")
    assert len(load_tokenizer(f"own/generator{at}")) == len(generator.tokenizer)
    print(encoder.model.config.attention_probs_dropout_prob, generator.model.config.attention_dropout)
"""


@pytest.mark.slow
def test_models_of_the_hub_are_loaded_at_their_revision(tmp_path):
    revisions = hub(tmp_path / "hub")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "", *(f"@{revision}" for revision in revisions)], env=environment, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n") == ["0.5 0.5", "0.25 0.25", "0.5 0.5", ""]


def test_globs_folders_and_lists_are_noted_file_by_file_and_alike_in_a_temporary_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    for number in (1, 2, 10):
        Path(f"own/part-{number}.jsonl").write_text(str(number))
    here = describe(["own/part-*.jsonl"], "data.files.passages")
    assert list(here) == ["own/part-1.jsonl", "own/part-2.jsonl", "own/part-10.jsonl"]
    assert describe("own", "data.files.passages") == here == describe(list(here), "data.files.passages")
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert describe(["own/part-*.jsonl"], "data.files.passages") == here
    (tmp_path / "own/part-3.jsonl").write_text("3")
    assert len(describe(["own/part-*.jsonl"], "data.files.passages")) == 4
    with pytest.raises(ValueError, match="^data.files.test: no file matches own/dev-"):
        describe(["own/dev-*.jsonl"], "data.files.test")


def test_a_name_with_brackets_is_a_path_before_it_is_a_glob(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a[1].jsonl").write_text("x")
    Path("a1.jsonl").write_text("y")
    assert list(describe("a[1].jsonl", "key")) == ["a[1].jsonl"]


@pytest.mark.parametrize("name", ["train.jsonl", "models/generator/model.safetensors"])
def test_a_pointer_of_git_lfs_is_refused_wherever_it_lies(project, name):
    Path(name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n")
    with pytest.raises(SystemExit, match=f"{name} is a Git LFS pointer, not the file itself"):
        run(inputs.main)
