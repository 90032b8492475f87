"""Several processes of one stage on this host: who started this one, and how a stage starts itself several times.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; `launch` sets the same, so that a rank
need not know who started it. Not through torchrun, because that ends a training 30 seconds after Ctrl-C, whether its
checkpoint is written or not, sends a terminal's Ctrl-C twice, and closes a user's mistake of one line with a page of its
own. Nothing heavy is imported here: this process only waits.
"""

import os
import signal
import socket
import subprocess
import sys
import time

POLL_SECONDS = 0.1
GRACE_SECONDS = 3  # for the other ranks to end by themselves once one has failed
STARTED_HERE = "STAGE_LAUNCHED_ITSELF"


def launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number among all ranks of all hosts; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its host, which is that of its GPU; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_on_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def by_torchrun() -> bool:
    """Whether the launcher is torchrun, which `accelerate launch` uses too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def has_watching_parent() -> bool:
    """Whether the parent watches over this process, so that it has no business without it."""
    return STARTED_HERE in os.environ or by_torchrun()


def launch(processes: int, device: str) -> bool:
    """Starts this very command `processes` times (0: one a GPU), waits, and says whether it did so.

    Does nothing, False, where a launcher started us or one process is wanted. A signal is passed on to every rank. Ends
    with the exit code of the first rank that failed, the others being ended soon after.
    """
    if launched():
        return False
    if processes == 0:
        processes = gpus() if device != "cpu" else 1
    if processes <= 1:
        return False
    code = _watch(_start(processes))
    if code:
        sys.exit(code)
    return True


def gpus() -> int:
    """GPUs that torch finds on this host."""
    import torch

    return torch.cuda.device_count()


def _start(processes: int) -> list[subprocess.Popen]:
    module = sys.modules["__main__"].__spec__.name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), STARTED_HERE: "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes)),
    }  # fmt: skip
    if "lo" in (name for _, name in socket.if_nameindex()):
        common.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would ask for the host's name, which need not resolve
    # A session of its own: a terminal's Ctrl-C then reaches a rank once, through us.
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *sys.argv[1:]], start_new_session=True,
            env=common | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in range(processes)
    ]  # fmt: skip


def _watch(ranks: list[subprocess.Popen]) -> int:
    """Waits for all ranks; returns 0 or the first failure's exit code, 128 plus the signal's number after a signal."""
    asked: list[int] = []

    def pass_on(number: int, _frame) -> None:
        asked.append(number)
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    failed = deadline = None
    try:
        while any(process.poll() is None for process in ranks):
            time.sleep(POLL_SECONDS)
            if failed is None and (failed := _failed(ranks)) is not None:
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline and time.monotonic() > deadline:
                break
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = failed if failed is not None else _failed(ranks)
    if failed is None:
        return 0
    code = ranks[failed].returncode
    if code < 0 and not asked:
        name = signal.Signals(-code).name
        print(
            f"error: rank {failed} of {len(ranks)} was ended by {name}, so all were (SIGKILL: look whether the host's memory "
            "ran out); the same command starts again, a training from its last checkpoint",
            file=sys.stderr,
        )
    return 128 - code if code < 0 else code


def _failed(ranks: list[subprocess.Popen]) -> int | None:
    """The rank that failed; where several did, one that a signal ended: the others then failed for want of it."""
    codes = {number: code for number, process in enumerate(ranks) if (code := process.poll())}
    return min(codes, key=lambda number: (codes[number] >= 0, number), default=None)
