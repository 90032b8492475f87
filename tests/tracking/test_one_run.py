"""One run: what is logged is there, what is no number harms nothing, a killed one goes on."""

import os
import signal
import subprocess
import time

import pytest

from stages.tracking import runs as tracking
from stages.tracking.journal import Journal
from tests.tracking.stores import (
    EXPERIMENT,
    check_everything,
    local_client,
    log_everything,
    python,
    runs,
    start,
    values,
)


def test_everything_is_visible(root, capsys):
    with start(root, name="first") as tracker:
        log_everything(tracker, root)
    assert capsys.readouterr() == ("", "")
    check_everything(local_client(root), tracker.run_id, root)
    assert local_client(root).get_run(tracker.run_id).info.run_name == "first"


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (SystemExit, "FAILED"), (KeyboardInterrupt, "KILLED")],
)
def test_status(root, error, status):
    try:
        with start(root) as tracker:
            if error:
                raise error()
    except BaseException as caught:
        assert type(caught) is error
    assert local_client(root).get_run(tracker.run_id).info.status == status


def test_values_that_are_no_numbers_raise_nothing(root, capsys):
    with start(root) as tracker:
        nan, inf = float("nan"), float("-inf")
        tracker.log_metrics({"nan": nan, "inf": inf, "text": "x", "none": None, "ok": 1}, 1)
        tracker.log_metrics({"loss": 1.0}, step="three")
        tracker.log_metrics(None, 1)
        tracker.log_params({("a", 1): object()})
        tracker.log_file(root / "absent.bin")
        tracker.log_table([{"score": float("nan")}], "table")
        tracker.set_tags({"a/../b": 1})
        tracker.log_metrics({"last": 2.0}, 2)
    data = local_client(root).get_run(tracker.run_id).data
    assert data.metrics["nan"] != data.metrics["nan"] and data.metrics["inf"] < -1e308
    assert data.metrics["ok"] == 1 and data.metrics["last"] == 2 and "text" not in data.metrics
    assert "text, none" in capsys.readouterr().err


def test_a_refused_record_holds_up_no_other(root, capsys):
    with start(root) as tracker:
        tracker.log_metrics({"good": 1.0, "a/../b": 1.0}, 1)
        tracker.log_metrics({"good": 2.0}, 2)
        tracker.log_text("x", "")
        tracker.log_text("x", "../../outside.txt")
        tracker.log_metrics({"good": 3.0}, 3)
    client = local_client(root)
    assert values(client, tracker.run_id, "good")[-2:] == [(2, 2.0), (3, 3.0)]
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["outside.txt"]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert capsys.readouterr().err.count("refused") == 1


def test_a_changed_param_becomes_a_tag(root):
    with start(root) as tracker:
        tracker.log_params({"evaluate": {"n_docs": 5, "beams": 4}})
    with start(root, run_id=tracker.run_id) as again:
        again.log_params({"evaluate": {"n_docs": 10, "beams": 4, "new": 1}})
    data = local_client(root).get_run(tracker.run_id).data
    assert data.params == {"evaluate.n_docs": "5", "evaluate.beams": "4", "evaluate.new": "1"}
    assert data.tags["changed.evaluate.n_docs"] == "10" and "changed.evaluate.beams" not in data.tags


def test_system_metrics_without_a_gpu_go_on_in_a_reopened_run(root):
    name = "system/cpu_utilization_percentage"
    with start(root, seconds=0.1) as tracker:
        while len(Journal(root / "journal.jsonl").path.read_text().splitlines()) < 4:
            time.sleep(0.05)
    before = values(local_client(root), tracker.run_id, name)
    assert [step for step, _ in before] == list(range(len(before))) and before
    with start(root, run_id=tracker.run_id, journal="evaluate.jsonl", seconds=0.1):
        while not (root / "evaluate.jsonl").read_text().count('"system"'):
            time.sleep(0.05)
    after = values(local_client(root), tracker.run_id, name)
    assert [step for step, _ in after] == list(range(len(after))) and len(after) > len(before)


