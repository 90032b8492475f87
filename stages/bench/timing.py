"""What every benchmark counts with: the machine, seconds of a run, peak memory."""

import statistics
import time
from collections.abc import Callable

import torch

from stages.training.throughput import matrix_rate, synchronize


def machine(device: torch.device) -> dict:
    """The device and the rate of its matrix products, which all MFU refers to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"device": name, "torch": torch.__version__, "matrix_tflop_per_second": matrix_rate(device, half) / 1e12}


def timed(run: Callable[[], object], runs: int, device: torch.device) -> dict[str, float]:
    """Seconds of `run` over `runs` runs after one that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return spread(seconds[1:])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "best": min(values), "worst": max(values)}


class Peak:
    """GiB of the GPU that torch took at most since `start`, for tensors and for CUDA graphs; zero on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def gib(self) -> float:
        return torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else 0.0
