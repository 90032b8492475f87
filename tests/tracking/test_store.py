"""Where MLflow keeps its runs: at the root, whatever that is called and wherever it goes."""

import shutil
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from stages.machine.entry import root_folder
from stages.tracking import runs as tracking
from stages.tracking.__main__ import main as send
from stages.tracking.journal import Journal
from stages.tracking.mlflow_store import MlflowClient, tracking_uri
from stages.tracking.records import record
from tests.tracking.stores import (
    EXPERIMENT,
    local_client,
    python,
    register,
    runs,
    start,
    values,
)


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
from tests.tracking.stores import register
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
    run_id = before.communicate()[0].strip()
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
    with start(root) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        assert not tracker.flush()
    lines = capsys.readouterr().err.splitlines()
    assert f"MLFLOW_TRACKING_URI: {uri} is " in lines[0] and "sqlite:///mlflow.db, or unset it" in lines[0]
    assert len(lines) == 2 and "records are unsent" in lines[1]  # nothing about a server that does not answer
