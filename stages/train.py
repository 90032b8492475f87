"""Stage 4: joint training of question encoder and generator under one of the recipes of params.yaml.

    python -m stages.train                          # reads data/prepared, tokens, retriever, vectors, index; writes data/model
    dvc exp run -S train.max_steps=10               # a tiny run
    dvc exp run -S train.recipe=old                 # the old recipe, for comparison
    torchrun --nproc-per-node=4 -m stages.train     # or runtime.processes: 4; four ranks, the same updates
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 -m stages.train     # each holding a quarter

The result is a transformers RAG checkpoint, or a folder a model (stages/rag/folder.py says when); where the context encoder
trains too (train.index_refresh_steps), it and the index of its vectors lie beside it. Killed and started again, it goes on
from its last checkpoint. Questions without answers train no generator: the models of the warm-up are passed on as they are.
"""

import math
import os
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import CODE, root_folder, run
from stages.machine.stage_params import settings_of, settings_to_record, stage_params
from stages.params import PARAMS_FILE, Params

MODEL, METRICS, CURVES = Path("data/model"), Path("metrics/train.json"), Path("data/curves")
MODEL_LOSSES = {
    "model/validation_loss": "val_loss_per_sequence", "model/validation_loss_per_token": "val_loss_per_token",
}  # fmt: skip


def main() -> None:
    params = stage_params("train")
    from stages.machine.launching import launch

    if launch(params.runtime.processes, params.runtime.device):
        return
    device = prepare_torch(params.runtime)
    from stages.compute import ranks
    from stages.training import fsdp

    asked = fsdp.asked()
    with ranks.group(device):
        train(params, device, asked)


def train(params: Params, device, sharded=None) -> None:
    """One rank's part of the training, or all of it; rank 0 alone writes what the stage leaves.

    `sharded` is a fsdp.Sharding: each rank then holds a part of the models.
    """
    from stages.compute import ranks
    from stages.training import opening
    from stages.training.targets import has_answers
    from stages.training.workplace import take_workplace

    rows = opening.open_rows()
    if not has_answers(rows["train"]):
        if ranks.is_main():
            pass_on(params, device, rows)
        return
    rag, precision = opening.build_rag(params, device, rows["passages"], sharded)
    examples, names = opening.open_examples(params, rag, rows)
    workplace = take_workplace(root_folder(), settings_of(params), opening.inputs_of(params), params)
    trainer = opening.make_trainer(params, rag, precision, workplace, names["train"])
    if ranks.is_main():
        train_and_leave(params, trainer, examples, workplace, device)
    else:
        workplace.run(trainer, examples, on_point=lambda point: None)


def pass_on(params: Params, device, rows: dict) -> None:
    """Leaves the models as the warm-up left them: questions without answers train the retriever alone."""
    from stages.corpus.arrow import replacing
    from stages.rag.folder import save_rag
    from stages.storage import leftovers, manifest
    from stages.storage.checkpoints import describe, fingerprint
    from stages.tracking.runs import environment_tags, open_run
    from stages.training import opening
    from stages.training.curve_files import CurveFiles
    from stages.training.curves import earlier_metrics

    root = root_folder()
    name = fingerprint(describe(settings_of(params), opening.inputs_of(params)))
    called = os.environ.get("DVC_EXP_NAME") or f"retrieval-{name[:6]}"
    lock = leftovers.lock(root, name)
    as_they_are = params.train.model_copy(update={"index_refresh_steps": 0, "compile": False})
    rag, _ = opening.build_rag(params.model_copy(update={"train": as_they_are}), device, rows["passages"], None)
    description = "The training questions have no answers: no joint training, the warmed-up retriever as it is."
    tracker = open_run(
        root, params.tracking.experiment, None, called, root / ".tracking" / f"train-{name}.jsonl", None, same_run=True
    )
    with tracker:
        tracker.set_tags({**environment_tags(Path.cwd()), "recipe": "none", "fingerprint": name})
        settings = settings_to_record(params)
        tracker.log_params(settings)
        data = list(opening.data_sets())
        for data_set in data:
            tracker.log_dataset(*data_set)
        if "DVC_STAGE" in os.environ:  # else they may have run with other parameters since
            tracker.log_metrics(earlier_metrics(METRICS.parent))
        with replacing(MODEL) as (made,):
            save_rag(rag, made, params.recipe.marginalization, params.recipe.reading)
        tracker.describe(description)
        tracker.flush()
    leave_facts(params, settings, tracker.run_id, name, called, {}, description, data)
    manifest.write_metrics(METRICS, {"steps": 0, "questions_seen": 0, "training_seconds": 0.0})
    CurveFiles(CURVES).write([])
    lock.release()
    print(
        "the train questions have no answers: nothing is trained jointly, the warmed-up models are passed on as they are"
    )


