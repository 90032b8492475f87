"""Against real SQLite stores, and one real `mlflow server` (slow)."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from stages.machine.entry import root_folder
from stages.tracking import runs as tracking
from stages.tracking.__main__ import main as send
from stages.tracking.journal import Journal, record
from stages.tracking.mlflow_store import MlflowClient, tracking_uri

CODE = Path(__file__).resolve().parents[2]
EXPERIMENT = "demo"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """A fresh store costs a second of migrations: made once, then copied."""
    folder = tmp_path_factory.mktemp("store")
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path, monkeypatch, migrated):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path


def start(root, run_id=None, journal="journal.jsonl", name=None, seconds=None):
    return tracking.open_run(root, EXPERIMENT, run_id, name, root / journal, system_metrics_seconds=seconds)


def runs(client):
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def local_client(root):
    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def values(client, run_id, name):
    return sorted((one.step, one.value) for one in client.get_metric_history(run_id, name))


def python(root, code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


LOADER = """
from pathlib import Path
class Answering:
    def __init__(self, folder): self.weights = (folder / "model/weights.bin").read_text()
    def predict(self, model_input, params=None): return [f"{self.weights}: {one}" for one in model_input.iloc[:, 0]]
def _load_pyfunc(path): return Answering(Path(path))
"""


def register(tracker, folder, weights="first", step=4, alias="new", loss=1.5):
    """A model of one file, whose files change right after they were given away."""
    model, code = folder / "step-4", folder / "toy_loader"
    for place in (model, code):
        place.mkdir(exist_ok=True)
    (model / "weights.bin").unlink(missing_ok=True)  # as a stage does: replaced, never written into
    (model / "weights.bin").write_text(weights)
    (code / "__init__.py").write_text(LOADER)
    (folder / "params.yaml").write_text(f"step: {step}")
    tracker.register_model(
        "step 4", {"model": model}, {"params.yaml": folder / "params.yaml"}, code, "toy_loader", ["who?"], step,
        {"model/validation_loss": loss}, {"top": {"k": 5}}, registered="demo", alias=alias, about="about", description="one",
    )  # fmt: skip
    (folder / "params.yaml").write_text("step: another")
    (model / "weights.bin").unlink()


def answers(root, alias="new"):
    """What the registered model says, in a process of its own in another folder."""
    code = """
