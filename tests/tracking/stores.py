"""What the tests of tracking share: a run of a test's own store, a model of one file, everything logged and looked for."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from stages.tracking import runs as tracking
from stages.tracking.mlflow_store import MlflowClient

CODE = Path(__file__).resolve().parents[2]
EXPERIMENT = "demo"


def start(root, run_id=None, journal="journal.jsonl", name=None, seconds=None):
    return tracking.open_run(root, EXPERIMENT, run_id, name, root / journal, system_metrics_seconds=seconds)


def runs(client):
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def local_client(root):
    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def values(client, run_id, name):
    return sorted((one.step, one.value) for one in client.get_metric_history(run_id, name))


def python(root, code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


LOADER = """
from pathlib import Path
class Answering:
    def __init__(self, folder): self.weights = (folder / "model/weights.bin").read_text()
    def predict(self, model_input, params=None): return [f"{self.weights}: {one}" for one in model_input.iloc[:, 0]]
def _load_pyfunc(path): return Answering(Path(path))
"""


def register(tracker, folder, weights="first", step=4, alias="new", loss=1.5):
    """A model of one file, whose files change right after they were given away."""
    model, code = folder / "step-4", folder / "toy_loader"
    for place in (model, code):
        place.mkdir(exist_ok=True)
    (model / "weights.bin").unlink(missing_ok=True)  # as a stage does: replaced, never written into
    (model / "weights.bin").write_text(weights)
    (code / "__init__.py").write_text(LOADER)
    (folder / "params.yaml").write_text(f"step: {step}")
    tracker.register_model(
        "step 4", {"model": model}, {"params.yaml": folder / "params.yaml"}, code, "toy_loader", ["who?"], step,
        {"model/validation_loss": loss}, {"top": {"k": 5}}, registered="demo", alias=alias, about="about", description="one",
    )  # fmt: skip
    (folder / "params.yaml").write_text("step: another")
    (model / "weights.bin").unlink()


def answers(root, alias="new"):
    """What the registered model says, in a process of its own in another folder."""
    code = """
import sys
from mlflow import pyfunc, set_tracking_uri
set_tracking_uri(sys.argv[1])
print(list(pyfunc.load_model(sys.argv[2]).predict(["who?"])), flush=True)
"""
    (root / "elsewhere").mkdir(exist_ok=True)
    process = python(root / "elsewhere", code, f"sqlite:///{root / 'mlflow.db'}", f"models:/demo@{alias}")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed.strip().splitlines()[-1]


def log_everything(tracker, folder):
    (folder / "notes.md").write_text("a note")
    (folder / "blob.bin").write_bytes(bytes([0, 255, 128]))
    tracker.log_params({"train": {"seed": 1, "learning_rate": 3e-5}, "long": "x" * 7000, "empty": {}})
    tracker.log_params({"many": {str(number): number for number in range(600)}})
    for step in range(5):
        tracker.log_metrics({"loss": 2.0 - step / 10, "recall@5": 0.5}, step)
    tracker.set_tags({"git.dirty": False, "long tag": "y" * 9000})
    tracker.log_text("<p>hello</p>", "reports/hello.html")
    tracker.log_file(folder / "notes.md", "files")
    tracker.log_file(folder / "blob.bin", "files")
    tracker.log_table([{"question": "who?", "em": 1}, {"question": "ä", "answers": ["b"]}], "answers.json")
    tracker.log_dataset("train", "0123456789" * 5, "data/prepared", "training", {"rows": 8})
    register(tracker, folder)
    for name in ("notes.md", "blob.bin"):
        (folder / name).unlink()


def check_everything(client, run_id, folder):
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.seed"] == "1" and run.data.params["train.learning_rate"] == "3e-05"
    assert len(run.data.params["long"]) == 6000 and len(run.data.params) == 604
    assert values(client, run_id, "loss") == [(step, 2.0 - step / 10) for step in range(5)]
    assert values(client, run_id, "recall_at_5") == [(step, 0.5) for step in range(5)]
    assert run.data.tags["git.dirty"] == "False" and len(run.data.tags["long tag"]) == 8000
    folders = ("", "reports", "files")
    artifacts = {file.path for place in folders for file in client.list_artifacts(run_id, place)}
    assert {"reports/hello.html", "files/notes.md", "files/blob.bin", "answers.json"} <= artifacts
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]
    table = client.load_table(run.info.experiment_id, "answers.json", run_ids=[run_id])
    assert list(table["question"]) == ["who?", "ä"] and table["answers"][1] == '["b"]'
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("train", "012345678901234567890123456789012345")
    assert json.loads(dataset.dataset.profile) == {"rows": 8} and dataset.tags[0].value == "training"
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.name == "step 4" and model.status == "READY" and model.tags["step"] == "4"
    assert model.params == {"top.k": "5"} and model.source_run_id == run_id
    assert [(one.key, one.value, one.step) for one in model.metrics] == [("model/validation_loss", 1.5, 0)]
    assert values(client, run_id, "model/validation_loss") == [(0, 1.5)]
    (version,) = client.search_model_versions("name = 'demo'")
    assert version.source == model.artifact_location and version.run_id == run_id
    assert client.get_model_version_by_alias("demo", "new").version == version.version
    (parts,) = folder.rglob(f"{model.model_id}/artifacts/data/parts")
    assert (parts / "model/weights.bin").read_text() == "first" and (parts / "params.yaml").read_text() == "step: 4"
    assert not list(folder.glob("*.files")), "what was sent goes away"
    assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
