"""The run that a journal's records go to: what each record is to MLflow."""

import json
import os
import re
import time
from pathlib import Path

# First: mlflow reads from the environment what this sets.
from stages.tracking.mlflow_store import MlflowClient, artifacts_of, client_of, tracking_uri, uri_after_move  # isort: skip
from mlflow import entities
from mlflow.exceptions import MlflowException

from stages.tracking import registry
from stages.tracking.journal import say, without_credentials
from stages.tracking.sending import REFUSALS
from stages.tracking.snapshots import Snapshots

SESSION_TAG = "tracking.session"  # finds a run again whose creation was answered after our time-out
REPLACES_TAG = "tracking.replaces"  # the run of another store whose place a run has taken
NOTE_TAG = "mlflow.note.content"  # what MLflow shows as a run's description


class MlflowRun:
    """The run that a journal's records go to. Any call can be made twice without a change.

    state: the journal's; it remembers run_id, finished, adds, system_step, root and uri between processes.
    snapshots: the journal's.
    root: the repository as it lies today; a journal that was moved with it names another. None: as the journal says.
    sessions: the run's id for each opening that MLflow has answered.
    strict: raise, rather than let every record be refused, where MLflow does not know the journal's run.
    """

    def __init__(self, state: dict, snapshots: Snapshots, strict: bool = False, root: Path | None = None):
        self.state, self.snapshots, self.strict, self.root = state, snapshots, strict, root
        self.sessions: dict[str, str] = {}
        self.is_open = self.is_uploading = False
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
            "scores": self._scores,
            "params": self._params,
            "tags": self._tags,
            "text": self._text,
            "file": self._file,
            "table": self._table,
            "dataset": self._dataset,
            "model": self._model,
            "child": self._child,
            "description": self._description,
            "close": self._close,
        }
        if kind in calls:  # a torn line has none
            calls[kind](self.state["run_id"], entries[0])

    def _connect(self, root: str, uri: str) -> None:
        self.is_open = False
        now = self.root or Path(root)
        uri = tracking_uri(now) if os.environ.get("MLFLOW_TRACKING_URI") else uri_after_move(uri, Path(root), now)
        self._client = client_of(uri, now)
        self.state |= {"root": str(now), "uri": without_credentials(uri)}

    def _open(self, entry: dict) -> None:
        self._connect(entry["root"], entry["uri"])
        experiment_id = self._experiment(entry)
        anew = self.state.get("finished") and not entry.get("same_run")
        wanted = entry["run_id"] or (None if anew else self.state.get("run_id"))
        run = self._existing(wanted) if wanted else None
        found_by = f"tags.`{SESSION_TAG}` = '{entry['session']}'"
        if wanted and run is None:
            replacing = f"tags.`{REPLACES_TAG}` = '{wanted}'"
            run = next(iter(self._client.search_runs([experiment_id], replacing, max_results=1)), None)
            if run is None:
                say(f"run {wanted} is not in this MLflow (made elsewhere, or deleted); a new run takes its place")
        if run is None:
            run = next(iter(self._client.search_runs([experiment_id], found_by, max_results=1)), None)
        if run is None:
            tags = {SESSION_TAG: entry["session"], **({REPLACES_TAG: wanted} if wanted else {})}
            known = entry.get("history") or {}
            run = self._client.create_run(experiment_id, entry["time"], tags, entry["run_name"] or known.get("name"))
            self._remember(run.info.run_id, entry["time"], known)
        # What is added to a finished run leaves its duration as it was.
        adds = bool(entry.get("same_run")) and run.info.status == "FINISHED"
        status = None if adds or run.info.status == "RUNNING" else "RUNNING"
        # A resumed training may belong to another experiment of DVC; a name that somebody gave by hand stays.
        name = entry["run_name"] if "name" in self.state and entry["run_name"] != self.state["name"] else None
        if status or name:
            self._client.update_run(run.info.run_id, status, name)
        # System metrics count their own steps and go on behind the last one that the run has.
        steps = [metric.step for metric in run.data._metric_objs if metric.key.startswith("system/")]
        self.state |= {
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
            "system_step": max(steps, default=-1) + 1,
            "finished": False,
            "adds": adds,
            **({"name": entry["run_name"]} if entry["run_name"] else {}),
        }
        self.sessions[entry["session"]] = run.info.run_id
        self.is_open = True

    def _remember(self, run_id: str, time: int, known: dict) -> None:
        """What is known of a run that a new one replaces, so that the new one is not empty."""
        self._params(run_id, {"values": known.get("params", {})})
        metrics = [entities.Metric(name, value, time, 0) for name, value in known.get("metrics", {}).items()]
        if metrics:
            self._client.log_batch(run_id, metrics=metrics)

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
            location = None if remote else artifacts_of(Path(self.state["root"]))
            try:
                # Where MLflow's pages open: on training, not on traces of language models.
                tags = {"mlflow.experimentKind": "custom_model_development"}
                return self._client.create_experiment(entry["experiment"], location, tags)
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

    def _scores(self, run_id: str, entry: dict) -> None:
        """What is measured once: not a second time where the same comes out again, after a kill for instance."""
        run = self._client.get_run(run_id)
        made = run.outputs.model_outputs if run.outputs and entry.get("of_model") else []
        model = self._client.get_logged_model(made[-1].model_id) if made else None
        registry.log_once(self._client, run, model, entry)

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
        path = self.snapshots.path(entry["snapshot"]) / entry["name"]
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(run_id, str(path), entry["artifact_path"])

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

    def _model(self, run_id: str, entry: dict) -> None:
        self.is_uploading = True
        try:
            snapshot = self.snapshots.path(entry["snapshot"])
            registry.register(self._client, self.state["experiment_id"], run_id, entry, snapshot)
        finally:
            self.is_uploading = False

    def _child(self, run_id: str, entry: dict) -> None:
        same = f"tags.`{SESSION_TAG}` = '{entry['session']}' and tags.`mlflow.parentRunId` = '{run_id}'"
        child = next(iter(self._client.search_runs([self.state["experiment_id"]], same, max_results=1)), None)
        if child is None:
            tags = {SESSION_TAG: entry["session"], "mlflow.parentRunId": run_id}
            child = self._client.create_run(self.state["experiment_id"], entry["started"], tags, entry["name"])
        if child.info.status == "FINISHED":
            return
        child_id = child.info.run_id
        self._params(child_id, {"values": entry["params"]})
        self._client.log_batch(
            child_id, [entities.Metric(name, float(value), entry["time"], 0) for name, value in entry["values"].items()]
        )
        self._tags(child_id, {"values": entry["tags"]})
        for file, text in entry["texts"].items():
            self._text(child_id, {"text": text, "file": file})
        self._client.set_terminated(child_id, "FINISHED", entry["time"])

    def _description(self, run_id: str, entry: dict) -> None:
        self._client.set_tag(run_id, NOTE_TAG, entry["text"])
        for version in registry.versions_of(self._client, run_id):
            self._client.update_model_version(version.name, version.version, entry["text"])

    def _close(self, run_id: str, entry: dict) -> None:
        if not self.state.get("adds"):
            self._client.set_terminated(run_id, entry["status"], entry["time"])
        self.state["finished"] = entry["status"] == "FINISHED" or bool(self.state.get("adds"))
