"""Stage 4: joint training of question encoder and generator under one of the recipes of params.yaml.

    python -m stages.train                          # reads data/prepared, tokens, retriever, vectors, index; writes data/model
    dvc exp run -S train.max_steps=10               # a tiny run
    dvc exp run -S train.recipe=old                 # the old recipe, for comparison
    torchrun --nproc-per-node=4 -m stages.train     # or runtime.processes: 4; four ranks, the same updates
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 -m stages.train     # each holding a quarter

The result is a transformers RAG checkpoint; where the context encoder trains too (train.index_refresh_steps), it and the
index of its vectors lie beside it. Killed and started again, it goes on from its last checkpoint.
"""

import math
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import root_folder, run
from stages.machine.stage_params import settings_of, stage_params
from stages.params import Params

MODEL, METRICS, CURVES = Path("data/model"), Path("metrics/train.json"), Path("metrics/curves.csv")


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
    from stages.training.workplace import take_workplace

    rows = opening.open_rows()
    rag, precision = opening.build_rag(params, device, rows["passages"], sharded)
    examples = opening.open_examples(params, rag, rows)
    workplace = take_workplace(root_folder(), settings_of(params), opening.inputs_of(params), params)
    trainer = opening.make_trainer(params, rag, precision, workplace, list(rows["train"]["id"]))
    if ranks.is_main():
        train_and_leave(params, trainer, examples, workplace, device)
    else:
        workplace.run(trainer, examples, on_point=lambda point: None)


def train_and_leave(params: Params, trainer, examples: dict, workplace, device) -> None:
    """Rank 0's part: trains, tracked by MLflow, and leaves the model, its metrics and its curves."""
    from stages.corpus.arrow import replacing
    from stages.rag.folder import save_rag
    from stages.storage import manifest
    from stages.tracking.runs import environment_tags, open_run
    from stages.training.curves import Curves, summary
    from stages.training.opening import data_sets
    from stages.verdicts.of_training import training_signs

    root, name, recipe = root_folder(), workplace.name, params.train.recipe
    tracker = open_run(
        root, params.tracking.experiment, None, f"{recipe}-{name[:6]}", workplace.journal,
        params.tracking.system_metrics_seconds or None, same_run=trainer.checkpoints.is_finished(),
    )  # fmt: skip
    curves = Curves(tracker, root / "tensorboard" / name if params.recipe.tensorboard else None)
    with tracker:
        tracker.set_tags({**environment_tags(Path.cwd()), "recipe": recipe, "fingerprint": name})
        tracker.log_params(settings_of(params))
        for data_set in data_sets():
            tracker.log_dataset(*data_set)
        workplace.run(trainer, examples, curves.point)
        if trainer.progress.halvings:
            tracker.set_tags({"out_of_memory": ", ".join(trainer.progress.halvings)})

        metrics = summary(trainer.progress, params.train, params.recipe.checkpoints == "best")
        with replacing(MODEL) as (made,):
            save_rag(trainer.rag, made, params.recipe.marginalization)
        tracker.register_checkpoint(
            f"{recipe}-{params.recipe.checkpoints}", root / MODEL, int(metrics["kept_step"]), {}, {"recipe": recipe}
        )
        verdicts = training_signs(trainer.progress.history, metrics, params.signs, device.type == "cuda")
        tracker.set_tags(verdicts.tags)
        tracker.log_text(verdicts.text, "signs-train.txt")
        tracker.flush()

    run_id = {"run_id": tracker.run_id, "experiment": params.tracking.experiment, "fingerprint": name}
    manifest.write_json(MODEL / "run.json", run_id)
    manifest.record(MODEL / "run.json")
    manifest.write_metrics(METRICS, metrics)
    curves.write_csv(trainer.progress.history, CURVES)
    workplace.release()
    print(verdicts.text)
    loss = metrics.get("val_loss_per_sequence", math.nan)
    print(f"validation loss {loss:.3f} nats a question at step {int(metrics['kept_step'])}")


if __name__ == "__main__":
    run(main)