import sys
from mlflow import pyfunc, set_tracking_uri
set_tracking_uri(sys.argv[1])
print(list(pyfunc.load_model(sys.argv[2]).predict(["who?"])), flush=True)
"""
    (root / "elsewhere").mkdir(exist_ok=True)
    process = python(root / "elsewhere", code, f"sqlite:///{root / 'mlflow.db'}", f"models:/demo@{alias}")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return printed.strip().splitlines()[-1]


def log_everything(tracker, folder):
    (folder / "notes.md").write_text("a note")
    (folder / "blob.bin").write_bytes(bytes([0, 255, 128]))
    tracker.log_params({"train": {"seed": 1, "learning_rate": 3e-5}, "long": "x" * 7000, "empty": {}})
    tracker.log_params({"many": {str(number): number for number in range(600)}})
    for step in range(5):
        tracker.log_metrics({"loss": 2.0 - step / 10, "recall@5": 0.5}, step)
    tracker.set_tags({"git.dirty": False, "long tag": "y" * 9000})
    tracker.log_text("<p>hello</p>", "reports/hello.html")
    tracker.log_file(folder / "notes.md", "files")
    tracker.log_file(folder / "blob.bin", "files")
    tracker.log_table([{"question": "who?", "em": 1}, {"question": "ä", "answers": ["b"]}], "answers.json")
    tracker.log_dataset("train", "0123456789" * 5, "data/prepared", "training", {"rows": 8})
    register(tracker, folder)
    for name in ("notes.md", "blob.bin"):
        (folder / name).unlink()


def check_everything(client, run_id, folder):
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.seed"] == "1" and run.data.params["train.learning_rate"] == "3e-05"
    assert len(run.data.params["long"]) == 6000 and len(run.data.params) == 604
    assert values(client, run_id, "loss") == [(step, 2.0 - step / 10) for step in range(5)]
    assert values(client, run_id, "recall_at_5") == [(step, 0.5) for step in range(5)]
    assert run.data.tags["git.dirty"] == "False" and len(run.data.tags["long tag"]) == 8000
    folders = ("", "reports", "files")
    artifacts = {file.path for place in folders for file in client.list_artifacts(run_id, place)}
    assert {"reports/hello.html", "files/notes.md", "files/blob.bin", "answers.json"} <= artifacts
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]
    table = client.load_table(run.info.experiment_id, "answers.json", run_ids=[run_id])
    assert list(table["question"]) == ["who?", "ä"] and table["answers"][1] == '["b"]'
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("train", "012345678901234567890123456789012345")
    assert json.loads(dataset.dataset.profile) == {"rows": 8} and dataset.tags[0].value == "training"
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.name == "step 4" and model.status == "READY" and model.tags["step"] == "4"
    assert model.params == {"top.k": "5"} and model.source_run_id == run_id
    assert [(one.key, one.value, one.step) for one in model.metrics] == [("model/validation_loss", 1.5, 0)]
    assert values(client, run_id, "model/validation_loss") == [(0, 1.5)]
    (version,) = client.search_model_versions("name = 'demo'")
    assert version.source == model.artifact_location and version.run_id == run_id
    assert client.get_model_version_by_alias("demo", "new").version == version.version
    (parts,) = folder.rglob(f"{model.model_id}/artifacts/data/parts")
    assert (parts / "model/weights.bin").read_text() == "first" and (parts / "params.yaml").read_text() == "step: 4"
    assert not list(folder.glob("*.files")), "what was sent goes away"
    assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]


# The store


def test_root_is_dvc_root_else_the_current_folder(root, monkeypatch):
    assert root_folder() == root
    inside = root / ".dvc" / "tmp" / "exps" / "tmp1"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert root_folder() == root


def test_the_store_of_a_plain_mlflow_ui(root, monkeypatch):
    from mlflow.tracking._tracking_service.utils import _get_default_tracking_uri

    ours = make_url(tracking_uri(root)).database
    assert ours == str(root / make_url(_get_default_tracking_uri()).database)


def test_mlflow_tracking_uri_wins(root, monkeypatch, migrated):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example/path")
    assert tracking_uri(root) == "https://tracking.example/path"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    shutil.copy(migrated, root / "other.db")
    with start(root) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    assert runs(local_client(root)) == []
    (run,) = runs(MlflowClient(f"sqlite:///{root / 'other.db'}"))
    assert run.data.metrics == {"loss": 1.0}


def test_artifacts_and_models_lie_at_the_root_also_from_a_temp_run(root, monkeypatch):
    inside = root / ".dvc" / "tmp" / "exps" / "tmp1"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("DVC_ROOT", str(root))
    with start(root_folder()) as tracker:
        tracker.log_text("hello", "hello.txt")
        register(tracker, inside)
    assert (root / "mlartifacts" / tracker.run_id / "artifacts" / "hello.txt").read_text() == "hello"
    monkeypatch.chdir(root)
    shutil.rmtree(inside)  # as DVC does
    (version,) = local_client(root).search_model_versions("name = 'demo'")
    assert version.run_id == tracker.run_id
    assert str(inside) not in (root / "journal.jsonl").read_text()


@pytest.mark.parametrize("name", ["a b%20ü", "müller", "50%", "a#b", "it's; a+b&c=d", "%2F", "why?"])
def test_a_root_with_special_characters(root, name, monkeypatch):
    odd = root / name
    odd.mkdir()
    shutil.move(root / "mlflow.db", odd / "mlflow.db")
    before = set(root.iterdir())
    for number in range(2):
        with start(odd) as tracker:
            tracker.log_text("hello", "hello.txt")
            if number:
                register(tracker, odd)
        assert (odd / "mlartifacts" / tracker.run_id / "artifacts" / "hello.txt").is_file()
    assert len(list((odd / "mlartifacts/models").rglob("parts/model/weights.bin"))) == 1
    assert set(root.iterdir()) == before  # no stray folder of an encoded name
    client = MlflowClient(tracking_uri(odd))
    assert len(runs(client)) == 2
    assert Path(client.download_artifacts(tracker.run_id, "hello.txt")).read_text() == "hello"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own store.db")
    shutil.copy(odd / "mlflow.db", odd / "own store.db")
    with start(odd, journal="other.jsonl"):
        pass
    assert len(runs(MlflowClient(tracking_uri(odd)))) == 3 and set(root.iterdir()) == before


LOG_BEFORE = f"""
from pathlib import Path
from stages.tracking.runs import open_run
from tests.tracking.test_runs import register
root = Path.cwd()
with open_run(root, "{EXPERIMENT}", None, None, root / ".tracking/train.jsonl", None) as tracker:
    tracker.log_text("before", "before.txt")
    register(tracker, root)
