"""The journal: what MLflow cannot take now is sent later, once."""

import resource
import shutil

import pytest

from stages.tracking import runs as tracking
from stages.tracking.__main__ import main as send
from stages.tracking.journal import Journal
from stages.tracking.records import record
from tests.tracking.stores import (
    EXPERIMENT,
    check_everything,
    free_port,
    local_client,
    log_everything,
    runs,
    start,
    values,
)


@pytest.mark.slow
def test_server_down_then_sent_exactly_once(root, monkeypatch, capsys):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    tracker = start(root)
    log_everything(tracker, root)
    assert tracker.run_id is None and not tracker.flush(0)
    tracker.close(timeout=600)
    path = root / "journal.jsonl"
    printed = capsys.readouterr().err
    assert f"python -m stages.tracking {path}" in printed and "does not answer" in printed
    assert "secret" not in printed + path.read_text()
    assert len(path.read_text().splitlines()) == 17, "a record a call"
    assert send([str(path)]) == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    for _ in range(2):
        assert send([str(path)]) == 0
    (run,) = runs(local_client(root))
    check_everything(local_client(root), run.info.run_id, root)
    path.with_name(path.name + ".sent").unlink()  # everything is sent a second time
    assert send([str(path)]) == 0
    (run,) = runs(local_client(root))
    check_everything(local_client(root), run.info.run_id, root)


def test_the_wrong_store_takes_nothing(root, monkeypatch, capsys, migrated):
    start(root).close("KILLED")
    Journal(root / "journal.jsonl").append(record("metrics", values={"loss": 1.0}, step=1))
    shutil.copy(migrated, root / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert send([str(root / "journal.jsonl")]) == 1
    assert "does not know run" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir("/")
    assert send([str(root / "journal.jsonl")]) == 0
    (run,) = runs(local_client(root))
    assert run.data.metrics == {"loss": 1.0}


def test_main_says_what_is_wrong(root, capsys):
    assert send([str(root / "absent.jsonl")]) == 1
    assert "there is no journal" in capsys.readouterr().err
    tracker = start(root)
    assert send([str(root / "journal.jsonl")]) == 1
    assert "already" in capsys.readouterr().err
    tracker.close()


def test_an_unwritable_journal_loses_nothing_while_mlflow_answers(root, capsys):
    (root / "file").write_text("in the way")
    with start(root, journal="file/journal.jsonl") as tracker:
        log_everything(tracker, root)
    check_everything(local_client(root), tracker.run_id, root)
    assert capsys.readouterr().err.count("cannot write") == 1


def test_an_unwritable_journal_and_no_server(root, monkeypatch, capsys):
    (root / "file").write_text("in the way")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    tracker = start(root, journal="file/journal.jsonl")
    log_everything(tracker, root)
    tracker.close(timeout=5)
    assert "records are lost" in capsys.readouterr().err


def test_a_full_disk_keeps_the_order_and_tears_no_line(tmp_path, capsys):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(record("text", text="1"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, hard))
        journal.append(record("text", text="2"))
        journal.append(record("text", text="3"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(journal.unwritten) == 2 and journal.unsent() == 3
    assert capsys.readouterr().err.count("cannot write") == 1
    journal.append(record("text", text="4"))
    assert [entry["text"] for entry, _ in journal.take() if entry] == ["1", "2", "3", "4"]
    assert journal.unwritten == [] and journal.unsent() == 4


def test_a_torn_line_is_skipped(root):
    with start(root) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    with (root / "journal.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "val')
    with start(root, run_id=tracker.run_id) as again:
        again.log_metrics({"loss": 2.0}, 2)
    assert values(local_client(root), tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_journal_that_is_removed_under_way_starts_again(root):
    with start(root) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        assert tracker.flush(600)
        (root / "journal.jsonl").unlink()
        tracker.log_metrics({"loss": 2.0}, 2)
    assert values(local_client(root), tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_two_trackers_do_not_share_a_journal(root, capsys):
    with start(root) as first, start(root) as second:
        first.log_metrics({"loss": 1.0}, 1)
        second.log_metrics({"loss": 2.0}, 1)
    assert first.run_id != second.run_id and first.journal.path != second.journal.path
    assert values(local_client(root), second.run_id, "loss") == [(1, 2.0)]
    assert "another process is sending" in capsys.readouterr().err


def test_what_is_evaluated_while_mlflow_is_away_joins_the_trainings_run(root, monkeypatch):
    """The training ended without an answer, so nobody knows its id: its journal is what the evaluation goes on with."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    tracker = start(root)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close(timeout=3)
    evaluation = tracking.open_run(root, EXPERIMENT, None, None, root / "journal.jsonl", None, same_run=True)
    evaluation.log_metrics({"test_em": 40.0})
    evaluation.close(timeout=3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert send([str(root / "journal.jsonl")]) == 0
    (run,) = runs(local_client(root))
    assert run.data.metrics == {"loss": 1.0, "test_em": 40.0} and run.info.status == "FINISHED"
