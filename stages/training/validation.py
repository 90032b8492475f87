"""The loss of the validation questions, the yardstick of every recipe."""

import torch

from stages.compute import ranks
from stages.compute.out_of_memory import SingleQuestion, in_batches
from stages.encoders.encoder import in_eval_mode
from stages.rag.batches import Examples
from stages.rag.model import Rag
from stages.training import fsdp

VALIDATION_BATCH = 16


def validation_loss(
    rag: Rag, validation: Examples, marginal: str, batch_size: int = VALIDATION_BATCH, reading: str = "each"
) -> dict[str, float]:
    """Mean NLL of the validation answers, without label smoothing, per sequence and per answer token, in nats.

    Reading together, that of the joint reading. A recipe that averages is measured by the RAG-Sequence marginal too: one
    yardstick for recipes to be compared by.
    `val_questions_without_passages` counts those for which nothing was found, answered from the question alone.
    Every rank takes its share of the answers and returns the same sums; with FSDP equally many, some for nothing. Raises
    SingleQuestion, on every rank, where one of them has no room for a single question.
    """
    measured = "token" if marginal == "token" else "sequence"
    mine = ranks.share(list(range(len(validation))))
    counted = len(mine)
    mine += [0] * fsdp.missing_passes(rag, counted)

    def sums(places: list[int]) -> list[float]:
        output = rag(rag.batch(validation, [mine[place] for place in places]), marginal=measured, reading=reading)
        real = slice(max(0, counted - places[0]))
        nothing_found = (output.rows[real] < 0).all(1).sum()
        return torch.stack([output.nll[real].double().sum(), nothing_found.double()]).tolist()

    parts: list[list[float]] = []
    no_room = False
    with torch.no_grad(), in_eval_mode(rag):
        try:
            parts += in_batches(len(mine), batch_size, sums, halve=not fsdp.is_sharded(rag))
        except SingleQuestion:
            no_room = True
    rag.index.finish_searches()
    total = ranks.summed({
        "nll": sum(nll for nll, _ in parts), "nothing_found": sum(count for _, count in parts), "no_room": no_room,
    })  # fmt: skip
    if total["no_room"]:
        raise SingleQuestion
    return {
        "val_loss_per_sequence": total["nll"] / len(validation),
        "val_loss_per_token": total["nll"] / int(validation.target_mask.sum()),
        "val_questions_without_passages": int(total["nothing_found"]),
    }
