"""What writing checkpoints costs: the seconds of one against those of the steps between two."""

import shutil
import time
from pathlib import Path

import torch

from stages.checkpoints import Checkpoints
from stages.leftovers import FOLDER

LARGE_STEP_SECONDS = 0.5  # a BART-large step of 32 questions; the shipped `signs` call 1 s slow


def write_seconds(folder: Path, weights: dict[str, torch.Tensor], state: dict, times: int = 3) -> float:
    """Median seconds of `Checkpoints.save` on the disk under `folder`, hashing and fsync included."""
    checkpoints = Checkpoints(folder, keep=1)
    try:
        spent = []
        for step in range(times):
            started = time.perf_counter()
            checkpoints.save(step, weights, state)
            spent.append(time.perf_counter() - started)
        return sorted(spent)[times // 2]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def synthetic(gigabytes: float) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and an AdamW state of twice their size, `gigabytes` in all, in 4-MiB tensors as of a 1024 x 1024 layer."""
    count = max(1, int(gigabytes * 1e9 / 3 / (1 << 22)))
    weights = {f"layer.{number}": torch.randn(1024, 1024) for number in range(count)}
    moments = {
        number: {"exp_avg": value.clone(), "exp_avg_sq": value.square()}
        for number, value in enumerate(weights.values())
    }
    return weights, {"optimizer": {"state": moments}}


def share(write: float, step: float, save_steps: int = 1000) -> float:
    """Percent that one write every `save_steps` steps adds to the training's time."""
    return 100 * write / (step * save_steps)


def report(gigabytes: float) -> str:
    """The two lines of `python -m stages.chaos --checkpoint-cost`, measured on the checkout's disk."""
    folder = Path(FOLDER) / "cost"
    lines = []
    for name, size, step in (("small, 30 MB", 0.03, 0.2), (f"BART-large sizes, {gigabytes:g} GB", gigabytes, None)):
        seconds = write_seconds(folder, *synthetic(size))
        step = step or LARGE_STEP_SECONDS
        lines.append(
            f"{name}: {seconds:.2f} s a checkpoint, {size / seconds:.2f} GB/s; every 1,000 steps of {step:g} s that adds "
            f"{share(seconds, step):.2f} %"
        )
    return "\n".join(lines)
