"""What checkpoints cost: training waits while one is copied; the disk takes it beside the steps that follow."""

import shutil
import time
from pathlib import Path

import torch

from stages.storage.checkpoints import Checkpoints, snapshot
from stages.storage.leftovers import FOLDER

LARGE_STEP_SECONDS = 0.15  # a BART-large step of 32 questions on an H100


def measure(folder: Path, weights: dict[str, torch.Tensor], state: dict, times: int = 3) -> tuple[float, float]:
    """Median seconds of copying a checkpoint and of `Checkpoints.save` on the disk under `folder`, fsync included."""
    checkpoints = Checkpoints(folder, keep=1)
    try:
        copying, writing, copied = [], [], None
        for step in range(times):
            started = time.perf_counter()
            copied = snapshot([weights, state], copied)
            copying.append(time.perf_counter() - started)
            checkpoints.save(step, *copied)
            writing.append(time.perf_counter() - started - copying[-1])
        return sorted(copying)[times // 2], sorted(writing)[times // 2]
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


def share(copying: float, writing: float, step: float, save_steps: int = 1000) -> float:
    """Percent that one checkpoint every `save_steps` steps adds: the copy, and what of the writing outlasts the steps."""
    between = step * save_steps
    return 100 * (copying + max(0.0, writing - between)) / between


def report(gigabytes: float) -> str:
    """The two lines of `python -m stages.chaos --checkpoint-cost`, measured on the checkout's disk."""
    lines = []
    for name, size, step in (("small, 30 MB", 0.03, 0.2), ("BART-large sizes", gigabytes, LARGE_STEP_SECONDS)):
        copying, writing = measure(Path(FOLDER) / "cost", *synthetic(size))
        lines.append(
            f"{name}: {size:g} GB copied in {copying:.2f} s, written in {writing:.2f} s ({size / writing:.2f} GB/s) beside "
            f"the training; every 1,000 steps of {step:g} s that adds {share(copying, writing, step):.2f} %"
        )
    return "\n".join(lines)