print(tracker.run_id)
"""


@pytest.mark.parametrize("copied", [False, True])
def test_a_repository_that_was_moved_or_copied_keeps_its_artifacts_with_it(root, migrated, copied, capsys):
    old, new = root / "old place", root / "new"
    old.mkdir()
    shutil.copy(migrated, old / "mlflow.db")
    before = python(old, LOG_BEFORE)  # another process: MLflow remembers a run's place as long as one lives
    run_id = before.communicate(timeout=60)[0].strip()
    elsewhere = (root / "elsewhere" / "mlartifacts").as_uri()  # of a user's own choice, not a repository's
    (root / "elsewhere" / "mlartifacts").mkdir(parents=True)
    local_client(old).create_experiment("elsewhere", elsewhere)
    shutil.copytree(old, new) if copied else old.rename(new)
    capsys.readouterr()
    same = tracking.open_run(new, EXPERIMENT, run_id, None, new / ".tracking/train.jsonl", None)
    with same:
        same.log_text("after", "after.txt")
    told = capsys.readouterr().err
    assert told.count("the repository lay in") == 1 and str(old) in told
    with start(new, journal="another.jsonl") as another:
        another.log_text("after", "after.txt")
    assert "the repository lay in" not in capsys.readouterr().err
    client = local_client(new)
    for name in ("before", "after"):
        assert Path(client.download_artifacts(run_id, f"{name}.txt")).read_text() == name
        assert (new / "mlartifacts" / run_id / "artifacts" / f"{name}.txt").is_file()
    assert (new / "mlartifacts" / another.run_id / "artifacts" / "after.txt").is_file()
    (model,) = client.search_logged_models([runs(client)[0].info.experiment_id])
    assert model.artifact_location.startswith((new / "mlartifacts").as_uri())
    (version,) = client.search_model_versions("name = 'demo'")
    assert version.source == model.artifact_location
    assert client.get_model_version_download_uri("demo", version.version) == model.artifact_location
    assert client.get_experiment_by_name("elsewhere").artifact_location == elsewhere
    assert old.exists() == copied and not list(root.glob("old*/**/after.txt"))


def test_records_that_moved_with_the_repository_are_sent_to_where_it_lies(root, migrated, capsys):
    old, new = root / "old", root / "new"
    old.mkdir()
    shutil.copy(migrated, old / "mlflow.db")
    with start(old, journal=".tracking/train.jsonl") as tracker:
        tracker.log_metrics({"loss": 2.0}, 1)
    Journal(old / ".tracking/train.jsonl").append(record("metrics", values={"loss": 1.0}, step=2))
    old.rename(new)
    assert send([str(new / ".tracking/train.jsonl")]) == 0
    assert values(local_client(new), tracker.run_id, "loss") == [(1, 2.0), (2, 1.0)] and not old.exists()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "oops://server"])
def test_a_store_that_mlflow_will_never_take_is_said_at_once(root, uri, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with start(root) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        assert not tracker.flush()
    lines = capsys.readouterr().err.splitlines()
    assert f"MLFLOW_TRACKING_URI: {uri} is " in lines[0] and "sqlite:///mlflow.db, or unset it" in lines[0]
    assert len(lines) == 2 and "records are unsent" in lines[1]  # nothing about a server that does not answer
    assert time.monotonic() - started < 20


# One run


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


# Reopening


def test_a_killed_training_goes_on_in_its_run(root):
    code = """
