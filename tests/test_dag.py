"""dvc.yaml and the house against the code: what a stage declares is what it imports, and imports point down."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from stages.machine.stage_params import settings_of, stage_params
from stages.params import load_params
from stages.storage.checkpoints import WATCHERS

STAGES = Path("stages")
DAG = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
PIPELINE = list(DAG)
CACHED = [stage for stage in PIPELINE if not DAG[stage].get("always_changed")]
COMMANDS = ["ask", "check", "compare", "demo", "publish", "recall", "runs"]
PROGRAMS = ["bench", "chaos", "pretraining"]
LIGHT = {"stages.params", "stages.storage.outside_files"}
# A wing may import those below it; stages/README.md draws the same.
FLOORS = [
    {"fitting", "reporting"}, {"evaluation", "training"}, {"rag"}, {"generation", "search"}, {"encoders", "reading"},
    {"bm25", "packed"}, {"corpus"}, {"storage"}, {"compute"}, {"machine"}, {"settings"},
]  # fmt: skip
ALONE = {"tracking", "verdicts"}  # they import no other wing but settings
MODULES = {".".join(file.relative_to(STAGES).with_suffix("").parts): file for file in STAGES.rglob("*.py")}


@cache
def imports_of(module: str) -> set[str]:
    """Modules of ours that a module imports, at its top or within a function, by their names below `stages`."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stages":
            package = node.module.removeprefix("stages").lstrip(".")
            for alias in node.names:
                inside = f"{package}.{alias.name}".lstrip(".")
                found.add(inside if inside in MODULES else package)
    return found


def everything_imported_by(module: str, but: str = "") -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports_of(waiting.pop()) - found - {but}:
            found.add(name)
            waiting.append(name)
    return found


def third_party_of(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def wing_of(module: str) -> str | None:
    return module.split(".")[0] if "." in module else None


@pytest.mark.parametrize("stage", CACHED)
def test_a_stage_depends_on_the_code_that_it_imports_and_on_no_other(stage):
    imported = {MODULES[name] for name in everything_imported_by(stage) | {stage}}
    imported = {file for file in imported if file.relative_to(STAGES).parts[0] not in WATCHERS}
    declared = {path for path in map(Path, DAG[stage]["deps"]) if path.parts[0] == "stages"}
    assert all(path.exists() for path in declared)
    undeclared = {str(file) for file in imported if not ({file, *file.parents} & declared)}
    assert not undeclared
    unused = {str(path) for path in declared if not any({file, *file.parents} & {path} for file in imported)}
    assert not unused


def test_the_stages_are_the_pipeline_and_run_by_module():
    assert PIPELINE == [
        "inputs", "prepare", "tokens", "positives", "retriever", "lexical", "encode", "index", "reranker", "train",
        "evaluate", "report",
    ]  # fmt: skip
    assert PIPELINE[1:] == CACHED
    assert all(DAG[stage]["cmd"] == f"python -m stages.{stage}" for stage in PIPELINE)


def test_bytecode_is_no_dependency():
    assert "__pycache__" in Path(".dvcignore").read_text(encoding="utf-8").split()


def test_every_data_dependency_is_an_earlier_output():
    """What lies outside the pipeline is depended on through data/inputs, wherever params.yaml says that it lies."""
    made: list[str] = []
    for stage in PIPELINE:
        for path in DAG[stage].get("deps", []):
            if path.startswith(("data/", "metrics/")):
                assert any(path == out or path.startswith(out + "/") for out in made), path
        made += [*DAG[stage]["outs"], *(path for metric in DAG[stage].get("metrics", []) for path in metric)]


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("data.sample.passages", "prepare"), ("retriever.steps", "positives"), ("retriever.hybrid_weight", "reranker"),
        ("index.batch_tokens", "encode"), ("index.factory", "index"), ("index.ef_search", "reranker"),
        ("lengths.context_tokens", "tokens"), ("train.learning_rate", "train"), ("evaluate.decoding", "evaluate"),
        ("signs.exact_match", "report"),
    ],
)  # fmt: skip
def test_a_changed_parameter_reruns_nothing_before_the_first_stage_that_reads_it(parameter, first):
    """That DVC runs what it should: tests/test_pipeline.py."""
    later = PIPELINE[PIPELINE.index(first) :]
    readers = {
        name
        for name, stage in DAG.items()
        for declared in stage.get("params", [])
        if parameter == declared or parameter.startswith(f"{declared}.")
    } - {"inputs"}  # it runs each time, and its outputs differ where what it looked at does
    assert first in readers and readers <= set(later)
    made = {out: name for name, stage in DAG.items() for out in stage.get("outs", []) if isinstance(out, str)}
    reruns = set(readers)
    for name in PIPELINE:
        if any(made.get(dep) in reruns for dep in DAG[name].get("deps", [])):
            reruns.add(name)
    assert reruns <= set(later) and "report" in reruns
    assert ("train" in reruns) == (first not in ("evaluate", "report"))


@pytest.mark.parametrize("stage", CACHED)
def test_outputs_that_are_no_metrics_are_cached(stage):
    """DVC keeps no stage in its run cache that has others: an experiment would train again what was trained before."""
    assert all(isinstance(out, str) for out in DAG[stage]["outs"])


@pytest.mark.parametrize("stage", CACHED)
def test_declared_parameters_exist(stage):
    shipped = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    for key in DAG[stage]["params"]:
        value = shipped
        for part in key.replace("${train.recipe}", shipped["train"]["recipe"]).split("."):
            assert part in value, f"{stage}: {key}"
            value = value[part]


