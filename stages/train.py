"""Stage 4: joint training of question encoder and generator under one of the recipes of params.yaml.

    python -m stages.train                          # reads data/prepared, tokens, retriever, index; writes data/model
    dvc exp run -S train.max_steps=10               # a tiny run
    dvc exp run -S train.recipe=old                 # the old recipe, for comparison
    torchrun --nproc-per-node=4 -m stages.train     # or runtime.processes: 4; four ranks, the same updates
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 -m stages.train     # each holding a quarter

The result is a transformers RAG checkpoint; where the context encoder trains too (train.index_refresh_steps), it and the
index of its vectors lie beside it. Killed and started again, it goes on from its last checkpoint.
"""

import json
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import root_folder, run
from stages.params import Params, load_params

PREPARED, TOKENS, RETRIEVER, INDEX = (Path("data") / name for name in ("prepared", "tokens", "retriever", "index"))
LEXICAL = Path("data/lexical")
MODEL, METRICS, CURVES = Path("data/model"), Path("metrics/train.json"), Path("metrics/curves.csv")


def settings_of(params: Params) -> dict:
    """What this stage reads from params.yaml; dvc.yaml lists the same keys."""
    return {
        "models": params.models.model_dump(include={"generator", "chat_template", "lora"}),
        "lengths": params.lengths.model_dump(),
        "retriever": params.retriever.model_dump(include={"n_docs", "score_scale", "hybrid_depth", "hybrid_weight"}),
        "train": params.train.model_dump(),
        "recipe": params.recipe.model_dump(),
    }


