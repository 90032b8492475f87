"""Stages run by hand (no DVC): over read-only hardlinks into its cache, and two workers of one repository at once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import yaml
from filelock import FileLock
from safetensors.numpy import load_file

from stages.storage.leftovers import FOLDER
from tests.in_process import run_stage
from tests.test_pipeline import ROOT, SMALL, merged, run

pytestmark = pytest.mark.slow
STAGES = (
    "inputs", "prepare", "tokens", "positives", "retriever", "lexical", "encode", "index", "reranker", "train", "evaluate",
    "report",
)  # fmt: skip


def change(folder: Path, values: dict) -> None:
    file = folder / "params.yaml"
    params = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(merged(params, values)), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder in which every stage has run."""
    folder = tmp_path_factory.mktemp("by_hand")
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data/tiny", folder / "data/tiny")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    change(folder, merged(SMALL, {"retriever": {"hybrid_depth": 5}, "tracking": {"system_metrics_seconds": 0}}))
    for stage in STAGES:
        if stage == "train":  # whose fingerprint the workers' trainings have, too
            run(folder, "python", "-m", "stages.train")
        else:
            succeeded(folder, stage)
    return folder


def succeeded(folder: Path, stage: str) -> None:
    done = run_stage(folder, stage)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_stage_writes_into_a_file_that_is_there(project, tmp_path):
    """DVC's outputs are read-only hardlinks into its cache: as root their content must stay, others may not open them."""
    folder, cache = tmp_path / "project", tmp_path / "cache"
    shutil.copytree(project, folder)
    outputs = [file for file in folder.glob("data/**/*") if file.is_file() and "tiny" not in file.parts]
    outputs += (folder / "metrics").iterdir()
    for file in outputs:
        kept = cache / file.relative_to(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, kept)
        file.chmod(0o444)
    before = {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    assert len(before) == len(outputs) > 40
    # Other results, so that what is written in place is seen.
    change(folder, {"seed": 5, "train": {"seed": 6}, "data": {"sample": {"passages": 110}}})
    for stage in STAGES:
        succeeded(folder, stage)
    altered = [file.relative_to(cache) for file, content in before.items() if file.read_bytes() != content]
    assert not altered
    renewed = [
        file for file in cache.glob("**/*.json") if (folder / file.relative_to(cache)).read_bytes() != before[file]
    ]
    assert {"train.json", "eval.json", "run.json"} <= {file.name for file in renewed}
    assert not [*folder.glob("**/*.unfinished"), *folder.glob("data/*.old")]


def workers(project: Path, folder: Path, changes: list[dict]) -> tuple[Path, list[Path]]:
    """A repository's root, and folders of workers like those of DVC's queue, a set of changed parameters each."""
    root = folder / "root"
    shutil.copytree(project, root)
    copies = []
    for number, values in enumerate(changes):
        copies.append(folder / f"worker-{number}")
        shutil.copytree(project, copies[-1], ignore=shutil.ignore_patterns(".*", "mlflow.db*", "mlartifacts"))
        change(copies[-1], values)
    return root, copies


def start(root: Path, copies: list[Path], stage: str) -> list[subprocess.Popen]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DVC_ROOT": str(root), "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}"], cwd=copy, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for copy in copies
    ]  # fmt: skip


def outputs_of(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def test_two_index_stages_at_once_make_two_indexes(project, tmp_path):
    factories = ["IVF2,Flat", "HNSW8"]
    root, copies = workers(project, tmp_path, [{"index": {"factory": factory}} for factory in factories])
    outputs_of(start(root, copies, "index"))
    for copy, factory, kind in zip(copies, factories, (faiss.IndexIVFFlat, faiss.IndexHNSWFlat), strict=True):
        assert json.loads((copy / "data/index/index.json").read_text())["factory"] == factory
        assert isinstance(faiss.read_index(str(copy / "data/index/index.faiss")), kind)
    assert outputs_of(start(root, copies, "check"))


@pytest.mark.parametrize("batch_tokens", [(4096, 4096), (4096, 2048)])
def test_two_encode_stages_at_once_make_the_same_vectors(project, tmp_path, batch_tokens):
    root, copies = workers(project, tmp_path, [{"index": {"batch_tokens": most}} for most in batch_tokens])
    outputs_of(start(root, copies, "encode"))
    wanted = np.load(project / "data/vectors/vectors.npy")
    for copy in copies:
        np.testing.assert_allclose(np.load(copy / "data/vectors/vectors.npy"), wanted, atol=1e-5)
    assert [one.name for one in (root / FOLDER).iterdir() if one.is_dir()] == []


def test_experiments_that_differ_after_training_train_once(project, tmp_path):
    """evaluate.num_beams=1,2 with two workers, one of them of two ranks: who comes second waits and takes the weights."""
    beams = [{"evaluate": {"num_beams": 1}}, {"evaluate": {"num_beams": 2}, "runtime": {"processes": 2}}]
    root, copies = workers(project, tmp_path, beams)
    fingerprint = json.loads((project / "data/model/run.json").read_text())["fingerprint"]
    shutil.rmtree(root / FOLDER, ignore_errors=True)
    (root / FOLDER).mkdir()
    for copy in copies:
        shutil.rmtree(copy / "data/model")
    with FileLock(root / FOLDER / f"{fingerprint}.lock"):
        processes = start(root, copies, "train")
        for process in processes:  # both are there before one of them may begin
            assert any("another process trains exactly this" in line for line in process.stdout)
    outputs = outputs_of(processes)
    assert sum("trained already, 4 steps" in output for output in outputs) == 1
    weights = [load_file(copy / "data/model/model.safetensors") for copy in copies]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())
    runs = [json.loads((copy / "data/model/run.json").read_text()) for copy in copies]
    assert runs[0] == runs[1] and runs[0]["run_id"]
    outputs_of(start(root, copies, "evaluate"))
    assert not (root / FOLDER / fingerprint).exists()  # what both have taken is gone
    assert all(json.loads((copy / "metrics/eval.json").read_text())["questions"] == 12 for copy in copies)


def test_the_ranks_of_a_waiting_training_wait_too(project, tmp_path):
    """A collective's limit is a minute; waiting for another training is none of them."""
    root, copies = workers(project, tmp_path, [{"runtime": {"processes": 2}}])
    sources = copies[0] / "stages/compute/ranks.py"
    text = sources.read_text(encoding="utf-8")
    sources.write_text(text.replace("timedelta(seconds=60)", "timedelta(seconds=10)"), encoding="utf-8")
    shutil.rmtree(copies[0] / "data/model")
    outputs_of(start(root, copies, "train"))  # tells the fingerprint, of which the changed file is a part
    fingerprint = json.loads((copies[0] / "data/model/run.json").read_text())["fingerprint"]
    with FileLock(root / FOLDER / f"{fingerprint}.lock"):
        [second] = start(root, copies, "train")
        assert any("another process trains exactly this" in line for line in second.stdout)
        time.sleep(15)  # longer than the limit
        assert second.poll() is None
    [output] = outputs_of([second])
    assert "trained already" in output
