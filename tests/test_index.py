"""The stages encode and index: killed, given what does not fit, and what they leave in place."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import yaml

from stages.corpus.arrow import PASSAGES, QUESTIONS, write_rows
from stages.search.passage_index import load_index
from stages.storage import manifest
from tests.in_process import run_stage

ROOT = Path(__file__).resolve().parents[1]
COUNT = 60
pytestmark = pytest.mark.slow
KILLED_WHILE_ENCODING = """
import os, runpy, signal
from stages.encoders.encoder import Encoder

Encoder.stream = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_module("stages.encode", run_name="__main__")
"""


def project(folder, warm_up=30, **settings):
    """A folder with everything that the stage reads."""
    passages = [{"id": f"p{i}", "title": f"Title {i}", "text": f"Text {i * i} of {i}. " * 3} for i in range(COUNT)]
    questions = [{"id": f"q{i}", "question": f"What is {i}?", "answers": ["x"], "positive_ids": []} for i in range(12)]
    write_rows(folder / "data/prepared/passages.arrow", PASSAGES, passages)
    write_rows(folder / "data/prepared/validation.arrow", QUESTIONS, questions)
    for role in ("question_encoder", "context_encoder"):
        shutil.copytree(ROOT / "data/tiny/encoder", folder / "data/retriever" / role)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["index"] |= settings
    params["retriever"]["steps"] = warm_up
    params["runtime"] |= {"device": "cpu", "threads": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return folder


def run(folder):
    """Both stages, the second where the first went well."""
    done = run_stage(folder, "encode")
    return done if done.returncode else run_stage(folder, "index")


def written(folder):
    return {
        f"{out}/{file.name}": file.read_bytes()
        for out in ("index", "vectors")
        for file in (folder / "data" / out).iterdir()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("whole"))
    done = run(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_metrics_and_nothing_left_behind(whole):
    metrics = {}
    for stage in ("encode", "index"):
        metrics |= json.loads((whole / f"metrics/{stage}.json").read_text())
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert metrics["recall_of_exact_at_5"] == metrics["recall_of_exact_at_20"] == 100
    assert metrics["vector_bytes"] == (whole / "data/vectors/vectors.npy").stat().st_size
    assert {"encode_seconds", "build_seconds", "search_ms_per_question", "index_bytes"} <= metrics.keys()
    assert set(written(whole)) == {
        "index/index.faiss", "index/index.json", "index/manifest.json", "vectors/vectors.npy", "vectors/manifest.json",
    }  # fmt: skip
    assert not [path for path in (whole / ".checkpoints").iterdir() if path.is_dir()]


def test_killed_while_encoding_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    folder = project(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_ENCODING], cwd=folder, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert list(folder.glob(".checkpoints/*/vectors/vectors.npy")) and not (folder / "data/vectors").exists()
    assert run(folder).returncode == 0
    assert written(folder) == written(whole)


def test_an_imported_index_is_adopted_and_one_that_does_not_fit_changes_nothing(whole, tmp_path):
    folder = project(tmp_path, warm_up=0, import_path="mine.faiss")
    shutil.copy(whole / "data/index/index.faiss", folder / "mine.faiss")
    assert run(folder).returncode == 0
    before, mine = written(folder), (folder / "mine.faiss").read_bytes()
    assert before["index/index.faiss"] == mine
    assert before["vectors/vectors.npy"] == written(whole)["vectors/vectors.npy"]
    vectors = np.load(folder / "data/vectors/vectors.npy")
    other = faiss.IndexFlatIP(vectors.shape[1])
    other.add(np.ascontiguousarray(vectors[::-1]))
    faiss.write_index(other, str(folder / "mine.faiss"))
    refused = run(folder)
    assert refused.returncode == 1 and "index.import_path: mine.faiss: the vector of passage" in refused.stderr
    assert written(folder) == before


def test_vectors_of_ones_own_take_the_place_of_encoding_and_the_index_is_built_from_them(whole, tmp_path):
    vectors = np.load(whole / "data/vectors/vectors.npy")
    folder = project(tmp_path, warm_up=0, import_path="mine.npy", factory="IVF8,Flat")
    np.save(folder / "mine.npy", vectors.astype(np.float16))
    done = run(folder)
    assert done.returncode == 0, done.stderr
    held = np.load(folder / "data/vectors/vectors.npy")
    assert held.dtype == np.float32 and np.array_equal(held, vectors.astype(np.float16).astype(np.float32))
    index = load_index(folder / "data/index", folder / "data/vectors").index
    assert type(index).__name__ == "IndexIVFFlat" and index.ntotal == COUNT
    assert "encode passages" not in done.stderr
    before = written(folder)
    np.save(folder / "mine.npy", vectors[::-1])
    refused = run(folder)
    assert refused.returncode == 1 and "index.import_path: mine.npy: the vector of passage" in refused.stderr
    assert written(folder) == before


def test_an_import_beside_a_warm_up_is_refused_before_anything_runs(tmp_path):
    folder = project(tmp_path, warm_up=30, import_path="mine.faiss")
    done = run_stage(folder, "inputs")
    assert done.returncode == 1 and "the warm-up (retriever.steps: 30) would change; set retriever.steps" in done.stderr


def test_an_approximate_index_is_measured_at_several_settings_and_encodes_nothing_again(whole, tmp_path):
    folder = tmp_path / "ivf"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "data/index")
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["index"]["factory"] = "IVF8,Flat"
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    done = run_stage(folder, "index")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "metrics/index.json").read_text())
    assert "recall_of_exact_at_5" not in metrics and {"nprobe_1", "nprobe_4"} <= metrics.keys()
    assert 0 < metrics["nprobe_1"]["recall_of_exact_at_5"] <= metrics["nprobe_4"]["recall_of_exact_at_5"] <= 100


def test_an_index_of_other_vectors_is_refused(whole, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    vectors = np.load(folder / "data/vectors/vectors.npy")
    np.save(folder / "data/vectors/vectors.npy", vectors[::-1].copy())
    manifest.record(folder / "data/vectors/vectors.npy")
    with pytest.raises(ValueError, match="data/index: made from other vectors .* run `dvc repro --force index`"):
        load_index(folder / "data/index", folder / "data/vectors")
