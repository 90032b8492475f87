"""Out of memory: the same update in smaller forward passes.

An update is the sum of its questions' gradients, each divided by the same number, so it may be cut up in any way. What
fails is begun again from zeroed gradients, because a backward pass that ran out of memory may have added a part of its
own already. Dropout draws start from the same state again, but over other shapes: the masks differ from those that the
larger batch would have had, their distribution does not, and a repeated run draws the same ones.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from stages.machine import launching

REMEDIES = "lower lengths.context_tokens or retriever.n_docs, take a smaller model, or close what else uses the memory"


class SingleQuestion(ValueError):
    """A pass of one question did not fit: there is no smaller one."""

    def __init__(self):
        super().__init__(f"out of memory with a single question; {REMEDIES}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether CUDA, the host's allocator or Python itself had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


def split(micro_batches: list[list[int]], largest: int | None) -> list[list[int]]:
    """The same rows in the same order, at most `largest` together; None leaves them as they are."""
    if largest is None:
        return micro_batches
    return [rows[first : first + largest] for rows in micro_batches for first in range(0, len(rows), largest)]


def halved(size: int) -> int:
    """Half of a size that did not fit; 0 where it was one question already."""
    return (size + 1) // 2 if size > 1 else 0


def free_memory() -> None:
    """Gives back what the failed pass left behind; call it outside of the `except`, which holds the pass's tensors."""
    clear_device_cache(garbage_collection=True)


def in_batches(count: int, size: int, work: Callable[[list[int]], object], halve: bool = True) -> Iterator:
    """`work` of the rows 0 to count - 1 in their order, `size` together; where memory runs out (`halve`), half as many
    from there on. Raises SingleQuestion where one alone does not fit."""
    first = 0
    while first < count:
        rows = list(range(first, min(first + size, count)))
        try:
            result = work(rows)
        except (RuntimeError, MemoryError) as error:
            if not halve or not is_out_of_memory(error):
                raise
            size = halved(len(rows))
            if not size:
                raise SingleQuestion from None
        else:
            yield result
            first += len(rows)
            continue
        free_memory()
        if not launching.rank():
            print(f"out of memory with {len(rows)} questions at once: {size} from here on", file=sys.stderr)
