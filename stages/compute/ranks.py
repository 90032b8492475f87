"""Data parallelism: several processes (ranks) that train or encode together, gloo on CPUs and NCCL on GPUs.

Without a launcher there is no process group and every function here does what is right for one process. Nothing is sent
as pickled objects, only tensors. What the hosts must agree on travels over gloo, so that nobody waits for a GPU; only
gradients and searches in parts travel over NCCL.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from stages.machine import launching
from stages.machine.signals import Interrupted

TIMEOUT = timedelta(seconds=60)  # of a collective: a rank that hangs ends the job
# Of `wait`: while rank 0 writes, builds or waits for another training; a rank that died is known at once here too.
PATIENCE = timedelta(days=365)
NOT_OURS = {
    "ACCELERATE_USE_FSDP": "FSDP outside of stages.train",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
NOBODY = 1 << 62

_patient: dist.ProcessGroup | None = None
_sums: dist.ProcessGroup | None = None  # on GPUs that of all, whose NCCL nearly nobody else uses


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """While open, the ranks that the launcher started are connected; they leave it together.

    Raises ValueError where the launcher asks for something that this training cannot do.
    """
    global _patient, _sums
    if not launching.launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    refuse_other_schemes()
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None
    )
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    _sums = None if on_gpu else dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield
    except Interrupted:
        _leave()
        raise
    # Not after an error: the others are somewhere else, and the launcher ends them.
    _leave()


def _leave() -> None:
    global _patient, _sums
    wait()
    _patient = _sums = None
    dist.destroy_process_group()


def refuse_other_schemes() -> None:
    """Raises ValueError where `accelerate launch` was told to shard the model, other than by fsdp.py, or to change
    the gradients."""
    for variable, name in NOT_OURS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ValueError(f"{variable} is set: {name} is not supported; launch without it")
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", ""):
        raise ValueError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set: accumulation is train.gradient_accumulation_steps here; launch "
            "without it"
        )


def world() -> int:
    """Number of ranks, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 to world - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0, which alone writes, prints and tracks."""
    return rank() == 0


def share(items: list) -> list:
    """This rank's part: every world-th item, so that parts of anything sorted weigh the same."""
    return items[rank() :: world()]


def wait() -> None:
    """Returns when every rank is here, however long rank 0 takes: weeks, where it waits for another training."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1), group=_patient)  # a barrier would go to the GPU where there is one


def least(numbers: list[int]) -> list[int]:
    """The least over the ranks, number by number."""
    return _reduced(torch.tensor(numbers, dtype=torch.int64), dist.ReduceOp.MIN).tolist()


def most(number: int) -> int:
    """The most over the ranks."""
    return int(_reduced(torch.tensor(number, dtype=torch.int64), dist.ReduceOp.MAX))


def gathered(numbers: list[int]) -> list[list[int]]:
    """Every rank's numbers, in the order of the ranks."""
    table = torch.zeros(world(), len(numbers), dtype=torch.int64)
    table[rank()] = torch.tensor(numbers)
    return _reduced(table, dist.ReduceOp.SUM).tolist()


def summed(values: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Each number summed over the ranks, in fp64; without other ranks the values themselves."""
    if world() == 1:
        return values
    total = _reduced(torch.tensor([float(value) for value in values.values()], dtype=torch.float64), dist.ReduceOp.SUM)
    return dict(zip(values, total.tolist(), strict=True))


def check_same(what: str, number: float) -> None:
    """Raises ValueError, on every rank, where they do not have the same number; `what` says of what."""
    both = torch.tensor([number, -number], dtype=torch.float64)
    low, high = _reduced(both, dist.ReduceOp.MIN).tolist()
    if -high - low > 1e-9 * abs(low):
        raise ValueError(
            f"the {world()} ranks do not have the same {what}; they need the same code, params.yaml, data and .checkpoints "
            "(shared storage)"
        )


def begin_sum(values: Tensor) -> dist.Work:
    """Begins to replace `values` by their sum over the ranks, the same bits on each of them; `wait` of what it returns ends
    that, on a GPU for what is queued behind it.

    All ranks begin their sums in the same order. On CPUs exchanges of other kinds may come between them on some ranks
    alone, on GPUs only those that travel over gloo.
    """
    return dist.all_reduce(values, group=_sums, async_op=True)


def _reduced(values: Tensor, how: dist.ReduceOp) -> Tensor:
    if world() > 1:
        dist.all_reduce(values, how)
    return values
