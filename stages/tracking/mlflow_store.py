"""Where MLflow keeps its runs, and a client of it. Imported before any other part of mlflow.

The store is $MLFLOW_TRACKING_URI, else `mlflow.db` and `mlartifacts/` in the real repository root, where a
plain `mlflow ui` finds them. `dvc exp run --temp` and `--queue` work in <root>/.dvc/tmp/exps/<random>, a copy
that is deleted afterwards; DVC sets $DVC_ROOT to the real root there (dvc/repo/experiments/queue/base.py), as
it does everywhere else (dvc/stage/run.py), so runtime.root_folder() trusts it.
"""

import logging
import os
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock
from sqlalchemy.engine import make_url

# Before the import, which reads some of them. The sending thread retries; HTTP retries would delay close().
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402

if "MLFLOW_LOGGING_LEVEL" not in os.environ:  # what goes wrong is said by us, once and in one line
    for _name in ("mlflow", "alembic"):
        logging.getLogger(_name).setLevel(logging.CRITICAL)


def tracking_uri(root: Path) -> str:
    """$MLFLOW_TRACKING_URI, else SQLite at the root. A relative sqlite:/// path counts from the root too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = _sqlite_file(uri)
    if file is None:
        return uri
    # Through SQLAlchemy, whose versions differ in how they read a % in the path.
    return make_url(uri).set(database=str(Path(root).resolve() / file)).render_as_string(hide_password=False)


def _sqlite_file(uri: str) -> Path | None:
    file = make_url(uri).database if uri.startswith("sqlite:///") else None
    return Path(file) if file and file != ":memory:" else None


def _make_store(uri: str, file: Path) -> None:
    """A new SQLite store, there whole or not at all: one whose migrations were killed half-way never opens again."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    for left in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(make_url(uri).set(database=str(unfinished)).render_as_string(hide_password=False))
    os.replace(unfinished, file)


def client_of(uri: str) -> MlflowClient:
    """A client of the store `uri`, which is made where it is an SQLite file that is not there."""
    file = _sqlite_file(uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that migrate one fresh SQLite file at the same time break each other.
    with FileLock(f"{file}.lock", timeout=120) if file else nullcontext():
        if file and not file.exists():
            _make_store(uri, file)
        return MlflowClient(uri)
