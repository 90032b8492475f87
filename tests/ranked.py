"""What the ranks of tests/compute/test_ranks.py do: `python -m tests.ranked WORK FOLDER PROCESSES [SETTINGS]`, settings as JSON.

Rank 0 leaves weights.safetensors and history.json in the folder, every rank its checksum.
"""

import json
import signal
import sys
from pathlib import Path

from stages.machine.entry import run
from stages.machine.launching import launch


def train(
    folder: Path, stop_at: int | None = None, sgd: bool = True, shards: bool = False, fsdp: bool = False,
    generator: str = "bart", lora: bool = False, precision: str = "no", questions: int | None = None,
    recipe: dict | None = None, golds: list[list[int]] | None = None, **settings,
):  # fmt: skip
    """A training of the tiny model; at step `stop_at` the last rank alone is asked to stop."""
    import torch

    from stages.compute import ranks
    from stages.generation.lora import add_lora
    from stages.machine.signals import Interrupts
    from stages.search.sharded_search import ShardedSearch
    from stages.settings.retrieval import Lora
    from stages.storage.checkpoints import Checkpoints
    from stages.training import trainer
    from tests import tiny_rag
    from tests.rag.test_families import rag_of

    if sgd:  # Adam's first steps are the gradient's sign, which would hide a wrong scale
        trainer.make_optimizer = lambda rag, settings: torch.optim.SGD(rag.parameters(), lr=settings.learning_rate)
    rag = rag_of(generator)
    if lora:
        add_lora(rag.generator_model, Lora(rank=2, alpha=4, dropout=0.0, target_modules=None, base="fp32"))
    if fsdp:
        shard(folder, rag, precision)
    if shards:
        rag.index.exact = ShardedSearch(rag.index.vectors, torch.device("cpu"))
    trainer = trainer.Trainer(
        rag,
        tiny_rag.NEW.model_copy(update=recipe or {}),
        tiny_rag.SETTINGS.model_copy(update=settings),
        precision,
        7,
        Checkpoints(folder / "checkpoints", 2),
    )
    asked = tiny_rag.QUESTIONS[:questions], tiny_rag.ANSWERS[:questions]
    examples, taught = rag.examples(*asked), rag.examples(*asked, golds=golds)

    def stopped() -> int | None:
        if trainer.progress.step == 2:
            (folder / "running").touch()
        last = ranks.rank() == ranks.world() - 1
        return signal.SIGTERM if last and trainer.progress.step == stop_at else interrupts.asked()

    with Interrupts() as interrupts:
        trainer.run(taught, examples, lambda point: None, stopped)
    return trainer


def shard(folder: Path, rag, precision: str) -> None:
    """As stages.train does it; leaves the share of the generator that this rank holds."""
    import torch

    from stages.compute import ranks
    from stages.training import fsdp

    fsdp.shard(rag, fsdp.Sharding(), torch.device("cpu"), precision)
    sizes = [(value.to_local().numel(), value.numel()) for value in rag.generator_model.parameters()]
    own, all_of_it = map(sum, zip(*sizes, strict=True))
    (folder / f"share-{ranks.rank()}.json").write_text(json.dumps(own / all_of_it))


def keep(folder: Path, trainer) -> None:
    from safetensors.torch import save_file

    from stages.compute import ranks
    from stages.storage.checkpoints import own_weights

    if ranks.is_main() or not trainer.sharded:
        save_file(own_weights(trainer.rag), folder / f"weights-{ranks.rank()}.safetensors")
    if ranks.is_main():
        (folder / "history.json").write_text(json.dumps(trainer.progress.history))


def out_of_memory(folder: Path, room: int = 1, validating: bool = False, **settings):
    """The last rank has room for `room` questions a forward pass; where it is `validating`, in validation alone."""
    import torch

    from stages.compute import ranks
    from stages.rag.model import Rag
    from stages.training.accumulation import Accumulation

    def refuse(questions: int) -> None:
        if ranks.rank() == ranks.world() - 1 and questions > room:
            raise torch.OutOfMemoryError("out of memory, says the test")

    add, forward = Accumulation.add, Rag.forward

    def limited(self, examples, passes, *rest):
        refuse(max(map(len, passes)))
        add(self, examples, passes, *rest)

    def limited_forward(self, batch, *rest, **named):
        if not torch.is_grad_enabled():
            refuse(len(batch.question_ids))
        return forward(self, batch, *rest, **named)

    if validating:
        Rag.forward = limited_forward
    else:
        Accumulation.add = limited
    return train(folder, **settings)


def not_finite(folder: Path, **settings):
    """In the second step one rank's gradient is NaN."""
    from dataclasses import replace

    from stages.compute import ranks
    from stages.training.accumulation import Accumulation

    original = Accumulation.gradients

    def poisoned(self, training, update, progress, window):
        bad = ranks.is_main() and progress.step == 1
        original(self, training, replace(update, divisor=float("nan")) if bad else update, progress, window)

    Accumulation.gradients = poisoned
    return train(folder, **settings)


def search(folder: Path, rounded: bool = False) -> None:
    """As many searches as the rank's number, of unequally many questions, over parts smaller than k and larger.

    `rounded`: each rank has its own part alone, in bf16.
    """
    import torch
    from safetensors.torch import save_file

    from stages.compute import ranks
    from stages.search.sharded_search import ShardedSearch, part_of

    found = {}
    for passages in (7, 5000):
        vectors, questions = problem(passages)
        sharded = ShardedSearch(vectors, torch.device("cpu"))
        if rounded:
            rows = part_of(passages)
            part = vectors[rows.start : rows.stop].bfloat16()
            sharded = ShardedSearch(part, torch.device("cpu"), rows.start)
        for turn in range(ranks.rank()):
            found[f"{passages}-{turn}"] = sharded.search(questions[: 3 * ranks.rank() + turn], 5)
        sharded.finish()
    if found:
        save_file(found, folder / f"rows-{ranks.rank()}.safetensors")


def problem(passages: int):
    """Vectors and questions, the same for everyone."""
    import torch

    drawn = torch.Generator().manual_seed(passages)
    return torch.randn(passages, 32, generator=drawn) * 3, torch.randn(12, 32, generator=drawn)


def main() -> None:
    work, folder, processes, *settings = sys.argv[1:]
    settings = json.loads(settings[0]) if settings else {}
    folder = Path(folder)
    if launch(int(processes), "cpu"):
        return
    import torch

    from stages.compute import ranks
    from stages.training import fsdp

    torch.set_num_threads(1)
    if settings.get("fsdp") == "asked":  # by accelerate
        settings["fsdp"] = fsdp.asked() is not None
    with ranks.group(torch.device("cpu")):
        do(work, folder, **settings)


def do(work: str, folder: Path, **settings) -> None:
    """A rank's part of it."""
    if work == "encode":
        from tests.search import test_passage_vectors

        test_passage_vectors.encode(folder)
    elif work == "search":
        search(folder, **settings)
    elif work == "gradients":
        from tests.training import test_gradients_of_ranks

        test_gradients_of_ranks.compare(folder)
    elif work == "mistake":
        raise_on(settings["rank"])
    else:
        keep(folder, {"train": train, "oom": out_of_memory, "nan": not_finite}[work](folder, **settings))


def raise_on(rank: int | None) -> None:
    from stages.compute import ranks
    from stages.params import load_params

    if rank in (None, ranks.rank()):
        load_params(Path("nowhere.yaml"))
    ranks.wait()


if __name__ == "__main__":
    run(main)
