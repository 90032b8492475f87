"""Where MLflow keeps its runs, and a client of it. Imported before any other part of mlflow.

The store is $MLFLOW_TRACKING_URI, else `mlflow.db` and `mlartifacts/` in the real repository root, where a
plain `mlflow ui` finds them. `dvc exp run --temp` and `--queue` work in <root>/.dvc/tmp/exps/<random>, a copy
that is deleted afterwards; DVC sets $DVC_ROOT to the real root there (dvc/repo/experiments/queue/base.py), as
it does everywhere else (dvc/stage/run.py), so runtime.root_folder() trusts it.

SQLAlchemy writes and reads paths in a URL percent-encoded or not, by its version. MLflow makes the folder of an SQLite URL
as that is written, encoded; not where the URL names the driver too, so ours do. The places of artifacts are absolute URLs
in the store.
"""

import logging
import os
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock
from sqlalchemy.engine import make_url

from stages.tracking.journal import say, without_credentials
from stages.tracking.sending import REFUSALS, Unusable

# Before the import, which reads some of them. The sending thread retries; HTTP retries would delay close().
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # a model's requirements are ours, not those of a uv.lock that lies about
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

SQLITE, ARTIFACTS = "sqlite+pysqlite", "mlartifacts"
WITH_PLACES = (
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"),
    ("model_versions", "source"), ("model_versions", "storage_location"),
)  # fmt: skip

if "MLFLOW_LOGGING_LEVEL" not in os.environ:  # what goes wrong is said by us, once and in one line
    for _name in ("mlflow", "alembic"):
        logging.getLogger(_name).setLevel(logging.CRITICAL)


def tracking_uri(root: Path) -> str:
    """$MLFLOW_TRACKING_URI, else SQLite at the root. A relative sqlite:/// path counts from the root too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = _sqlite_file(uri)
    return uri if file is None else _at(uri, Path(root).resolve() / file)


def uri_after_move(uri: str, old: Path, new: Path) -> str:
    """The same store where the repository `old` lies at `new` by now; one that lies elsewhere stays what it is."""
    file = _sqlite_file(uri)
    return _at(uri, new / file.relative_to(old)) if file and file.is_relative_to(old) else uri


def artifacts_of(root: Path) -> str:
    """Where experiments of a local store keep their artifacts, as a URL."""
    return (root / ARTIFACTS).as_uri()


def _sqlite_file(uri: str) -> Path | None:
    file = make_url(uri).database if uri.startswith(("sqlite:///", f"{SQLITE}:///")) else None
    return Path(file) if file and file != ":memory:" else None


def _at(uri: str, file: Path) -> str:
    return make_url(uri).set(drivername=SQLITE, database=str(file)).render_as_string(hide_password=False)


def _make_store(uri: str, file: Path) -> None:
    """A new SQLite store, there whole or not at all: one whose migrations were killed half-way never opens again."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    for left in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(_at(uri, unfinished))
    os.replace(unfinished, file)


def client_of(uri: str, root: Path) -> MlflowClient:
    """A client of the store `uri`, which is made where it is an SQLite file that is not there.

    root: the repository; of a store within it, the artifacts are within it too. Raises Unusable where MLflow will never
    take the URI.
    """
    file = _sqlite_file(uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that migrate one fresh SQLite file at the same time break each other.
    with FileLock(f"{file}.lock", timeout=120) if file else nullcontext():
        if file and not file.exists():
            _make_store(uri, file)
        try:
            client = MlflowClient(uri)
        except ModuleNotFoundError as error:
            raise Unusable(f"MLFLOW_TRACKING_URI: {without_credentials(uri)} needs a package: {error}") from None
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            folder = "://" not in uri or uri.startswith("file:")
            why = "a folder, where MLflow keeps no runs any more" if folder else "no store that MLflow knows"
            raise Unusable(
                f"MLFLOW_TRACKING_URI: {without_credentials(uri)} is {why}; give a server's address or sqlite:///mlflow.db, or "
                "unset it"
            ) from None
        if file and file.is_relative_to(root):
            _follow_the_repository(file, root)
        return client


def _follow_the_repository(file: Path, root: Path) -> None:
    """Artifacts of a repository that was moved or copied: their places in the store become those at its root of today.

    MLflow has no call for it, and would go on writing to the old place. That is what a place is taken for whose folder is
    gone, or lies beside another repository's store.
    """
    here = artifacts_of(root)
    with closing(sqlite3.connect(file, timeout=60)) as store:
        found = store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (there,) in found:
            old = Path(url2pathname(urlsplit(there or "").path))
            ours = there != here and (there or "").startswith("file:///") and old.name == ARTIFACTS
            if not ours or (old.exists() and not (old.parent / file.name).exists()):
                continue
            with store:  # one transaction
                for table, column in WITH_PLACES:
                    store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, len(there) + 1, there, len(there) + 1, f"{there}/"),
                    )
            say(f"the repository lay in {old.parent}: {file} now names the artifacts in {root / ARTIFACTS}")
