"""How questions become optimizer updates: the switches of a recipe that are not in the loss.

A new-recipe step is one update over batch_size x gradient_accumulation_steps questions, forwarded batch_size at a time,
each question weighing the same. The old recipe takes one batch, steps after every gradient_accumulation_steps questions
in it, and drops the gradients of what is left at the batch's end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stages.params import Recipe


@dataclass(frozen=True)
class Update:
    """Questions of one optimizer update: `micro_batches` hold rows of the training set, one forward pass each."""

    micro_batches: list[list[int]]
    divisor: int  # each question's loss is divided by this before the backward pass
    applied: bool  # False: the gradients are computed and thrown away

    @property
    def rows(self) -> list[int]:
        return [row for micro_batch in self.micro_batches for row in micro_batch]

    @property
    def questions(self) -> int:
        return len(self.rows)


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raises ValueError for the old recipe's way through a batch on several ranks: it is defined for one process."""
    if ranks == 1:
        return
    for switch, old, new in (
        ("accumulation", "within_batch", "across_batches"),
        ("batching", "one_at_a_time", "true_batches"),
    ):
        if getattr(recipe, switch) == old:
            raise ValueError(
                f"recipes: {switch}: {old} is what one process did; use {switch}: {new} or one process in place of {ranks}"
            )


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a function of the seed and the epoch alone, so that a resumed run meets the same one."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def updates(count: int, seed: int, recipe: Recipe, batch_size: int, accumulation: int) -> Iterator[Update]:
    """Endless updates over `count` training questions, epoch after epoch; an epoch's last update may be short."""
    epoch = 0
    while True:
        order = epoch_order(count, seed, epoch)
        if recipe.accumulation == "across_batches":
            for step in _chunks(order, batch_size * accumulation):
                yield Update(_forwards(_chunks(step, batch_size), recipe), divisor=len(step), applied=True)
        else:
            for batch in _chunks(order, batch_size):
                for chunk in _chunks(batch, accumulation):
                    full = len(chunk) == accumulation
                    yield Update(_forwards([chunk], recipe), divisor=accumulation, applied=full)
        epoch += 1


def _forwards(batches: list[list[int]], recipe: Recipe) -> list[list[int]]:
    if recipe.batching == "one_at_a_time":
        return [[row] for batch in batches for row in batch]
    return batches


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU whose own units compute in bf16; older ones emulate it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(precision: str, device: torch.device) -> str:
    """accelerate's name of the precision that a recipe asks for on this device: 'no', 'bf16' or 'fp16'.

    Raises ValueError for fp16 on a CPU, where loss scaling has no kernels.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "no"
        return "bf16" if has_bf16(device) else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("recipes: precision: fp16 needs a GPU; use auto, bf16 or fp32 on a CPU")
    return "no" if precision == "fp32" else precision