def main() -> None:
    params = load_params()
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
    import torch
    from transformers import DPRContextEncoder

    from stages.bm25.hits import read_hits
    from stages.compute import ranks
    from stages.compute.precision import mixed_precision
    from stages.corpus.arrow import read_rows
    from stages.encoders.encoder import load_encoder
    from stages.encoders.mining import tokenize_passages
    from stages.generation.lora import add_lora
    from stages.machine.signals import Interrupts
    from stages.rag import folder
    from stages.rag.model import open_rag_on
    from stages.search.passage_encoder import PassageEncoder
    from stages.storage import leftovers, manifest
    from stages.storage.checkpoints import Checkpoints, checkpoint_folder, describe, digest, fingerprint
    from stages.storage.outside_files import find
    from stages.tracking.runs import environment_tags, open_run
    from stages.training import fsdp
    from stages.training.curves import Curves, summary
    from stages.training.index_refresh import check_ranks
    from stages.training.skipped_steps import Skips
    from stages.training.trainer import Trainer
    from stages.verdicts.of_training import training_signs

    check_ranks(params.train.index_refresh_steps, ranks.world())
    base_generator = find(params.models.generator)
    parts = folder.load_base_parts(
        str(RETRIEVER / "question_encoder"), str(base_generator), params.models.chat_template
    )
    torch.manual_seed(params.train.seed)
    if params.models.lora:
        add_lora(parts[1].model, params.models.lora)
    rows = {split: read_rows(PREPARED / f"{split}.arrow") for split in ("passages", "train", "validation")}
    passage_encoder, trained_encoders = None, [RETRIEVER / "question_encoder"]
    if params.train.index_refresh_steps:
        trained_encoders.append(RETRIEVER / "context_encoder")
        encoder = load_encoder(str(trained_encoders[-1]), "models.context_encoder", DPRContextEncoder)
        passage_tokens = tokenize_passages(encoder, rows["passages"], params.lengths.passage_tokens)
        passage_encoder = PassageEncoder(encoder, passage_tokens)
    precision = mixed_precision(params.recipe.precision, device)
    rag = open_rag_on(parts, INDEX, TOKENS, params, device, passage_encoder, models_move=sharded is None)
    if sharded:
        fsdp.shard(rag, sharded, device, precision)
        if ranks.is_main():
            print("FSDP: padded forward passes, without CUDA graphs and without train.compile")
    if params.train.compile and rag.packed:
        rag.packed.compile()
    # Gradient checkpointing reads the random state on its way back, which a graph cannot.
    if params.runtime.cuda_graphs and device.type == "cuda" and not params.train.gradient_checkpointing:
        rag.record_graphs()
    examples = {}
    for split in ("train", "validation"):
        some = rows[split]
        hits = read_hits(LEXICAL, split, params.retriever.hybrid_depth, len(some), len(rows["passages"]))
        examples[split] = rag.examples(list(some["question"]), [answers[0] for answers in some["answers"]], hits)

    root = root_folder()
    lexical_files = [LEXICAL] if params.retriever.hybrid_depth else []
    generator_files = [base_generator] if base_generator.exists() else []
    description = describe(
        settings_of(params), [PREPARED, TOKENS, *trained_encoders, INDEX, *lexical_files, *generator_files]
    )
    name = fingerprint(description)
    ranks.wait()  # however unequally long the hosts' disks took
    ranks.check_same("fingerprint", int(name[:12], 16))
    if ranks.is_main():
        lock = leftovers.lock(root, name)
        for line in leftovers.lines(root, name, description):
            print(line)
        checkpoints = Checkpoints(checkpoint_folder(name), params.train.save_total_limit, description)
    ranks.wait()
    if not ranks.is_main():
        checkpoints = Checkpoints(checkpoint_folder(name), params.train.save_total_limit)
    journal = root / ".tracking" / f"train-{name}.jsonl"
    trainer = Trainer(
        rag,
        params.recipe,
        params.train,
        precision,
        params.train.seed,
        checkpoints,
        Skips(params.train.max_skipped_steps, list(rows["train"]["id"]), journal.with_name(f"skipped-{name}.json")),
        keep_threads=bool(params.runtime.threads),
    )

    if not ranks.is_main():
        with Interrupts() as interrupts:
            trainer.run(examples["train"], examples["validation"], lambda point: None, interrupts.asked)
        return

    tracker = open_run(
        root, params.tracking.experiment, None, f"{params.train.recipe}-{name[:6]}", journal,
        params.tracking.system_metrics_seconds or None, same_run=checkpoints.is_finished(),
    )  # fmt: skip
    curves = Curves(tracker, root / "tensorboard" / name if params.recipe.tensorboard else None)
    with tracker:
        tracker.set_tags({**environment_tags(Path.cwd()), "recipe": params.train.recipe, "fingerprint": name})
        tracker.log_params(settings_of(params))
        for split, content in rows.items():
            file = PREPARED / f"{split}.arrow"
            tracker.log_dataset(split, digest(file), str(file), split, {"rows": len(content)})

        with Interrupts() as interrupts:
            trainer.run(examples["train"], examples["validation"], curves.point, interrupts.asked)
        if trainer.progress.halvings:
            tracker.set_tags({"out_of_memory": ", ".join(trainer.progress.halvings)})

        metrics = summary(trainer.progress, params.train, params.recipe.checkpoints == "best")
        folder.save_rag(rag, MODEL, params.recipe.marginalization)
        tracker.register_checkpoint(
            f"{params.train.recipe}-best" if params.recipe.checkpoints == "best" else f"{params.train.recipe}-last",
            root / MODEL, int(metrics["kept_step"]), {}, {"recipe": params.train.recipe},
        )  # fmt: skip
        verdicts = training_signs(trainer.progress.history, metrics, params.signs, device.type == "cuda")
        tracker.set_tags(verdicts.tags)
        tracker.log_text(verdicts.text, "signs-train.txt")
        tracker.flush()

    run_file = MODEL / "run.json"
    run_id = {"run_id": tracker.run_id, "experiment": params.tracking.experiment, "fingerprint": name}
    run_file.write_text(json.dumps(run_id) + "\n", encoding="utf-8")
    manifest.record(run_file)
    METRICS.parent.mkdir(exist_ok=True)
    METRICS.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    curves.write_csv(trainer.progress.history, CURVES)
    lock.release()
    print(verdicts.text)
    print(f"validation loss {metrics['val_loss_per_sequence']:.3f} nats a question at step {int(metrics['kept_step'])}")


if __name__ == "__main__":
    run(main)
