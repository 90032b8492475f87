"""MLflow tracking that cannot stop a training. The only module that imports mlflow.

Every log_* call of a Tracker writes a record into the run's journal and returns; a thread sends the journal
to MLflow and tries again for as long as the server is away (stages/recording.py). What is still unsent when
the process ends is sent by `python -m stages.tracking JOURNAL`, which may be run any number of times.

The store is $MLFLOW_TRACKING_URI, else `mlflow.db` and `mlartifacts/` in the real repository root, where a
plain `mlflow ui` finds them. `dvc exp run --temp` and `--queue` work in <root>/.dvc/tmp/exps/<random>, a copy
that is deleted afterwards; DVC sets $DVC_ROOT to the real root there (dvc/repo/experiments/queue/base.py), as
it does everywhere else (dvc/stage/run.py), so runtime.root_folder() trusts it.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import uuid
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

from mlflow import MlflowClient, entities  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor  # noqa: E402
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor  # noqa: E402
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor  # noqa: E402
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor  # noqa: E402

from stages.journal import Journal, record, say, without_credentials  # noqa: E402
from stages.recording import REFUSALS, Sender, Tracker, environment_tags, reason  # noqa: E402

__all__ = ["Tracker", "environment_tags", "open_run", "tracking_uri"]

if "MLFLOW_LOGGING_LEVEL" not in os.environ:  # what goes wrong is said by us, once and in one line
    for _name in ("mlflow", "alembic"):
        logging.getLogger(_name).setLevel(logging.CRITICAL)

SESSION_TAG = "tracking.session"  # finds a run again whose creation was answered after our time-out


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


def open_run(
    root: Path,
    experiment: str,
    run_id: str | None,
    run_name: str | None,
    journal: Path,
    system_metrics_seconds: float | None = 10.0,
    same_run: bool = False,
) -> Tracker:
    """Starts a run, or goes on in one, and returns at once, whether MLflow answers or not.

    run_id: the run to reopen; it is RUNNING again until closed. Where it is gone, a new run takes its place,
    with a warning. None: the journal's own run, unless that one FINISHED (so that a killed training goes on
    in its run), else a new one.
    journal: a file of this training alone that outlives the process, so not in the folder of a DVC temp run.
    same_run: with run_id None, the journal's own run also where it FINISHED.
    system_metrics_seconds: how often CPU, memory, disk, network and NVIDIA GPUs are sampled; None: never.
    """
    opened = Journal(journal)
    if not opened.lock(timeout=3):
        path = Path(journal)
        path = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
        say(f"another process is sending {journal}; this one writes {path}")
        opened = Journal(path)
        opened.lock(timeout=3)
    root = Path(root).resolve()
    opening = record(
        "open",
        session=uuid.uuid4().hex,
        experiment=experiment,
        run_id=run_id,
        run_name=run_name,
        same_run=same_run,
        root=str(root),
        uri=without_credentials(tracking_uri(root)),
    )
    collectors = (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor)
    return Tracker(opened, MlflowRun(opened.state), opening, collectors, system_metrics_seconds)


class MlflowRun:
    """The run that a journal's records go to. Any call can be made twice without a change.

    state: the journal's; it remembers run_id, finished, system_step, root and uri between processes.
    sessions: the run's id for each opening that MLflow has answered.
    strict: raise, rather than let every record be refused, where MLflow does not know the journal's run.
    """

    def __init__(self, state: dict, strict: bool = False):
        self.state, self.strict = state, strict
        self.sessions: dict[str, str] = {}
        self.is_open = False
        self._client: MlflowClient | None = None

    def is_well(self) -> bool:
        """Whether MLflow takes something small: a store on a full disk can still be read."""
        try:
            self._client.set_tag(self.state["run_id"], "tracking.alive", str(time.time()))
        except Exception:
            return False
        return True

    def send(self, entries: list[dict]) -> None:
        """One record, or several of the kinds metrics and system. Raises what MLflow raises."""
        kind = entries[0].get("kind")
        if kind == "open":
            return self._open(entries[0])
        if not self.is_open:
            self._return()
        if kind in ("metrics", "system"):
            return self._metrics(entries)
        calls = {
            "params": self._params,
            "tags": self._tags,
            "text": self._text,
            "file": self._file,
            "table": self._table,
            "dataset": self._dataset,
            "checkpoint": self._checkpoint,
            "close": self._close,
        }
        if kind in calls:  # a torn line has none
            calls[kind](self.state["run_id"], entries[0])

    def _connect(self, root: str, uri: str) -> None:
        self.is_open = False
        if os.environ.get("MLFLOW_TRACKING_URI"):
            uri = tracking_uri(Path(root))
        file = _sqlite_file(uri)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that migrate one fresh SQLite file at the same time break each other.
        with FileLock(f"{file}.lock", timeout=120) if file else nullcontext():
            if file and not file.exists():
                _make_store(uri, file)
            self._client = MlflowClient(uri)
        self.state |= {"root": root, "uri": without_credentials(uri)}

    def _open(self, entry: dict) -> None:
        self._connect(entry["root"], entry["uri"])
        experiment_id = self._experiment(entry)
        anew = self.state.get("finished") and not entry.get("same_run")
        wanted = entry["run_id"] or (None if anew else self.state.get("run_id"))
        run = self._existing(wanted) if wanted else None
        if wanted and run is None:
            say(f"run {wanted} is no longer in MLflow; a new run takes its place")
        if run is None:
            same = f"tags.`{SESSION_TAG}` = '{entry['session']}'"
            run = next(iter(self._client.search_runs([experiment_id], same, max_results=1)), None)
        if run is None:
            tags = {SESSION_TAG: entry["session"]}
            run = self._client.create_run(experiment_id, entry["time"], tags, entry["run_name"])
        elif run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, "RUNNING")
        # System metrics count their own steps and go on behind the last one that the run has.
        steps = [metric.step for metric in run.data._metric_objs if metric.key.startswith("system/")]
        self.state |= {
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
            "system_step": max(steps, default=-1) + 1,
            "finished": False,
        }
        self.sessions[entry["session"]] = run.info.run_id
        self.is_open = True

    def _return(self) -> None:
        """To the run of a journal whose first part another process has sent."""
        if "run_id" not in self.state:
            raise ValueError("the journal does not begin with the opening of a run")
        self._connect(self.state["root"], self.state["uri"])
        if self._existing(self.state["run_id"]) is None and self.strict:
            raise ValueError(
                f"{self.state['uri']} does not know run {self.state['run_id']}; "
                "set MLFLOW_TRACKING_URI to the store where the training began"
            )
        self.is_open = True

    def _existing(self, run_id: str) -> entities.Run | None:
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, entry: dict) -> str:
        """The experiment's id. A new one has its artifacts at the root, unless a server decides where."""
        found = self._client.get_experiment_by_name(entry["experiment"])
        if found is None:
            remote = re.match("https?:|databricks", self.state["uri"])
            location = None if remote else (Path(entry["root"]) / "mlartifacts").as_uri()
            try:
                return self._client.create_experiment(entry["experiment"], location)
            except MlflowException:
                found = self._client.get_experiment_by_name(entry["experiment"])  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _metrics(self, entries: list[dict]) -> None:
        batch, system_step = [], self.state.get("system_step", 0)
        for entry in entries:
            step = entry["step"]
            if step is None:
                step, system_step = system_step, system_step + 1
            for name, value in entry["values"].items():
                batch.append(entities.Metric(name, float(value), entry["time"], step))
        for start in range(0, len(batch), 1000):
            self._client.log_batch(self.state["run_id"], metrics=batch[start : start + 1000])
        self.state["system_step"] = system_step

    def _params(self, run_id: str, entry: dict) -> None:
        params = [entities.Param(name, value) for name, value in entry["values"].items()]
        for start in range(0, len(params), 100):
            chunk = params[start : start + 100]
            try:
                self._client.log_batch(run_id, params=chunk)
            except MlflowException as error:  # another value than the run has, or too much for one request
                if error.error_code not in REFUSALS:
                    raise
                logged = self._client.get_run(run_id).data.params
                for param in chunk:
                    if logged.get(param.key, param.value) == param.value:
                        self._client.log_batch(run_id, params=[param])
                    else:
                        self._client.set_tag(run_id, f"changed.{param.key}"[:250], param.value)

    def _tags(self, run_id: str, entry: dict) -> None:
        tags = [entities.RunTag(name, value) for name, value in entry["values"].items()]
        for start in range(0, len(tags), 100):
            self._client.log_batch(run_id, tags=tags[start : start + 100])

    def _text(self, run_id: str, entry: dict) -> None:
        self._client.log_text(run_id, entry["text"], entry["file"])

    def _file(self, run_id: str, entry: dict) -> None:
        log = self._client.log_artifacts if os.path.isdir(entry["path"]) else self._client.log_artifact
        log(run_id, entry["path"], entry["artifact_path"])

    def _table(self, run_id: str, entry: dict) -> None:
        """As MlflowClient.log_table, which would add the rows to those of an earlier attempt."""
        self._text(run_id, entry)
        tables = json.loads(self._client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        table = {"path": entry["file"], "type": "table"}
        if table not in tables:
            self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*tables, table]))

    def _dataset(self, run_id: str, entry: dict) -> None:
        fields = ("name", "digest", "source_type", "source", "profile")
        dataset = entities.Dataset(**{field: entry[field] for field in fields})
        context = entities.InputTag("mlflow.data.context", entry["context"])
        self._client.log_inputs(run_id, [entities.DatasetInput(dataset, [context])])

    def _checkpoint(self, run_id: str, entry: dict) -> None:
        name, step = entry["name"], entry["step"]
        experiment_id = self.state["experiment_id"]
        same = f"name = '{name}' AND source_run_id = '{run_id}'"
        models = self._client.search_logged_models([experiment_id], same)
        model = next((one for one in models if one.tags.get("step") == str(step)), None)
        if model is None:
            tags = {"path": entry["path"], "step": str(step)}
            model = self._client.create_logged_model(
                experiment_id, name, run_id, tags, entry["params"], model_type="checkpoint"
            )
        self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(run_id).outputs
        if model.model_id not in [one.model_id for one in (outputs.model_outputs if outputs else [])]:
            self._client.log_outputs(run_id, [entities.LoggedModelOutput(model.model_id, step)])
        of_model = {"model_id": model.model_id, "run_id": run_id}
        metrics = [
            entities.Metric(key, float(value), entry["time"], step, **of_model)
            for key, value in entry["values"].items()
        ]
        if metrics:
            self._client.log_batch(run_id, metrics=metrics)

    def _close(self, run_id: str, entry: dict) -> None:
        self._client.set_terminated(run_id, entry["status"], entry["time"])
        self.state["finished"] = entry["status"] == "FINISHED"


def main(arguments: list[str] | None = None) -> int:
    """Sends what is unsent of a journal. Exit code 0: MLflow has everything; 1: it has not."""
    parser = argparse.ArgumentParser(prog="python -m stages.tracking", description=main.__doc__)
    parser.add_argument("journal", type=Path, help="the file that the training's last line named")
    path = parser.parse_args(arguments).journal
    if not path.is_file():
        say(f"there is no journal {path}")
        return 1
    journal = Journal(path)
    if not journal.lock(timeout=1):
        say(f"a running process is sending {path} already")
        return 1
    sender = Sender(journal, MlflowRun(journal.state, strict=True))
    try:
        for pause in (0.5, 1.5, 0):
            try:
                while sender.send_next():
                    pass
            except Exception as error:
                trouble = reason(error)
                time.sleep(pause)
            else:
                say(f"{sender.sent} records sent ({sender.refused} refused); nothing is left in {path}")
                return 0
        say(f"{journal.unsent()} records stay in {path}: {trouble}")
        return 1
    finally:
        journal.release()


if __name__ == "__main__":
    sys.exit(main())
