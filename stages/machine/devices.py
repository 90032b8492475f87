"""The device that a stage computes on, and its number of CPU threads."""

import gc
import os
import sys
import time

from stages.machine import launching
from stages.settings.runs import Runtime


def prepare_torch(runtime: Runtime):
    """The torch device to compute on, with torch's threads set; raises ValueError for a GPU that is not there."""
    # Read when the GPU's memory is first asked for. Without it, blocks of one batch's size do not serve the next larger.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name of old
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    load = Load()
    import_libraries()
    import torch

    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device: cuda, but torch finds no usable GPU; use auto or cpu")
    use_cuda = runtime.device == "cuda" or (runtime.device == "auto" and torch.cuda.is_available())
    torch.set_num_threads(runtime.threads or free_cores(load))
    # A sure model gives most of its vocabulary probabilities below 1e-38: to Intel's CPUs each is an exception, and a training
    # step takes up to ten times as long. Threads inherit this, so it comes before torch makes any.
    torch.set_flush_denormal(not use_cuda)
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention takes about 15 ms to plan each new shape, and here nearly every batch has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    no_bars_of_transformers()
    if not (use_cuda and launching.launched()):
        return torch.device("cuda" if use_cuda else "cpu")
    if launching.local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"{launching.ranks_on_this_host()} processes on this host, but torch finds {torch.cuda.device_count()} GPUs; "
            "start as many (runtime.processes: 0), or use runtime.device: cpu"
        )
    device = torch.device("cuda", launching.local_rank())
    torch.cuda.set_device(device)
    return device


def import_libraries() -> None:
    """Imports torch and what transformers' models need, with Python's garbage collector off.

    What they make stays: looking for garbage in it takes a seventh of the time, and some at each full collection later,
    which leaves out what is frozen.
    """
    if "transformers.modeling_utils" in sys.modules:  # what is garbage by now would be frozen too
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def allowed_cores() -> list[int]:
    """Cores that this process may run on; all of them where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def no_bars_of_transformers() -> None:
    """No bar for each model loaded or written, which takes milliseconds; the hub's for downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


class Load:
    """How busy others keep the cores, from when this is made to when it is read, half a second later at the earliest."""

    SECONDS = 0.5

    def __init__(self):
        import psutil

        psutil.cpu_percent(percpu=True)  # what it gives next begins here
        self.started, self.own = time.perf_counter(), time.process_time()

    def of_others(self) -> list[float]:
        """Percent of each core's time; what this process took itself is counted to the busiest."""
        import psutil

        time.sleep(max(0.0, self.started + self.SECONDS - time.perf_counter()))
        busy = psutil.cpu_percent(percpu=True)
        own = 100 * (time.process_time() - self.own) / (time.perf_counter() - self.started)
        for core in sorted(range(len(busy)), key=busy.__getitem__, reverse=True):
            ours = min(own, busy[core])
            busy[core], own = busy[core] - ours, own - ours
        return busy


def free_cores(load: Load | None = None) -> int:
    """Cores that nobody else is using right now, at least one; of several ranks on this host, a rank's part of them.

    More threads than free cores is not a little slower but several times: every barrier waits for the contended one.
    `load` has been watching for a while; of ranks, who start together and busy each other, it watches anew.
    OMP_NUM_THREADS is an upper bound where it is set; of a list, one number a level of nesting, the first. Raises ValueError.
    """
    allowed, ranks = allowed_cores(), launching.ranks_on_this_host()
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked and not (asked.isdecimal() and int(asked)):
        raise ValueError(
            f"OMP_NUM_THREADS: {os.environ['OMP_NUM_THREADS']} is no number of threads; set one or unset it"
        )
    limit = int(asked or len(allowed))
    if min(limit, len(allowed) // ranks) <= 1:
        return 1
    busy = (load if load and ranks == 1 else Load()).of_others()
    free = sum(1 for core in allowed if core >= len(busy) or busy[core] < 60)
    return max(1, min(free // ranks, limit))
