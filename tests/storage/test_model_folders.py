"""Of a folder that holds several models each parameter takes its own; what is noted of it is what is read of it."""

import json
from pathlib import Path

import pytest
import yaml

from stages import inputs
from stages.machine.entry import run
from stages.storage.model_folders import describe_part, is_saved_part, part_files, part_of
from stages.storage.outside_files import refuse_outputs

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ["data/model", "data/retriever", "data/prepared"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(folder, kind="bert", files=("model.safetensors",)):
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps({"model_type": kind}))
    for file in files:
        (Path(folder) / file).write_text("x")


def rag_checkpoint(folder):
    model(folder, "rag", ["model.safetensors", "manifest.json", "run.json", "prior.json"])
    for part in ("question_encoder_tokenizer", "generator_tokenizer"):
        (Path(folder) / part).mkdir()
        (Path(folder) / part / "tokenizer.json").write_text("{}")


def in_parts(folder, *parts):
    for part in parts:
        model(Path(folder) / part)
    (Path(folder) / "manifest.json").write_text("{}")


def test_a_plain_model_is_itself_and_so_is_a_hub_name():
    model("plain")
    assert part_of("plain", "generator") == "plain" and part_of("own/model@1", "reranker") == "own/model@1"
    Path("sentence/0_Transformer").mkdir(parents=True)  # sentence-transformers' folder need not have a config.json
    assert part_of("sentence", "question_encoder") == "sentence"
    Path("packed").mkdir()
    Path("packed/a.gguf").write_text("x")
    assert part_of("packed", "generator") == "packed" and part_of("packed/a.gguf", "generator") == "packed/a.gguf"


def test_of_a_folder_in_parts_each_takes_its_own_and_notes_no_other():
    in_parts("mine", "question_encoder", "generator", "reranker")
    assert part_of("mine", "generator") == "mine/generator" and part_of("mine", "reranker") == "mine/reranker"
    assert is_saved_part(Path("mine/generator")) and not is_saved_part(Path("mine"))
    before = describe_part("mine", "generator")
    assert set(before) == {"mine/generator/config.json", "mine/generator/model.safetensors"}
    Path("mine/reranker/model.safetensors").write_text("other")
    Path("mine/run.json").write_text("{}")
    assert describe_part("mine", "generator") == before
    with pytest.raises(
        ValueError, match="^models.context_encoder: mine holds no context_encoder \\(generator, "
    ) as error:
        part_of("mine", "context_encoder")
    assert "cp -rL data/retriever/context_encoder mine/" in str(error.value) and "\n" not in str(error.value)
    in_parts("mine", "context_encoder")
    assert part_of("mine", "context_encoder") == "mine/context_encoder"


def test_a_rag_checkpoint_stays_whole_and_notes_what_is_read_of_a_part():
    rag_checkpoint("rag")
    assert part_of("rag", "generator") == part_of("rag", "question_encoder") == "rag"
    assert part_files("rag", "generator") == ["rag/config.json", "rag/model.safetensors", "rag/generator_tokenizer"]
    with pytest.raises(ValueError, match="holds no context_encoder .*facebook/dpr-ctx_encoder-single-nq-base"):
        part_of("rag", "context_encoder")
    with pytest.raises(ValueError, match="holds no reranker .*set models.reranker to null"):
        part_of("rag", "reranker")
    in_parts("rag", "context_encoder")
    assert part_of("rag", "context_encoder") == "rag/context_encoder"


@pytest.mark.parametrize("layout", ["parts", "rag"])
def test_a_model_of_mlflow(layout):
    if layout == "rag":
        rag_checkpoint("served/data/parts/model")
    else:
        in_parts("served/data/parts/model", "generator", "question_encoder")
    described = {"flavors": {"python_function": {"data": "data/parts", "loader_module": "stages.evaluation.pyfunc"}}}
    Path("served/MLmodel").write_text(yaml.safe_dump(described))
    inside = "served/data/parts/model"
    assert part_of("served", "generator") == (inside if layout == "rag" else f"{inside}/generator")
    for other in ({"flavors": {"sklearn": {}}}, [], {"flavors": {"python_function": {"data": "model.pkl"}}}):
        Path("served/MLmodel").write_text(yaml.safe_dump(other))
        with pytest.raises(ValueError, match="models.generator: served is a model of MLflow, but none that this"):
            part_of("served", "generator")


def test_an_address_of_mlflow_says_how_to_fetch_it():
    with pytest.raises(ValueError, match="models:/a/1 is an address.*artifacts download --artifact-uri models:/a/1"):
        describe_part("models:/a/1", "generator")


def test_what_is_noted_is_the_same_in_a_temporary_run(tmp_path, monkeypatch):
    in_parts("mine", "generator")
    rag_checkpoint("rag")
    before = describe_part("mine", "generator"), describe_part("rag", "question_encoder")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    Path("copy").mkdir()
    monkeypatch.chdir("copy")
    assert (describe_part("mine", "generator"), describe_part("rag", "question_encoder")) == before


@pytest.mark.parametrize(
    ("name", "key", "advice"),
    [
        (
            "data/model",
            "models.generator",
            "cp -rL data/model my-model && cp -rL data/retriever/context_encoder my-model/",
        ),
        ("./data/../data/model/generator", "models.generator", "cp -rL "),
        ("linked", "models.generator", "cp -rL linked my-model"),
        ("data/retriever/context_encoder", "models.context_encoder", "cp -rL data/retriever/context_encoder my-model"),
        ("data", "data.files.train", "cp -rL data my-copy"),
        (["own.jsonl", "data/prepared/train.arrow"], "data.files.train", "cp -rL data/prepared/train.arrow my-copy"),
    ],
)
def test_an_output_of_the_pipeline_is_no_input(name, key, advice):
    Path("data/model/generator").mkdir(parents=True)
    Path("linked").symlink_to("data/model")
    with pytest.raises(ValueError, match=f"^{key}: .* is an output of the pipeline itself") as error:
        refuse_outputs(name, key, OUTPUTS)
    assert advice in str(error.value) and "\n" not in str(error.value)


def test_what_lies_beside_the_outputs_is_none(tmp_path, monkeypatch):
    for name in ("data/tiny/encoder", "data/model-of-mine", "facebook/bart-large", ["own/*.jsonl"]):
        refuse_outputs(name, "models.generator", OUTPUTS)
    Path("data/model").mkdir(parents=True)
    Path("copy").mkdir()
    monkeypatch.chdir("copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="is an output of the pipeline itself"):
        refuse_outputs("data/model", "models.generator", OUTPUTS)


def test_the_stage_refuses_and_says_what_to_do(monkeypatch):
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    Path("data").mkdir()
    Path("data/tiny").symlink_to(ROOT / "data/tiny")
    values["models"]["generator"] = "data/model"
    Path("params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="error: models.generator: data/model is an output of the pipeline itself"):
        run(inputs.main)
    assert not Path("data/inputs").exists()
