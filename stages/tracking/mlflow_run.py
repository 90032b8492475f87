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

from stages.tracking.journal import say, without_credentials
from stages.tracking.recorder import REFUSALS

SESSION_TAG = "tracking.session"  # finds a run again whose creation was answered after our time-out


class MlflowRun:
    """The run that a journal's records go to. Any call can be made twice without a change.

    state: the journal's; it remembers run_id, finished, system_step, root and uri between processes.
    root: the repository as it lies today; a journal that was moved with it names another. None: as the journal says.
    sessions: the run's id for each opening that MLflow has answered.
    strict: raise, rather than let every record be refused, where MLflow does not know the journal's run.
    """

    def __init__(self, state: dict, strict: bool = False, root: Path | None = None):
        self.state, self.strict, self.root = state, strict, root
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
            location = None if remote else artifacts_of(Path(self.state["root"]))
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
