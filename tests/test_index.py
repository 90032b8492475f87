"""The index stage as a process: killed, given what does not fit, and what it leaves in place."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import yaml

from stages.corpus.arrow import PASSAGES, QUESTIONS, write_rows

ROOT = Path(__file__).resolve().parent.parent
COUNT = 60
pytestmark = pytest.mark.slow


def project(folder, **settings):
    """A folder with everything that the stage reads."""
    passages = [{"id": f"p{i}", "title": f"Title {i}", "text": f"Text {i * i} of {i}. " * 3} for i in range(COUNT)]
    questions = [{"id": f"q{i}", "question": f"What is {i}?", "answers": ["x"], "positive_ids": []} for i in range(12)]
    write_rows(folder / "data/prepared/passages.arrow", PASSAGES, passages)
    write_rows(folder / "data/prepared/validation.arrow", QUESTIONS, questions)
    for role in ("question_encoder", "context_encoder"):
        shutil.copytree(ROOT / "data/tiny/encoder", folder / "data/retriever" / role)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["index"] |= settings
    params["runtime"] |= {"device": "cpu", "threads": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return folder


def command(folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, "-m", "stages.index"], "cwd": folder, "env": environment}


def run(folder):
    return subprocess.run(**command(folder), capture_output=True, text=True, timeout=300)


def written(folder):
    return {file.name: file.read_bytes() for file in (folder / "data/index").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("whole"))
    done = run(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_metrics_and_nothing_left_behind(whole):
    metrics = json.loads((whole / "metrics/index.json").read_text())
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert metrics["recall_of_exact_at_5"] == metrics["recall_of_exact_at_20"] == 100
    assert metrics["vector_bytes"] == (whole / "data/index/vectors.npy").stat().st_size
    assert {"encode_seconds", "build_seconds", "search_ms_per_question", "index_bytes"} <= metrics.keys()
    assert set(written(whole)) == {"index.faiss", "vectors.npy", "index.json", "manifest.json"}
    assert list((whole / ".checkpoints").iterdir()) == []


def test_killed_while_building_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    folder = project(tmp_path)
    process = subprocess.Popen(**command(folder), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while (
        not list(folder.glob(".checkpoints/*/shards.json")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (folder / "data/index").exists()
    assert run(folder).returncode == 0
    assert written(folder) == written(whole) and list((folder / ".checkpoints").iterdir()) == []


def test_an_imported_index_is_adopted_and_one_that_does_not_fit_changes_nothing(whole, tmp_path):
    folder = project(tmp_path, import_path="mine.faiss")
    shutil.copy(whole / "data/index/index.faiss", folder / "mine.faiss")
    assert run(folder).returncode == 0
    before, mine = written(folder), (folder / "mine.faiss").read_bytes()
    assert before["index.faiss"] == mine and before["vectors.npy"] == written(whole)["vectors.npy"]
    vectors = np.load(folder / "data/index/vectors.npy")
    other = faiss.IndexFlatIP(vectors.shape[1])
    other.add(np.ascontiguousarray(vectors[::-1]))
    faiss.write_index(other, str(folder / "mine.faiss"))
    refused = run(folder)
    assert refused.returncode == 1 and "index.import_path: mine.faiss: the vector of passage" in refused.stderr
    assert written(folder) == before


def test_a_parameter_that_the_kind_does_not_have_stops_before_encoding(tmp_path):
    folder = project(tmp_path, nprobe=4)
    refused = run(folder)
    assert refused.returncode == 1 and "error: index.nprobe: the index is of kind Flat" in refused.stderr
    assert not (folder / "data/index").exists() and not (folder / ".checkpoints").exists()
