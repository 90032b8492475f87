"""Recording a run without ever waiting for MLflow: the Tracker that a stage holds, and the thread behind it.

Nothing here imports mlflow; stages/tracking/runs.py opens a Tracker, stages/tracking/mlflow_run.py makes the calls.
"""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.tracking import records
from stages.tracking.journal import Journal, say
from stages.tracking.records import record
from stages.tracking.sending import Sender, Unusable, reason


def environment_tags(root: Path) -> dict[str, str]:
    """Which code, which experiment, which machine: tags for the run.

    root: the folder whose code runs. In a DVC temp run that is the current folder (the snapshot), not
    root_folder(). Git's tags are left out outside of a repository, the branch also on a detached HEAD, which
    `dvc exp run` makes; DVC's outside of DVC.
    """

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    tags = {
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "mlflow.source.git.branch": git("symbolic-ref", "--short", "--quiet", "HEAD"),
        "git.dirty": None if changes is None else str(bool(changes)).lower(),
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME"),
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
        "dvc.stage": os.environ.get("DVC_STAGE"),
        "python": platform.python_version(),
        "cpu_count": str(os.cpu_count()),
    }
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            tags[package] = version(package)
    return {name: value for name, value in tags.items() if value}


class Tracker:
    """An open run, made by tracking.open_run. No method raises, and only flush and close wait.

    As a context manager it closes the run: FINISHED, KILLED (KeyboardInterrupt) or FAILED (other exceptions).
    For one process: the main one of a distributed training.
    """

    def __init__(
        self,
        journal: Journal,
        run,
        opening: dict,
        collectors: Sequence[type] = (),
        system_metrics_seconds: float | None = None,
    ):
        self.journal, self._run, self._opening = journal, run, opening
        self._news, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._warned: set[str] = set()
        self._put(opening)
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()
        if system_metrics_seconds:
            arguments = (collectors, system_metrics_seconds)
            threading.Thread(target=self._sample, args=arguments, name="system-metrics", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run: the one given to open_run, or None, until the server has answered."""
        return self._run.sessions.get(self._opening["session"], self._opening["run_id"])

    def log_params(self, params: Mapping) -> None:
        """Nested params, under dotted names. MLflow forbids to change a param that the run has already:
        another value becomes the tag `changed.NAME`."""
        self._put(lambda: records.params_records(params))

    def log_metrics(self, metrics: Mapping, step: int | None = None, of_model: bool = False) -> None:
        """Numbers at an optimizer step: what float() takes, NaN too; the rest is left out with a warning.

        step: None for what is measured once. of_model: the numbers are the run's model's too."""

        def build():
            entry, rejected = records.metrics_record("scores" if step is None else "metrics", metrics, step or 0)
            if rejected:
                self._warn(f"no number, so no metric: {', '.join(rejected)}")
            return {**entry, "of_model": True} if of_model else entry

        self._put(build)

    def set_tags(self, tags: Mapping) -> None:
        self._put(lambda: records.tags_record(tags))

    def log_text(self, text: str, artifact_file: str) -> None:
        self._put(lambda: record("text", text=str(text), file=records.clean_path(artifact_file)))

    def log_file(self, path: Path, artifact_path: str | None = None) -> None:
        """A file or folder as an artifact, as it is now."""
        self._put(lambda: records.file_record(path, artifact_path, self.journal.snapshots))

    def log_table(self, rows: list[dict], artifact_file: str) -> None:
        """Rows as a JSON table that MLflow's evaluation view shows; replaces an earlier one of that name."""
        self._put(lambda: records.table_record(rows, artifact_file))

    def log_dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping) -> None:
        """A data set: its digest (36 characters of it), where it lies, e.g. {"rows": 8}. No data is sent."""
        self._put(lambda: records.dataset_record(name, digest, source, context, profile))

    def log_child(
        self, key: str, name: str, started: float, params: Mapping, metrics: Mapping, tags: Mapping,
        texts: Mapping[str, str],
    ) -> None:  # fmt: skip
        """A finished run below this one, e.g. an evaluation with its own parameters. started: seconds since 1970.

        key: of two with the same key below one run the first alone is kept: a command that is repeated after a kill.

        texts: {artifact file: content}."""
        self._put(lambda: records.child_record(key, name, started, params, metrics, tags, texts))

    def describe(self, text: str) -> None:
        """Markdown that MLflow shows as the description of the run and of the models that it has registered."""
        self._put(lambda: record("description", text=str(text)[: records.TAG_LIMIT]))

    def register_model(
        self, name: str, linked: Mapping[str, Path], copied: Mapping[str, Path], code: Path, loader: str, example: list,
        step: int, metrics: Mapping, params: Mapping, registered: str, alias: str, about: str, description: str,
    ) -> None:  # fmt: skip
        """A trained model that `mlflow.pyfunc.load_model("models:/REGISTERED@ALIAS")` loads, with its files as they are now.

        linked, copied: files and folders by the names under which the loader finds them; hardlinks, where the disk allows
        it, of what is only ever replaced, copies of what somebody may write into. code: a package, copied, that holds the
        module `loader`, whose `_load_pyfunc(folder of the data)` returns an object with `predict`. metrics go to the
        model and, as MLflow does it, to the run too. Same name and step: the same model, registered once. The alias
        stays with what was trained last. about, description: of the registered model and of this version.
        """

        def build():
            data = [{f"data/{place}": path for place, path in files.items()} for files in (linked, copied)]
            snapshot = self.journal.snapshots.take(data[0], {**data[1], f"code/{code.name}": code})
            return records.model_record(
                name, snapshot, loader, example, step, metrics, params, registered, alias, about, description
            )

        self._put(build)

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until MLflow has everything so far, at most `timeout` seconds. False: something is unsent."""
        deadline = time.monotonic() + timeout
        while self.journal.unsent():
            if time.monotonic() > deadline or not self._thread.is_alive():
                return False
            time.sleep(0.05)
        return True

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """Ends the run as FINISHED, FAILED or KILLED. Waits at most `timeout` seconds for MLflow to take the
        rest, longer while it is taking a model. What it did not take stays in the journal, and one line says how
        to send it."""
        if self._closing.is_set():
            return
        self._put(record("close", status=status))
        self._closing.set()
        self._news.set()
        self._thread.join(timeout)
        while self._thread.is_alive() and self._run.is_uploading:
            self._thread.join(1)
        self._abandoned.set()
        memory, path = len(self.journal.unwritten), self.journal.path
        waiting = self.journal.unsent() - memory
        if waiting > 0:
            say(f"{waiting} records are unsent in {path}; send them with: python -m stages.tracking {path}")
        if memory:
            say(f"{memory} records are lost: neither MLflow nor {path} could take them")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _put(self, entry) -> None:
        """entry: a record, or a function that makes one or a list of them and may fail."""
        try:
            made = entry() if callable(entry) else entry
            for one in made if isinstance(made, list) else [made]:
                self.journal.append(one)
        except Exception as error:  # whatever is wrong with a value, the training is worth more than it
            self._warn(f"not logged: {type(error).__name__}: {error}")
        self._news.set()

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            say(text)

    def _send_all(self) -> None:
        """The thread: sends what the journal has, waits for more, backs off while MLflow is away."""
        sender = Sender(self.journal, self._run)
        failures = failures_at_end = 0
        while not self._abandoned.is_set():
            try:
                sent = sender.send_next()
            except Unusable as error:
                say(f"{error}; the training goes on, records wait")
                break
            except Exception as error:  # a server that is down shows itself in many exceptions
                failures += 1
                if failures == 2:
                    say(f"MLflow does not answer ({reason(error)}); the training goes on, records wait")
                failures_at_end += self._closing.is_set()
                if failures_at_end == 7:  # one more than a bad record needs to be recognised
                    break
                if self._closing.wait(min(2.0 ** min(failures - 1, 6), 60)):
                    self._abandoned.wait(0.3)
                continue
            if failures > 1:
                say("MLflow answers again")
            failures = 0
            if not sent:
                if self._closing.is_set():
                    break
                self._news.wait()
                self._news.clear()
                self._closing.wait(0.5)  # more records make one larger batch
        self.journal.release()

    def _sample(self, collectors: Sequence[type], seconds: float) -> None:
        """Samples with MLflow's collectors, but through the journal: MLflow's own SystemMetricsMonitor ends
        for good at the first request that fails."""
        monitors = []
        for collector in collectors:
            with suppress(Exception):  # no GPU, no driver, no nvidia-ml-py
                monitors.append(collector())
        while not self._closing.wait(seconds):
            values = {}
            for monitor in monitors:
                with suppress(Exception):
                    monitor.collect_metrics()
                    values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
            self._put(records.metrics_record("system", values, None)[0])
