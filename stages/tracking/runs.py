"""MLflow tracking that cannot stop a training.

Every log_* call of a Tracker writes a record into the run's journal and returns; a thread sends the journal
to MLflow and tries again for as long as the server is away (stages/tracking/recorder.py). What is still unsent when
the process ends is sent by `python -m stages.tracking JOURNAL`, which may be run any number of times.
"""

import uuid
from pathlib import Path

# First: mlflow reads from the environment what this sets.
from stages.tracking.mlflow_store import tracking_uri  # isort: skip
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from stages.tracking.journal import Journal, say, without_credentials
from stages.tracking.mlflow_run import MlflowRun
from stages.tracking.recorder import Tracker, environment_tags
from stages.tracking.records import params_records, record

__all__ = ["Tracker", "environment_tags", "open_run", "reopen_trained"]


def open_run(
    root: Path,
    experiment: str,
    run_id: str | None,
    run_name: str | None,
    journal: Path,
    system_metrics_seconds: float | None = 10.0,
    same_run: bool = False,
    history: dict | None = None,
) -> Tracker:
    """Starts a run, or goes on in one, and returns at once, whether MLflow answers or not.

    run_id: the run to reopen; it is RUNNING again until closed. Where it is gone, a new run takes its place,
    with a warning, begun with the name, the flat params and the metrics of `history`. None: the journal's own
    run, unless that one FINISHED (so that a killed training goes on in its run), else a new one.
    journal: a file of this training alone that outlives the process, so not in the folder of a DVC temp run.
    same_run: with run_id None, the journal's own run also where it FINISHED; such a run stays FINISHED and keeps
    its duration, whatever is added.
    system_metrics_seconds: how often CPU, memory, disk, network and NVIDIA GPUs are sampled; None: never.
    """
    opened = Journal(journal)
    if not opened.lock(timeout=3):
        path = Path(journal)
        path = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
        say(f"another process is sending {journal}; this one writes {path}")
        opened = Journal(path)
        opened.lock(timeout=3)
    opened.drop_orphans()
    root = Path(root).resolve()
    opening = record(
        "open",
        session=uuid.uuid4().hex,
        experiment=experiment,
        run_id=run_id,
        run_name=run_name,
        same_run=same_run,
        history=history,
        root=str(root),
        uri=without_credentials(tracking_uri(root)),
    )
    collectors = (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor)
    return Tracker(
        opened, MlflowRun(opened.state, opened.snapshots, root=root), opening, collectors, system_metrics_seconds
    )


def reopen_trained(root: Path, trained: dict) -> Tracker:
    """Goes on in the run of a trained model, to add what came after. trained: the content of its run.json.

    Where MLflow had not answered by the training's end, the training's journal is what knows the run.
    """
    journal = f"evaluate-{trained['run_id']}" if trained["run_id"] else f"train-{trained['fingerprint']}"
    return open_run(
        root, trained["experiment"], trained["run_id"], None, root / ".tracking" / f"{journal}.jsonl", None,
        same_run=True, history={**trained, "params": params_records(trained["params"])[0]["values"]},
    )  # fmt: skip
