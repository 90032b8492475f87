"""MLflow's pages on this machine alone, with the address of the experiment's runs.

python -m stages.tracking.ui                    # or: make ui
"""

import os
import socket
import sys
from pathlib import Path

# First: mlflow reads from the environment what this sets.
from stages.tracking.mlflow_store import client_of, tracking_uri  # isort: skip
from stages.params import load_params

HOST, PORT = "127.0.0.1", 5000


def address(server: str, experiment_id: str | None) -> str:
    """Where the runs of an experiment are drawn; MLflow opens on traces of language models unless told otherwise."""
    if not experiment_id:
        return f"{server}/#/experiments?workflowType=machine_learning"
    return f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"


def free_port(first: int = PORT) -> int:
    """`first`, or the next port that nobody listens on."""
    for port in range(first, first + 50):
        with socket.socket() as tried:
            if tried.connect_ex((HOST, port)):
                return port
    raise ValueError(f"ports {first} to {first + 49} are all in use; end one of the servers that listen there")


def main() -> None:
    """Prints the address and becomes `mlflow ui`; for a server named by MLFLOW_TRACKING_URI the address is all."""
    root = Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
    uri = tracking_uri(root)
    experiment = client_of(uri, root).get_experiment_by_name(load_params().tracking.experiment)
    experiment_id = experiment and experiment.experiment_id
    if uri.startswith("http"):
        print(address(uri.rstrip("/"), experiment_id))
        return
    port = free_port()
    print(f"\n  {address(f'http://{HOST}:{port}', experiment_id)}\n", flush=True)
    command = ["-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
