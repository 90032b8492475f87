"""dvc.yaml against the code: no stage may depend on what it does not declare, and imports point one way."""

import ast
from pathlib import Path

import pytest
import yaml

from stages.checkpoints import WATCHERS
from stages.params import Params

STAGES = Path("stages")
DAG = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
PIPELINE = list(DAG)
CACHED = [stage for stage in PIPELINE if not DAG[stage].get("always_changed")]
OUTSIDE = ["ask", "bench", "chaos", "check", "compare", "pretrain", "recall", "unlock"]
# They change no result: parameters are tracked key by key, the others only watch.
NOT_DEPENDENCIES = WATCHERS


def imports_of(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((STAGES / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stages":
            found |= {alias.name for alias in node.names} if node.module == "stages" else {node.module.split(".")[1]}
    return found


def everything_imported_by(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports_of(waiting.pop()) - found:
            found.add(name)
            waiting.append(name)
    return found


def third_party_of(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((STAGES / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("stage", CACHED)
def test_a_stage_depends_on_exactly_the_code_it_imports(stage):
    declared = {Path(path).stem for path in DAG[stage]["deps"] if path.endswith(".py")}
    assert declared == (everything_imported_by(stage) | {stage}) - NOT_DEPENDENCIES


def test_the_stages_are_the_pipeline_and_run_by_module():
    assert PIPELINE == ["inputs", "prepare", "retriever", "lexical", "index", "train", "evaluate"]
    assert PIPELINE[1:] == CACHED
    assert all(DAG[stage]["cmd"] == f"python -m stages.{stage}" for stage in PIPELINE)


def test_every_data_dependency_is_an_earlier_output():
    """What lies outside the pipeline is depended on through data/inputs, wherever params.yaml says that it lies."""
    made: list[str] = []
    for stage in PIPELINE:
        for path in DAG[stage].get("deps", []):
            if path.startswith("data/"):
                assert any(path == out or path.startswith(out + "/") for out in made), path
        made += DAG[stage]["outs"]


@pytest.mark.parametrize("stage", CACHED)
def test_declared_parameters_exist(stage):
    shipped = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    for key in DAG[stage]["params"]:
        value = shipped
        for part in key.replace("${train.recipe}", shipped["train"]["recipe"]).split("."):
            assert part in value, f"{stage}: {key}"
            value = value[part]


@pytest.mark.parametrize("stage", CACHED)
def test_parameters_that_the_entry_reads_are_declared(stage):
    """Attribute chains `params.a.b` in an entry, and `settings = params.a`, against the declared keys."""
    declared = [key.replace("${train.recipe}", "*") for key in DAG[stage]["params"]]
    harmless = ("runtime", "signs", "tracking", "recipe", "recipes")
    for node in ast.walk(ast.parse((STAGES / f"{stage}.py").read_text(encoding="utf-8"))):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if not (isinstance(node, ast.Name) and node.id == "params" and parts) or parts[0] in harmless:
            continue
        parts = [part for part in parts if not part.startswith("model_dump")]
        assert parts[0] in Params.model_fields
        key = ".".join(parts[:2])
        assert any(key == known or key.startswith(known + ".") or known.startswith(key + ".") for known in declared), (
            f"{stage} reads {key}"
        )


def test_imports_point_one_way():
    entries = {*PIPELINE, *OUTSIDE}
    for file in STAGES.glob("*.py"):
        assert not imports_of(file.stem) & entries, f"{file} imports an entry"
        assert file.stem not in everything_imported_by(file.stem), f"{file} imports itself in a circle"
    assert not imports_of("params")


def test_only_the_modules_of_tracking_import_mlflow():
    using = {file.stem for file in STAGES.glob("*.py") if "mlflow" in third_party_of(file.stem)}
    assert using == {"tracking", "mlflow_run", "mlflow_store"}


def test_entries_import_nothing_heavy_before_main():
    for entry in PIPELINE + OUTSIDE:
        tree = ast.parse((STAGES / f"{entry}.py").read_text(encoding="utf-8"))
        names = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        light = {
            "argparse", "csv", "hashlib", "json", "math", "os", "pathlib", "random", "shutil", "signal", "sqlite3",
            "statistics", "subprocess", "sys", "tempfile", "time",
        }  # fmt: skip
        assert names <= light | {"stages.outside", "stages.params", "stages.runtime"}, entry


def test_what_runs_at_every_repro_imports_little():
    """`inputs` must stay quick: pydantic, YAML and hashing, none of the libraries that take seconds."""
    modules = everything_imported_by("inputs") | {"inputs"}
    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "faiss", "bm25s", "mlflow"}
    tree_tops = {
        name
        for module in modules
        for node in ast.parse((STAGES / f"{module}.py").read_text(encoding="utf-8")).body
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        )
    }  # fmt: skip
    assert not {name.split(".")[0] for name in tree_tops} & heavy
