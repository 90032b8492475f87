"""A store for each test of tracking."""

import shutil

import pytest

from stages.tracking.mlflow_store import MlflowClient
from stages.tracking.recorder import Tracker


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
    # A loaded machine takes longer than a stage would wait.
    monkeypatch.setattr(Tracker.close, "__defaults__", ("FINISHED", 600.0))
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path
