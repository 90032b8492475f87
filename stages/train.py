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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stages.machine.devices import prepare_torch
from stages.machine.entry import CODE, root_folder, run
from stages.machine.stage_params import settings_to_record, stage_params
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
        workplace = take_workplace(params, opening.inputs_of(params), trains=False)
        if ranks.is_main():
            pass_on(params, device, rows, workplace)
        return
    rag, precision = opening.build_rag(params, device, rows["passages"], sharded)
    examples, names = opening.open_examples(params, rag, rows)
    workplace = take_workplace(params, opening.inputs_of(params))
    trainer = opening.make_trainer(params, rag, precision, workplace, names["train"])
    if ranks.is_main():
        train_and_leave(params, trainer, examples, workplace, device)
    else:
        workplace.run(trainer, examples, on_point=lambda point: None)


def pass_on(params: Params, device, rows: dict, workplace) -> None:
    """Leaves the models as the warm-up left them: questions without answers train the retriever alone."""
    from stages.corpus.arrow import replacing
    from stages.rag.folder import save_rag
    from stages.storage import manifest
    from stages.training.curve_files import CurveFiles
    from stages.training.opening import build_rag

    as_they_are = params.train.model_copy(update={"index_refresh_steps": 0, "compile": False})
    rag, _ = build_rag(params.model_copy(update={"train": as_they_are}), device, rows["passages"], None)
    description = "The training questions have no answers: no joint training, the warmed-up retriever as it is."
    with tracked(params, workplace, None, same_run=True) as opened:
        with replacing(MODEL) as (made,):
            save_rag(rag, made, params.recipe.marginalization, params.recipe.reading)
        opened.log_earlier_stages()
        opened.tracker.describe(description)
    leave_facts(params, opened, workplace.name, {}, description)
    manifest.write_metrics(METRICS, {"steps": 0, "questions_seen": 0, "training_seconds": 0.0})
    CurveFiles(CURVES).write([])
    workplace.release()
    print(
        "the train questions have no answers: nothing is trained jointly, the warmed-up models are passed on as they are"
    )


def train_and_leave(params: Params, trainer, examples: dict, workplace, device) -> None:
    """Rank 0's part: trains, tracked by MLflow, and leaves the model, its metrics and its curves."""
    from stages.corpus.arrow import replacing
    from stages.rag.folder import save_rag
    from stages.storage import manifest
    from stages.training.boards import take_board
    from stages.training.curve_files import CurveFiles
    from stages.training.curves import Curves, summary
    from stages.verdicts.description import training_text
    from stages.verdicts.of_training import training_signs

    files = CurveFiles(CURVES)
    with tracked(params, workplace, params.train.recipe, trainer.checkpoints.is_finished()) as opened:
        tracker = opened.tracker
        board = (
            take_board(root_folder() / "tensorboard", opened.name, workplace.name)
            if params.recipe.tensorboard
            else None
        )
        usual = {"skipped_steps": 0, "overflow_steps": 0, "micro_batch": params.train.batch_size}
        curves = Curves(tracker, board, usual)

        def on_point(point: dict) -> None:
            curves.point(point)
            files.follow(trainer.progress.history)

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
        opened.log_earlier_stages()
        register(params, opened, int(metrics["kept_step"]), kept, description)
        tracker.describe(description)

    leave_facts(params, opened, workplace.name, kept, description)
    manifest.write_metrics(METRICS, metrics)
    files.write(trainer.progress.history)
    workplace.release()
    print(verdicts.text)
    loss = metrics.get("val_loss_per_sequence", math.nan)
    print(f"validation loss {loss:.3f} nats a question at step {int(metrics['kept_step'])}")


class TrackedRun(NamedTuple):
    """MLflow's run of this stage: under which name, with which parameters, on which data sets (opening.data_sets)."""

    tracker: Any
    name: str
    settings: dict
    data: list[tuple]

    def log_earlier_stages(self) -> None:
        """What the stages before this one have measured."""
        from stages.training.curves import earlier_metrics

        if "DVC_STAGE" in os.environ:  # else they may have run with other parameters since
            self.tracker.log_metrics(earlier_metrics(METRICS.parent))


@contextmanager
def tracked(params: Params, workplace, recipe: str | None, same_run: bool) -> Iterator[TrackedRun]:
    """The run of the training in `workplace` by `recipe` (None: nothing is trained), open until the block ends.

    `same_run`: as `open_run` takes it.
    """
    from stages.tracking.runs import environment_tags, open_run
    from stages.training.opening import data_sets

    name = os.environ.get("DVC_EXP_NAME") or f"{recipe or 'retrieval'}-{workplace.name[:6]}"
    seconds = params.tracking.system_metrics_seconds if recipe else 0
    tracker = open_run(
        root_folder(), params.tracking.experiment, None, name, workplace.journal, seconds or None, same_run
    )
    with tracker:
        tracker.set_tags({**environment_tags(Path.cwd()), "recipe": recipe or "none", "fingerprint": workplace.name})
        opened = TrackedRun(tracker, name, settings_to_record(params), list(data_sets()))
        tracker.log_params(opened.settings)
        for data_set in opened.data:
            tracker.log_dataset(*data_set)
        yield opened
        tracker.flush()


def leave_facts(params: Params, opened: TrackedRun, fingerprint: str, metrics: dict, description: str) -> None:
    """run.json beside the model: whose it is and what it was made of, for evaluation, report and publish."""
    from stages.storage import manifest
    from stages.tracking.records import flatten

    trained = {
        "run_id": opened.tracker.run_id, "experiment": params.tracking.experiment, "fingerprint": fingerprint,
        "name": opened.name, "params": flatten(opened.settings), "metrics": metrics, "description": description,
        "data": [{"name": one, "digest": content, **facts} for one, content, _, _, facts in opened.data],
    }  # fmt: skip
    manifest.write_json(MODEL / "run.json", trained)
    manifest.record(MODEL / "run.json")


def register(params: Params, opened: TrackedRun, step: int, metrics: dict, description: str) -> None:
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
    opened.tracker.register_model(
        f"{recipe}-{params.recipe.checkpoints}", data, {PARAMS_FILE.name: PARAMS_FILE}, CODE, "stages.evaluation.pyfunc",
        ["Which country is Warsaw Modlin Airport in?"], step, metrics, {"recipe": recipe, "trained_as": opened.name},
        registered=params.tracking.experiment, alias=recipe, description=description,
        about="Models of this experiment. The alias of a recipe is the one that was trained last; to ask it: "
        f'mlflow.pyfunc.load_model("models:/{params.tracking.experiment}@{recipe}").predict(["a question"])',
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
