"""A trained model in MLflow: its files as a LoggedModel that mlflow.pyfunc loads, and a version of a registered model.

No pickle: MLflow imports the loader module from the code that lies beside the files (pyfunc's `loader_module`).
"""

import re
import shutil
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# First: mlflow reads from the environment what this sets.
from stages.tracking.mlflow_store import MlflowClient  # isort: skip
from mlflow import entities
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path

from stages.tracking.snapshots import copy_tree

TRAINED = "trained"  # tag of a version: when its training last ended, in milliseconds
# What the loader imports; each that is installed becomes a requirement of exactly its version.
PACKAGES = (
    "accelerate", "bm25s", "datasets", "faiss-cpu", "faiss-gpu", "filelock", "gguf", "mlflow", "numpy", "pandas", "peft",
    "psutil", "pyarrow", "pydantic", "PyStemmer", "PyYAML", "safetensors", "sentencepiece", "torch", "tqdm", "transformers",
    "xxhash",
)  # fmt: skip


def register(client: MlflowClient, experiment_id: str, run_id: str, entry: dict, snapshot: Path) -> None:
    """Makes of a record of kind `model` and its snapshot what MLflow keeps of a model; may be called any number of times.

    The snapshot, with its folders `data` and `code`, is read unless MLflow has the files already.
    """
    model = _logged_model(client, experiment_id, run_id, entry)
    if model.status != entities.LoggedModelStatus.READY:
        _upload(client, model, run_id, entry, snapshot)
        client.finalize_logged_model(model.model_id, "READY")
    run = client.get_run(run_id)
    if model.model_id not in [one.model_id for one in (run.outputs.model_outputs if run.outputs else [])]:
        client.log_outputs(run_id, [entities.LoggedModelOutput(model.model_id, entry["step"])])
    log_once(client, run, model, {**entry, "step": 0})  # MLflow draws a bar; a single point of a curve says nothing
    _register_version(client, model, run_id, entry)


def log_once(client: MlflowClient, run, model: entities.LoggedModel | None, entry: dict) -> None:
    """Metrics of a run, and of its model where there is one, unless the last ones of these names are the same."""
    known = (model.metrics or []) if model else run.data._metric_objs
    last = {one.key: (one.step, one.value) for one in sorted(known, key=lambda one: one.timestamp)}
    of_model = {"model_id": model.model_id, "run_id": run.info.run_id} if model else {}
    metrics = [
        entities.Metric(name, float(value), entry["time"], entry["step"], **of_model)
        for name, value in entry["values"].items()
        if last.get(name) != (entry["step"], float(value))
    ]
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)


def versions_of(client: MlflowClient, run_id: str) -> list:
    """The registered versions that a run has made."""
    return list(client.search_model_versions(f"run_id = '{run_id}'"))


def _logged_model(client: MlflowClient, experiment_id: str, run_id: str, entry: dict) -> entities.LoggedModel:
    name, step = entry["name"], str(entry["step"])
    models = client.search_logged_models([experiment_id], f"name = '{name}' AND source_run_id = '{run_id}'")
    model = next((one for one in models if one.tags.get("step") == step), None)
    return model or client.create_logged_model(
        experiment_id, name, run_id, {"step": step}, entry["params"], model_type="rag"
    )


def _upload(client: MlflowClient, model: entities.LoggedModel, run_id: str, entry: dict, snapshot: Path) -> None:
    if not snapshot.is_dir():
        raise FileNotFoundError(f"the model's files are gone: {snapshot}")
    from mlflow import pyfunc  # a second of imports that a run without a model need not wait for
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(dir=snapshot.parent, prefix="mlflow-") as work:
        made, parts = Path(work) / "model", Path(work) / "parts"
        parts.mkdir()
        pyfunc.save_model(
            str(made), loader_module=entry["loader"], data_path=str(parts),
            code_paths=[str(folder) for folder in (snapshot / "code").iterdir()], signature=signature(),
            input_example=entry["example"], pip_requirements=requirements(),
            mlflow_model=Model(artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id),
        )  # fmt: skip
        copy_tree(snapshot / "data", made / "data" / "parts", link=True)
        if not re.match("file:|/", model.artifact_location):
            client.log_model_artifacts(model.model_id, str(made))
            return
        place = Path(local_file_uri_to_path(model.artifact_location))
        unfinished = place.with_name(f"{place.name}.unfinished")
        for left in (place, unfinished):  # of an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        copy_tree(made, unfinished, link=True)
        unfinished.rename(place)


def signature():
    """A question in; an answer, its probability and the passages that it came from out.

    The question's column has no name, because MLflow takes no list of strings for one that has.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Object, Property

    text, number = DataType.string, DataType.double
    facts = {"title": text, "text": text, "prior": number, "posterior": number}
    passage = Object([Property(name, kind) for name, kind in facts.items()])
    answer = [ColSpec(text, "answer"), ColSpec(number, "probability"), ColSpec(Array(passage), "passages")]
    return ModelSignature(Schema([ColSpec(text)]), Schema(answer))


def requirements() -> list[str]:
    """PACKAGES that are installed, with their versions, build labels such as +cpu left out."""
    found = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package}=={version(package).split('+')[0]}")
    return found


def _register_version(client: MlflowClient, model: entities.LoggedModel, run_id: str, entry: dict) -> None:
    name, alias, trained = entry["registered"], entry["alias"], str(entry["time"])
    try:
        client.create_registered_model(name, description=entry["about"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not models:/m-..., which a local store looks up in the process's global store, whatever store the client has.
    source = model.artifact_location
    known = [one for one in client.search_model_versions(f"name = '{name}'") if one.source == source]
    if known:
        number = known[0].version
    else:
        number = client.create_model_version(
            name, source, run_id, description=entry["description"], model_id=model.model_id
        ).version
    client.set_model_version_tag(name, number, TRAINED, trained)
    # A journal that waited must not take the alias from what was trained after it.
    try:
        holder = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            raise
        holder = None
    if holder is None or int(holder.tags.get(TRAINED, 0)) <= entry["time"]:
        client.set_registered_model_alias(name, alias, number)
