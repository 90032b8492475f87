"""Several processes on one store, and a real `mlflow server`: late, gone, hanging."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from stages.tracking.__main__ import main as send
from stages.tracking.mlflow_store import MlflowClient
from tests.tracking.stores import (
    check_everything,
    free_port,
    local_client,
    log_everything,
    python,
    runs,
    start,
    values,
)

RUN = """
import sys
from pathlib import Path
from stages.tracking import runs as tracking
with tracking.open_run(Path.cwd(), "demo", None, sys.argv[1], Path(sys.argv[1] + ".jsonl")) as tracker:
    tracker.log_metrics({"loss": float(sys.argv[1])}, 1)
    tracker.log_text("x", "x.txt")
"""


@pytest.mark.slow
def test_four_processes_on_a_fresh_store(root):
    (root / "mlflow.db").unlink()
    processes = [python(root, RUN, str(number)) for number in range(4)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert outputs == [("", "")] * 4  # nor does MLflow chat about its migrations
    found = runs(local_client(root))
    assert sorted(run.data.metrics["loss"] for run in found) == [0, 1, 2, 3]
    assert {run.info.status for run in found} == {"FINISHED"}


KILLED_AT_A_STATEMENT = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine

left = int(sys.argv[2])

@event.listens_for(Engine, "before_cursor_execute")
def count(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("statement", [3, 60, 200])
def test_killed_while_it_makes_the_store(root, statement):
    """MLflow's migrations are many statements; SQLite keeps those that were done."""
    (root / "mlflow.db").unlink()
    process = python(root, KILLED_AT_A_STATEMENT + RUN, "1", str(statement))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (root / "mlflow.db.unfinished").exists() and not (root / "mlflow.db").exists()
    again = python(root, RUN, "1")
    assert again.communicate() == ("", "") and again.returncode == 0
    # The killed process had closed its run in the journal already: that one is sent too.
    found = [(run.data.metrics, run.info.status) for run in runs(local_client(root))]
    assert found == [({"loss": 1.0}, "FINISHED")] * 2
    assert not list(root.glob("mlflow.db.unfinished*"))


@pytest.fixture
def server(root):
    """Starts `mlflow server` on a port when called with it."""
    processes = []

    def serve(port):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI")
        folder = root / "server"
        folder.mkdir(exist_ok=True)
        shutil.copy(root / "mlflow.db", folder / "mlflow.db")
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        processes.append(process)
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
                return process
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)

    yield serve
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_server_that_comes_late_gets_the_full_run_once(root, server, monkeypatch):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = start(root)
    log_everything(tracker, root)
    tracker.close(timeout=5)
    server(port)
    for _ in range(2):
        assert send([str(root / "journal.jsonl")]) == 0
    client = MlflowClient(uri)
    (run,) = runs(client)
    check_everything(client, run.info.run_id, root)


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back(root, server, monkeypatch, capsys):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with start(root, seconds=0.5) as tracker:
        tracker.log_metrics({"loss": float("nan")}, 0)
        process = server(port)
        assert tracker.flush(600) and tracker.run_id
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for step in range(1, 50):
            tracker.log_metrics({"loss": float(step)}, step)
        assert not tracker.flush(4)
        (root / "server" / "mlflow.db").rename(root / "mlflow.db")
        server(port)
        assert tracker.flush(600)
    client = MlflowClient(f"http://127.0.0.1:{port}")
    history = client.get_metric_history(tracker.run_id, "loss")
    assert sorted(one.step for one in history) == list(range(50))
    steps = [step for step, _ in values(client, tracker.run_id, "system/cpu_utilization_percentage")]
    assert steps == list(range(len(steps))) and len(steps) > 4
    assert "answers again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_hangs_holds_up_nothing_and_gets_everything_once(root, server, monkeypatch, capsys):
    """SIGSTOP: connections are taken and never answered."""
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    process = server(port)
    tracker = start(root)
    tracker.log_metrics({"loss": 0.0}, 0)
    assert tracker.flush(600)
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        for step in range(1, 200):
            tracker.log_metrics({"loss": float(step)}, step)
        logged = len((root / "journal.jsonl").read_text().splitlines())
        tracker.close(timeout=3)
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    assert logged == 201  # all in the journal before any answer came
    assert "python -m stages.tracking" in capsys.readouterr().err
    tracker._thread.join()  # of a process that would have ended by now
    assert send([str(root / "journal.jsonl")]) == 0
    client = MlflowClient(f"http://127.0.0.1:{port}")
    assert values(client, tracker.run_id, "loss") == [(step, float(step)) for step in range(200)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_store_that_can_be_read_but_not_written_loses_no_record(root):
    """Another connection's write lock does what a full or read-only disk does: reads answer, writes fail."""
    import sqlite3

    tracker = start(root)
    assert tracker.flush(600)
    other = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert not tracker._run.is_well()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"loss": 2.0}, 2)
    assert not tracker.flush(8)
    other.execute("ROLLBACK")
    other.close()
    assert tracker.flush(600) and tracker._run.is_well()
    tracker.close()
    assert values(local_client(root), tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]
