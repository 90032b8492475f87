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

from stages.tracking.journal import Journal, record, say, without_credentials
from stages.tracking.mlflow_run import MlflowRun
from stages.tracking.recorder import Tracker, environment_tags

__all__ = ["Tracker", "environment_tags", "open_run"]


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
    return Tracker(opened, MlflowRun(opened.state, root=root), opening, collectors, system_metrics_seconds)