def test_a_killed_training_goes_on_in_its_run(root):
    code = """
import os, signal, sys
from pathlib import Path
from stages.tracking import runs as tracking
tracker = tracking.open_run(Path.cwd(), "demo", None, None, Path("journal.jsonl"))
tracker.log_metrics({"loss": 2.0}, 1)
assert tracker.flush(600)
print(tracker.run_id, flush=True)
tracker.log_metrics({"loss": 1.5}, 2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = python(root, code)
    run_id, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    client = local_client(root)
    assert client.get_run(run_id.strip()).info.status == "RUNNING"
    with start(root, run_id=run_id.strip()) as tracker:
        assert tracker.run_id == run_id.strip()
        tracker.log_metrics({"loss": 1.0}, 3)
    assert len(runs(client)) == 1
    assert values(client, tracker.run_id, "loss") == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_without_an_id_an_unfinished_journal_goes_on_and_a_finished_one_starts_anew(root):
    tracker = start(root)
    tracker.close("KILLED")
    again = start(root)
    assert again.flush(600) and again.run_id == tracker.run_id
    assert local_client(root).get_run(again.run_id).info.status == "RUNNING"
    again.close()
    with start(root) as third:
        pass
    assert third.run_id not in (None, again.run_id)


@pytest.mark.parametrize("deleted", [True, False])
def test_a_run_that_is_gone_is_replaced(root, capsys, deleted):
    with start(root) as tracker:
        pass
    local_client(root).delete_run(tracker.run_id)
    gone = tracker.run_id if deleted else "0" * 32
    with start(root, run_id=gone) as again:
        again.log_metrics({"loss": 1.0}, 1)
    assert again.run_id != gone and again.run_id is not None
    assert local_client(root).get_run(again.run_id).data.metrics == {"loss": 1.0}
    assert f"run {gone} is not in this MLflow" in capsys.readouterr().err


def test_a_deleted_experiment_is_restored(root):
    with start(root) as tracker:
        pass
    client = local_client(root)
    client.delete_experiment(client.get_experiment_by_name(EXPERIMENT).experiment_id)
    with start(root, journal="other.jsonl") as other:
        pass
    assert client.get_run(other.run_id).info.status == "FINISHED" and other.run_id != tracker.run_id


def test_environment_tags(root, monkeypatch):
    tags = tracking.environment_tags(root)
    assert tags["python"] and tags["torch"] and tags["cpu_count"] == str(os.cpu_count())
    assert not {"git.dirty", "mlflow.source.git.commit", "dvc.exp_name"} & set(tags)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    (root / "file").write_text("one")
    for arguments in (["init", "-q", "-b", "topic"], ["add", "file"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    monkeypatch.setenv("DVC_EXP_NAME", "brave-fox")
    tags = tracking.environment_tags(root)
    assert len(tags["mlflow.source.git.commit"]) == 40 and tags["mlflow.source.git.branch"] == "topic"
    assert tags["git.dirty"] == "false" and tags["dvc.exp_name"] == "brave-fox"
    (root / "file").write_text("two")
    assert tracking.environment_tags(root)["git.dirty"] == "true"


def test_a_resumed_training_sends_no_point_twice(root):
    from stages.training.curves import Curves

    with pytest.raises(KeyboardInterrupt), start(root) as tracker:
        curves = Curves(tracker, None, {})
        for step in (0, 2, 4):
            curves.point({"step": step, "loss": float(step)})
        raise KeyboardInterrupt
    with start(root) as tracker:
        curves = Curves(tracker, None, {})
        for step in (2, 4, 6):  # from a checkpoint of step 1
            curves.point({"step": step, "loss": float(step)})
    assert values(local_client(root), tracker.run_id, "training/loss") == [(0, 0.0), (2, 2.0), (4, 4.0), (6, 6.0)]
    with start(root) as another:  # that one finished: the next is a run of its own
        Curves(another, None, {}).point({"step": 2, "loss": 9.0})
    assert another.run_id != tracker.run_id
    assert values(local_client(root), another.run_id, "training/loss") == [(2, 9.0)]
