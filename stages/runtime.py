"""How a stage runs on this machine: errors in one line, the device, the number of threads."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from stages import launching
from stages.interrupts import Interrupted, end_with_parent
from stages.params import Runtime

RANK_0_FIRST_SECONDS = 10


def root_folder() -> Path:
    """The real repository root: $DVC_ROOT where DVC runs us, in temp runs too, else the current folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; a user's mistake (a ValueError raised by our own code) ends it with one line.

    Anything else keeps its traceback: it is ours or a library's to explain. A signal ends it with exit code 128 plus the
    signal's number, as a shell would report it.
    """
    if "DVC_STAGE" in os.environ or launching.has_watching_parent():
        end_with_parent()
    try:
        main()
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent
        if raised_in != Path(__file__).resolve().parent:
            raise
        if launching.rank():
            # A mistake is mostly every rank's: rank 0 tells it, and the launcher ends us meanwhile.
            time.sleep(RANK_0_FIRST_SECONDS)
            sys.exit(f"error on rank {launching.rank()}: {error}")
        sys.exit(f"error: {error}")
    except Interrupted as interrupted:
        if not launching.rank():
            print(interrupted.line, file=sys.stderr)
        sys.exit(128 + interrupted.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def prepare_torch(runtime: Runtime):
    """The torch device to compute on, with torch's threads set; raises ValueError for a GPU that is not there."""
    # Read when the GPU's memory is first asked for. Without it, blocks of one batch's size do not serve the next larger.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name of old
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch

    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device: cuda, but torch finds no usable GPU; use auto or cpu")
    use_cuda = runtime.device == "cuda" or (runtime.device == "auto" and torch.cuda.is_available())
    torch.set_num_threads(runtime.threads or free_cores())
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention takes about 15 ms to plan each new shape, and here nearly every batch has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
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


def free_cores() -> int:
    """Cores that nobody else is using right now, at least one; of several ranks on this host, a rank's part of them.

    More threads than free cores is not a little slower but several times: every barrier waits for the contended one.
    OMP_NUM_THREADS is an upper bound where it is set.
    """
    import psutil

    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    busy = psutil.cpu_percent(interval=0.5, percpu=True)
    free = sum(1 for core in allowed if core >= len(busy) or busy[core] < 60)
    limit = int(os.environ.get("OMP_NUM_THREADS") or len(allowed))
    return max(1, min(free // launching.ranks_on_this_host(), limit))
