"""Models in MLflow's registry, and the evaluations of a run."""

import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from stages.tracking import runs as tracking
from stages.tracking.__main__ import main as send
from tests.tracking.stores import (
    CODE,
    EXPERIMENT,
    LOADER,
    answers,
    free_port,
    local_client,
    python,
    register,
    runs,
    start,
    values,
)


def versions(root):
    found = local_client(root).search_model_versions("name = 'demo'")
    return sorted((int(one.version), one.run_id) for one in found)


@pytest.mark.slow
def test_a_registered_model_answers_in_another_folder_without_its_code_or_files(root):
    with start(root) as tracker:
        register(tracker, root)
    for name in ("step-4", "toy_loader"):
        shutil.rmtree(root / name)
    assert answers(root) == "['first: who?']"


def test_the_files_of_a_model_are_linked_and_its_code_is_copied(root):
    (root / "kept").mkdir()
    with start(root) as tracker:
        model, code = root / "step-4", root / "toy_loader"
        register(tracker, root)
        (model / "weights.bin").write_text("of another training")
        (code / "__init__.py").write_text("raise SystemExit")
        source = root / "large"
        source.write_text("x")
        tracker.register_model(
            "other", {"model/large": source}, {}, code, "toy_loader", ["who?"], 1, {}, {}, registered="demo",
            alias="old", about="", description="",
        )  # fmt: skip
    files = {file.name: file for file in (root / "mlartifacts/models").rglob("*") if file.is_file()}
    assert files["large"].stat().st_ino == source.stat().st_ino
    assert files["weights.bin"].read_text() == "first"
    codes = {file.read_text() for file in (root / "mlartifacts/models").rglob("toy_loader/__init__.py")}
    assert codes == {LOADER, "raise SystemExit"}
    assert not any(file.suffix in (".pkl", ".pickle") for file in files.values())


def test_a_training_killed_after_its_model_registers_it_once(root):
    code = """
import os, signal, sys
from pathlib import Path
from stages.tracking import runs as tracking
sys.path.insert(0, sys.argv[1])
from tests.tracking.stores import register
tracker = tracking.open_run(Path.cwd(), "demo", None, None, Path("journal.jsonl"), None)
register(tracker, Path.cwd())
assert tracker.flush(600)
print(tracker.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = python(root, code, str(CODE))
    run_id = process.communicate()[0].strip()
    assert process.returncode == -signal.SIGKILL and versions(root) == [(1, run_id)]
    with start(root) as tracker:
        register(tracker, root)
    assert versions(root) == [(1, run_id)] and tracker.run_id == run_id
    client = local_client(root)
    assert values(client, run_id, "model/validation_loss") == [(0, 1.5)]
    assert len(client.search_logged_models([client.get_run(run_id).info.experiment_id])) == 1


def test_an_upload_that_was_cut_off_is_done_again(root, monkeypatch):
    from stages.tracking import registry

    def cut(*_, **__):
        raise OSError("the disk was full")

    with start(root) as tracker:
        with monkeypatch.context() as broken:
            broken.setattr(registry, "copy_tree", cut)
            register(tracker, root)
            assert not tracker.flush(3)
        assert (root / "journal.files").is_dir()
    (model,) = (root / "mlartifacts/models").iterdir()
    assert (model / "artifacts/data/parts/model/weights.bin").read_text() == "first"
    assert len(versions(root)) == 1 and not (root / "journal.files").exists()


def test_a_model_that_waited_takes_no_alias_from_a_later_one(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    waiting = start(root, journal="early.jsonl")
    register(waiting, root, weights="early")
    waiting.close(timeout=1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with start(root, journal="late.jsonl") as later:
        register(later, root, weights="late")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert send([str(root / "early.jsonl")]) == 0
    client = local_client(root)
    assert len(versions(root)) == 2
    assert client.get_model_version_by_alias("demo", "new").run_id == later.run_id
    early = next(run_id for _, run_id in versions(root) if run_id != later.run_id)
    folder = next(one for one in client.search_model_versions("name = 'demo'") if one.run_id == early)
    parts = Path(folder.source.removeprefix("file://")) / "data/parts"
    assert (parts / "model/weights.bin").read_text() == "early", "as it was when it was logged"


def test_a_large_file_is_logged_as_it_was_and_orphans_go(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    (root / "report.html").write_text("a" * 1_100_000)
    tracker = start(root)
    tracker.log_file(root / "report.html")
    (root / "report.html").write_text("another")
    tracker.close(timeout=1)
    (root / "journal.files" / "orphan.unfinished").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with start(root):
        assert not (root / "journal.files" / "orphan.unfinished").exists()
    (file,) = (root / "mlartifacts").rglob("report.html")
    assert file.stat().st_size == 1_100_000


def test_an_evaluation_is_a_child_and_leaves_the_run_its_duration(root):
    with start(root) as tracker:
        register(tracker, root)
    client = local_client(root)
    before = client.get_run(tracker.run_id).info
    trained = {
        "run_id": tracker.run_id,
        "experiment": EXPERIMENT,
        "fingerprint": "f",
        "name": "n",
        "params": {},
        "metrics": {},
    }
    for em, beams in ((40.0, 1), (50.0, 4), (40.0, 1), (40.0, 1)):
        with tracking.reopen_trained(root, trained) as again:
            again.log_metrics({"test/em": em}, of_model=True)
            again.describe(f"EM {em}")
            again.log_child(
                f"key-{beams}",
                f"{beams} beams",
                time.time(),
                {"evaluate": {"num_beams": beams}},
                {"test/em": em},
                {},
                {},
            )
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", before.end_time)
    assert run.data.metrics["test/em"] == 40 and run.data.tags["mlflow.note.content"] == "EM 40.0"
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert {one.value for one in model.metrics if one.key == "test/em"} == {40.0, 50.0}
    (version,) = client.search_model_versions("name = 'demo'")
    assert version.description == "EM 40.0"
    children = [one for one in runs(client) if one.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    found = sorted((one.data.params["evaluate.num_beams"], one.data.metrics["test/em"]) for one in children)
    assert found == [("1", 40.0), ("4", 50.0)], "one of each, however often it is repeated"
    assert all(one.info.status == "FINISHED" for one in children)


def test_an_evaluation_of_what_was_trained_elsewhere_makes_one_run_that_is_not_empty(root, capsys):
    trained = {
        "run_id": "0" * 32, "experiment": EXPERIMENT, "fingerprint": "f", "name": "theirs", "params": {"train.seed": "1"},
        "metrics": {"model/validation_loss": 2.5},
    }  # fmt: skip
    for em in (10.0, 20.0):
        with tracking.reopen_trained(root, trained) as tracker:
            tracker.log_metrics({"test/em": em})
    (run,) = runs(local_client(root))
    assert run.info.run_name == "theirs" and run.info.status == "FINISHED"
    assert run.data.params == {"train.seed": "1"}
    assert run.data.metrics == {"model/validation_loss": 2.5, "test/em": 20.0}
    assert capsys.readouterr().err.count("is not in this MLflow") == 1


def test_a_resumed_training_takes_the_name_of_its_new_experiment(root):
    start(root, name="first").close("KILLED")
    with start(root, name="second") as tracker:
        pass
    (run,) = runs(local_client(root))
    assert run.info.run_id == tracker.run_id and run.info.run_name == "second"


def test_the_pages_open_on_the_experiments_runs():
    from stages.tracking.ui import address, free_port

    assert address("http://127.0.0.1:5000", "7").startswith(
        "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert free_port(taken.getsockname()[1]) > taken.getsockname()[1]