def train_and_leave(params: Params, trainer, examples: dict, workplace, device) -> None:
    """Rank 0's part: trains, tracked by MLflow, and leaves the model, its metrics and its curves."""
    from stages.corpus.arrow import replacing
    from stages.rag.folder import save_rag
    from stages.storage import manifest
    from stages.tracking.runs import environment_tags, open_run
    from stages.training.boards import take_board
    from stages.training.curve_files import CurveFiles
    from stages.training.curves import Curves, earlier_metrics, summary
    from stages.training.opening import data_sets
    from stages.verdicts.description import training_text
    from stages.verdicts.of_training import training_signs

    root, fingerprint, recipe = root_folder(), workplace.name, params.train.recipe
    name = os.environ.get("DVC_EXP_NAME") or f"{recipe}-{fingerprint[:6]}"
    tracker = open_run(
        root, params.tracking.experiment, None, name, workplace.journal,
        params.tracking.system_metrics_seconds or None, same_run=trainer.checkpoints.is_finished(),
    )  # fmt: skip
    board = take_board(root / "tensorboard", name, fingerprint) if params.recipe.tensorboard else None
    usual = {"skipped_steps": 0, "overflow_steps": 0, "micro_batch": params.train.batch_size}
    curves = Curves(tracker, board, usual)
    files = CurveFiles(CURVES)

    def on_point(point: dict) -> None:
        curves.point(point)
        files.follow(trainer.progress.history)

    with tracker:
        tracker.set_tags({**environment_tags(Path.cwd()), "recipe": recipe, "fingerprint": fingerprint})
        settings = settings_to_record(params)
        tracker.log_params(settings)
        data = list(data_sets())
        for data_set in data:
            tracker.log_dataset(*data_set)
        workplace.run(trainer, examples, on_point)
        if trainer.progress.halvings:
            tracker.set_tags({"out_of_memory": ", ".join(trainer.progress.halvings)})

        metrics = summary(trainer.progress, params.train, params.recipe.checkpoints == "best")
        with replacing(MODEL) as (made,):
            save_rag(trainer.rag, made, params.recipe.marginalization, params.recipe.reading)
        verdicts = training_signs(trainer.progress.history, metrics, params.signs, device.type == "cuda")
        tracker.set_tags(verdicts.tags)
        tracker.log_text(verdicts.text, "signs-train.txt")
        description = training_text(metrics, verdicts)
        kept = {name: metrics[loss] for name, loss in MODEL_LOSSES.items() if loss in metrics}
        if "DVC_STAGE" in os.environ:  # else they may have run with other parameters since
            tracker.log_metrics(earlier_metrics(METRICS.parent))
        register(params, tracker, name, int(metrics["kept_step"]), kept, description)
        tracker.describe(description)
        tracker.flush()

    leave_facts(params, settings, tracker.run_id, fingerprint, name, kept, description, data)
    manifest.write_metrics(METRICS, metrics)
    files.write(trainer.progress.history)
    workplace.release()
    print(verdicts.text)
    loss = metrics.get("val_loss_per_sequence", math.nan)
    print(f"validation loss {loss:.3f} nats a question at step {int(metrics['kept_step'])}")


def leave_facts(
    params: Params, settings: dict, run_id: str | None, fingerprint: str, name: str, metrics: dict, description: str,
    data: list[tuple],
) -> None:  # fmt: skip
    """run.json beside the model: whose it is and what it was made of, for evaluation, report and publish."""
    from stages.storage import manifest
    from stages.tracking.journal import flatten

    trained = {
        "run_id": run_id, "experiment": params.tracking.experiment, "fingerprint": fingerprint, "name": name,
        "params": flatten(settings), "metrics": metrics, "description": description,
        "data": [{"name": one, "digest": content, **facts} for one, content, _, _, facts in data],
    }  # fmt: skip
    manifest.write_json(MODEL / "run.json", trained)
    manifest.record(MODEL / "run.json")


def register(params: Params, tracker, name: str, step: int, metrics: dict, description: str) -> None:
    """Gives MLflow the model, with what it needs to answer unless that is too large."""
    from stages.rag.parts import parts, size_of

    recipe, limit = params.train.recipe, params.tracking.model_gigabytes
    weights = {"model": MODEL}
    data = weights | parts(MODEL, params)
    gigabytes = size_of(list(data.values())) / 1e9
    if gigabytes > limit:
        print(
            f"MLflow gets the weights alone, which answer nothing by themselves: with index and passages the model takes "
            f"{gigabytes:.1f} GB, more than tracking.model_gigabytes ({limit:g})"
        )
        data = weights
    tracker.register_model(
        f"{recipe}-{params.recipe.checkpoints}", data, {PARAMS_FILE.name: PARAMS_FILE}, CODE, "stages.evaluation.pyfunc",
        ["Which country is Warsaw Modlin Airport in?"], step, metrics, {"recipe": recipe, "trained_as": name},
        registered=params.tracking.experiment, alias=recipe, description=description,
        about="Models of this experiment. The alias of a recipe is the one that was trained last; to ask it: "
        f'mlflow.pyfunc.load_model("models:/{params.tracking.experiment}@{recipe}").predict(["a question"])',
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