@pytest.mark.parametrize("stage", CACHED)
def test_a_stage_can_read_what_it_declares_and_nothing_else_and_its_fingerprint_is_all_of_it(stage):
    params, whole = stage_params(stage), load_params()
    assert f'stage_params("{stage}")' in MODULES[stage].read_text(encoding="utf-8")
    assert "load_params" not in MODULES[stage].read_text(encoding="utf-8")
    declared = {key.replace("${train.recipe}", "new") for key in DAG[stage]["params"]} | {"train.recipe"}

    def leaves(values, prefix="") -> set[str]:
        if not isinstance(values, dict) or not values:
            return {prefix[:-1]}
        return set().union(*(leaves(value, f"{prefix}{name}.") for name, value in values.items()))

    def covered(leaf: str) -> bool:
        return any(leaf == key or leaf.startswith(f"{key}.") for key in declared)

    found, every = leaves(settings_of(params)), leaves(settings_of(whole))
    assert found == {leaf for leaf in every if covered(leaf)}
    for leaf in every - found:
        with pytest.raises((AttributeError, KeyError)):
            value = params
            for part in leaf.split("."):
                value = value[part] if isinstance(value, dict) else getattr(value, part)


def test_the_top_of_the_house_holds_stages_and_commands_alone():
    assert {name for name in MODULES if "." not in name} == {*PIPELINE, *COMMANDS, "params", "__init__"}
    wings = {wing_of(name) for name in MODULES} - {None}
    assert wings == set().union(*FLOORS) | ALONE | set(PROGRAMS)
    for wing in wings:
        assert ast.get_docstring(ast.parse((STAGES / wing / "__init__.py").read_text(encoding="utf-8"))), wing


def test_imports_point_down():
    entries = {*PIPELINE, *COMMANDS}
    floor = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
    for module in MODULES:
        imported, wing = imports_of(module), wing_of(module)
        assert not imported & entries, f"{module} imports an entry"
        assert module not in everything_imported_by(module), f"{module} imports itself in a circle"
        others = {wing_of(name) for name in imported} - {None, wing}
        if wing in ALONE:
            assert others <= {"settings"}, f"{module} imports {others}"
        elif wing in floor:
            assert others <= floor.keys(), f"{module} imports {others - floor.keys()}"
            assert all(floor[other] > floor[wing] for other in others), f"{module} imports {others}"
    assert {wing_of(name) for name in imports_of("params")} == {"settings"}


def test_only_the_wing_of_tracking_imports_mlflow():
    using = {name for name in MODULES if "mlflow" in third_party_of(name)}
    assert {wing_of(name) for name in using} == {"tracking"}


def test_entries_import_nothing_heavy_before_main():
    for entry in PIPELINE + COMMANDS + [f"{program}.__main__" for program in PROGRAMS]:
        tree = ast.parse(MODULES[entry].read_text(encoding="utf-8"))
        names = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        ours = {name for name in names if name.split(".")[0] == "stages"}
        assert {name.split(".")[0] for name in names - ours} <= set(sys.stdlib_module_names), entry
        assert all(
            name in LIGHT or wing_of(name.removeprefix("stages.")) in ("machine", "settings") for name in ours
        ), entry


def test_what_runs_at_every_repro_imports_little():
    """`inputs` must stay quick: pydantic, YAML and hashing, none of the libraries that take seconds, but for models that it
    sees for the first time (tests/fitting/test_models.py)."""
    machine = (name for name in MODULES if wing_of(name) == "machine")
    modules = everything_imported_by("inputs", but="fitting.models") | {"inputs", *machine}
    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "faiss", "bm25s", "mlflow"}
    tops = {
        name
        for module in modules
        for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        )
    }  # fmt: skip
    assert not {name.split(".")[0] for name in tops} & heavy


@pytest.mark.parametrize(("stage", "folder"), [("lexical", "bm25.hits_folder"), ("reranker", "search.reranker_folder")])
def test_a_stage_with_nothing_to_do_imports_little(stage, folder):
    """Its other imports are those of the function that has something to do."""
    [main] = [
        node
        for node in ast.parse(MODULES[stage].read_text(encoding="utf-8")).body
        if getattr(node, "name", "") == "main"
    ]
    ours = {
        f"{node.module.removeprefix('stages.')}.{alias.name}"
        for node in ast.walk(main) if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    assert {name if name in MODULES else name.rpartition(".")[0] for name in ours} == {folder, "storage.manifest"}
    used = everything_imported_by(folder) | {folder}
    assert not set().union(*map(third_party_of, used)) & {"torch", "transformers", "datasets", "numpy", "bm25s"}


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_writes_beside_and_renames(stage):
    """Its outputs may be hardlinks into DVC's cache: folders by `replacing`, single files by stages/storage/manifest.py."""
    for node in ast.walk(ast.parse(MODULES[stage].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            target = ast.unparse(node.func)
            assert not target.endswith((".write_text", ".write_bytes")), f"{stage}: {target}"
            places = {name.id for part in node.args for name in ast.walk(part) if isinstance(name, ast.Name)}
            in_place = target in ("open", "np.save") or target.endswith((".save", ".save_pretrained"))
            assert not (in_place and any(name.isupper() and len(name) > 3 for name in places)), ast.unparse(node)


@pytest.mark.slow
def test_a_question_waits_for_no_library_that_its_answer_does_not_need():
    main = ast.parse(MODULES["ask"].read_text(encoding="utf-8"))
    imported = [ast.unparse(node) for node in ast.walk(main) if isinstance(node, ast.ImportFrom)]
    heavy = ("datasets", "pandas", "bm25s", "peft", "mlflow", "matplotlib", "tensorboard")
    program = "\n".join([*imported, "import sys", f"print([name for name in {heavy} if name in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
