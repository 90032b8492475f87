"""How questions become optimizer updates: the switches of a recipe that are not in the loss.

A new-recipe step is one update over batch_size x gradient_accumulation_steps questions, forwarded batch_size at a time,
each question weighing the same. The stream of questions goes on over an epoch's end: no update is smaller than the others,
where a single question would move the weights as much as a whole step. The old recipe takes one batch, steps after every
gradient_accumulation_steps questions in it, and drops the gradients of what is left at the batch's end.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from stages.corpus.epochs import epoch_order
from stages.settings.runs import Recipe


@dataclass(frozen=True)
class Update:
    """Questions of one optimizer update: `micro_batches` hold rows of the training set, one forward pass each."""

    micro_batches: list[list[int]]
    divisor: int  # each question's loss is divided by this before the backward pass
    applied: bool  # False: the gradients are computed and thrown away
    epoch: int = 0

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


def updates(count: int, seed: int, recipe: Recipe, batch_size: int, accumulation: int) -> Iterator[Update]:
    """Endless updates over `count` training questions, epoch after epoch; the same ones each time, so that a training goes
    on by leaving out as many as it has taken.

    Across batches, each is of batch_size x accumulation questions: the last of an epoch and the first of the next.
    """
    orders = (epoch_order(count, seed, epoch) for epoch in itertools.count())
    if recipe.accumulation == "across_batches":
        stream = itertools.chain.from_iterable(orders)
        for taken in itertools.count(step=batch_size * accumulation):
            step = list(itertools.islice(stream, batch_size * accumulation))
            yield Update(_forwards(_chunks(step, batch_size), recipe), len(step), applied=True, epoch=taken // count)
    for epoch, order in enumerate(orders):
        for batch in _chunks(order, batch_size):
            for chunk in _chunks(batch, accumulation):
                full = len(chunk) == accumulation
                yield Update(_forwards([chunk], recipe), accumulation, full, epoch)


def _forwards(batches: list[list[int]], recipe: Recipe) -> list[list[int]]:
    if recipe.batching == "one_at_a_time":
        return [[row] for batch in batches for row in batch]
    return batches


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]