import os, signal, sys
from pathlib import Path
from stages.tracking import runs as tracking
tracker = tracking.open_run(Path.cwd(), "demo", None, None, Path("journal.jsonl"))
tracker.log_metrics({"loss": 2.0}, 1)
assert tracker.flush(60)
print(tracker.run_id, flush=True)
tracker.log_metrics({"loss": 1.5}, 2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = python(root, code)
    run_id, _ = process.communicate(timeout=120)
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
    assert again.flush() and again.run_id == tracker.run_id
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


# The journal


@pytest.mark.timeout(60)
def test_server_down_then_sent_exactly_once(root, monkeypatch, capsys):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    tracker = start(root)
    log_everything(tracker, root)
    assert tracker.run_id is None and not tracker.flush(0)
    tracker.close(timeout=10)
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


@pytest.mark.timeout(60)
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
        assert tracker.flush()
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


# The environment


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


# Several processes, and a real server


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
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert outputs == [("", "")] * 4  # nor does MLflow chat about its migrations
    found = runs(local_client(root))
    assert sorted(run.data.metrics["loss"] for run in found) == [0, 1, 2, 3]
    assert {run.info.status for run in found} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.05, 0.2, 0.4])
def test_killed_while_it_makes_the_store(root, pause):
    """MLflow's migrations are many statements; SQLite keeps those that were done."""
    while True:
        for left in [root / "mlflow.db", *root.glob("1.*")]:
            left.unlink(missing_ok=True)
        process = python(root, RUN, "1")
        while not list(root.glob("mlflow.db.unfinished")):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(pause)
        finished = (root / "mlflow.db").exists()
        process.kill()
        process.communicate()
        if not finished:
            break
        pause /= 2  # a machine that is faster than that
    again = python(root, RUN, "1")
    assert again.communicate(timeout=300) == ("", "") and again.returncode == 0
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
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                return process
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        raise AssertionError((folder / "log").read_text())

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
        assert tracker.flush(60) and tracker.run_id
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for step in range(1, 50):
            tracker.log_metrics({"loss": float(step)}, step)
        assert not tracker.flush(4)
        (root / "server" / "mlflow.db").rename(root / "mlflow.db")
        server(port)
        assert tracker.flush(90)
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
    assert tracker.flush(60)
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
    for _ in range(100):  # the sending thread of a process that would have ended by now
        if not tracker._thread.is_alive():
            break
        time.sleep(0.2)
    assert send([str(root / "journal.jsonl")]) == 0
    client = MlflowClient(f"http://127.0.0.1:{port}")
    assert values(client, tracker.run_id, "loss") == [(step, float(step)) for step in range(200)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_store_that_can_be_read_but_not_written_loses_no_record(root):
    """Another connection's write lock does what a full or read-only disk does: reads answer, writes fail."""
    import sqlite3

    tracker = start(root)
    assert tracker.flush(30)
    other = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert not tracker._run.is_well()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"loss": 2.0}, 2)
    assert not tracker.flush(8)
    other.execute("ROLLBACK")
    other.close()
    assert tracker.flush(60) and tracker._run.is_well()
    tracker.close()
    assert values(local_client(root), tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.timeout(60)
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


# Models and evaluations


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
from tests.tracking.test_runs import register
tracker = tracking.open_run(Path.cwd(), "demo", None, None, Path("journal.jsonl"), None)
register(tracker, Path.cwd())
assert tracker.flush(60)
print(tracker.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = python(root, code, str(CODE))
    run_id = process.communicate(timeout=120)[0].strip()
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
