"""Stage 4: joint training of question encoder and generator under one of the recipes of params.yaml.

    python -m stages.train                          # reads data/prepared, tokens, retriever, index; writes data/model
    dvc exp run -S train.max_steps=10               # a tiny run
    dvc exp run -S train.recipe=old                 # the old recipe, for comparison

The result is a transformers RAG checkpoint. Killed and started again, it goes on from its last checkpoint.
"""

import json
from pathlib import Path

from stages.params import Params, load_params
from stages.runtime import prepare_torch, run

PREPARED, TOKENS, RETRIEVER, INDEX = (Path("data") / name for name in ("prepared", "tokens", "retriever", "index"))
MODEL, METRICS, CURVES = Path("data/model"), Path("metrics/train.json"), Path("metrics/curves.csv")


def settings_of(params: Params) -> dict:
    """What this stage reads from params.yaml; dvc.yaml lists the same keys."""
    return {
        "models": {"generator": params.models.generator},
        "lengths": params.lengths.model_dump(),
        "retriever": {"n_docs": params.retriever.n_docs},
        "train": params.train.model_dump(),
        "recipe": params.recipe.model_dump(),
    }


def main() -> None:
    params = load_params()
    device = prepare_torch(params.runtime)
    import torch

    from stages import rag as rag_model
    from stages.checkpoints import Checkpoints, fingerprint
    from stages.contexts import TokenStore
    from stages.corpus import read_rows
    from stages.curves import Curves, summary
    from stages.recipes import mixed_precision
    from stages.search import load_index
    from stages.signs import training_signs
    from stages.tracking import environment_tags, open_run, root_folder
    from stages.training import Trainer

    encoder, generator = rag_model.load_base_parts(str(RETRIEVER / "question_encoder"), params.models.generator)
    torch.manual_seed(params.train.seed)
    rag = rag_model.open_rag(
        encoder, generator, load_index(INDEX), TokenStore.open(TOKENS), params.retriever.n_docs, params.lengths, device
    )
    examples = {}
    for split in ("train", "validation"):
        rows = read_rows(PREPARED / f"{split}.arrow")
        examples[split] = rag.examples(list(rows["question"]), [answers[0] for answers in rows["answers"]])

    root = root_folder()
    generator_files = [Path(params.models.generator)] if Path(params.models.generator).is_dir() else []
    name = fingerprint(settings_of(params), [PREPARED, TOKENS, RETRIEVER / "question_encoder", INDEX, *generator_files])
    checkpoints = Checkpoints(root / ".checkpoints" / name, params.train.save_total_limit)
    trainer = Trainer(
        rag,
        params.recipe,
        params.train,
        mixed_precision(params.recipe.precision, device),
        params.train.seed,
        checkpoints,
    )

    tracker = open_run(
        root, params.tracking.experiment, None, f"{params.train.recipe}-{name[:6]}",
        root / ".tracking" / f"train-{name}.jsonl", params.tracking.system_metrics_seconds or None,
    )  # fmt: skip
    curves = Curves(tracker, root / "tensorboard" / name if params.recipe.tensorboard else None)
    with tracker:
        tracker.set_tags({**environment_tags(Path.cwd()), "recipe": params.train.recipe, "fingerprint": name})
        tracker.log_params(settings_of(params))
        for split in ("passages", "train", "validation"):
            file = PREPARED / f"{split}.arrow"
            tracker.log_dataset(split, fingerprint({}, [file]), str(file), split, {"rows": len(read_rows(file))})

        trainer.run(examples["train"], examples["validation"], curves.point)

        metrics = summary(trainer.progress, params.train, params.recipe.checkpoints == "best")
        rag_model.save_rag(rag, MODEL, params.recipe.marginalization)
        tracker.register_checkpoint(
            f"{params.train.recipe}-best" if params.recipe.checkpoints == "best" else f"{params.train.recipe}-last",
            root / MODEL, int(metrics["kept_step"]), {}, {"recipe": params.train.recipe},
        )  # fmt: skip
        verdicts = training_signs(trainer.progress.history, metrics, params.signs, device.type == "cuda")
        tracker.set_tags(verdicts.tags)
        tracker.log_text(verdicts.text, "signs-train.txt")
        tracker.flush()

    MODEL.joinpath("run.json").write_text(
        json.dumps({"run_id": tracker.run_id, "experiment": params.tracking.experiment}) + "\n", encoding="utf-8"
    )
    METRICS.parent.mkdir(exist_ok=True)
    METRICS.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    curves.write_csv(trainer.progress.history, CURVES)
    checkpoints.remove()
    print(verdicts.text)
    print(f"validation loss {metrics['val_loss_per_sequence']:.3f} nats a question at step {int(metrics['kept_step'])}")


if __name__ == "__main__":
    run(main)
