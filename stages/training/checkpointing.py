"""A training's checkpoints: written beside its steps, brought back where it goes on."""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from stages.compute import ranks
from stages.rag.found_once import PREFIX, FoundOnce
from stages.rag.model import Rag
from stages.storage import checkpoints as checkpointing
from stages.storage.checkpoints import Checkpoints
from stages.training import fsdp
from stages.training.index_refresh import SNAPSHOT, Refresh
from stages.training.progress import Progress, Window


class Keeper:
    """Keeps what a training needs to go on, and its best weights if `best`; does nothing without `checkpoints`.

    Every rank calls everything. Rank 0 writes what it holds, or what all of them hold a part of.
    """

    def __init__(self, checkpoints: Checkpoints | None, best: bool, rag: Rag, optimizer: torch.optim.Optimizer,
                 schedule: LambdaLR, scaler: torch.amp.GradScaler | None, refresh: Refresh, keep_threads: bool):  # fmt: skip
        self.checkpoints, self.best, self.rag, self.refresh = checkpoints, best, rag, refresh
        self.optimizer, self.schedule, self.scaler = optimizer, schedule, scaler
        self.keep_threads = keep_threads
        self.once: FoundOnce | None = None  # of this training, if it has one
        self.writer, self.writing = ThreadPoolExecutor(max_workers=1), Future()
        self.writing.set_result(None)
        self.copies: dict[str, list] = {}  # of the last checkpoint and the last best weights, to be written over

    def close(self) -> None:
        """Waits for the disk; raises what went wrong there."""
        self.writing.result()

    def save(self, progress: Progress, window: Window) -> None:
        """Writes what rank 0 holds and the sums of all ranks: any number of ranks may go on from there."""
        sums = window.summed()
        window.waited += window.waits.seconds()
        window.waits.gaps.clear()
        state = {
            "progress": vars(progress),
            "window": window.state() | (sums if ranks.world() > 1 else {}),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "random": checkpointing.random_state(),
            "threads": torch.get_num_threads(),
            "ranks": ranks.world(),
        }
        weights = (
            checkpointing.own_tensors(self.rag) | self.refresh.tensors() | (self.once.tensors() if self.once else {})
        )
        best = progress.best_step if self.best and math.isfinite(progress.best_loss) else None
        self._write(self.checkpoints.save, progress.step, [weights, state], best)
        ranks.wait()

    def save_best(self, step: int) -> None:
        """Writes the weights as the best so far, if that is wanted."""
        if self.checkpoints and self.best:
            self._write(self.checkpoints.save_best, step, [checkpointing.own_tensors(self.rag)])
            ranks.wait()

    def finish(self, progress: Progress) -> None:
        """Brings back the weights that the recipe keeps, and keeps them until DVC has taken the model."""
        if not self.checkpoints:
            return
        self.writing.result()
        ranks.wait()  # until rank 0 has written what all read
        if self.best:
            checkpointing.load_weights(self.rag, self.checkpoints.best(progress.best_step))
            self.rag.weights_changed()
        fsdp.make_whole(self.rag)
        ranks.wait()  # until all have read what rank 0 replaces
        if ranks.is_main():
            self.checkpoints.finish(checkpointing.own_weights(self.rag), {"progress": vars(progress)})
        ranks.wait()

    def finished(self) -> Progress | None:
        """Brings back the weights of this training where it has finished already, and its progress."""
        found = self.checkpoints.finished() if self.checkpoints else None
        if found is None:
            return None
        weights, state = found
        checkpointing.load_weights(self.rag, weights)
        self.rag.weights_changed()
        fsdp.make_whole(self.rag)
        self.rag.eval()
        return Progress(**state["progress"])

    def resume(self, window: Window, device: torch.device) -> Progress | None:
        """Brings back all of the latest checkpoint, `window` too, and its progress; None where there is none."""
        found = self.checkpoints.latest() if self.checkpoints else None
        if found is None:
            return None
        weights, state = found
        weights, snapshots = without_prefix(weights, SNAPSHOT)
        weights, found_once = without_prefix(weights, PREFIX)
        if self.once:
            self.once.restore(found_once)
        checkpointing.load_weights(self.rag, weights)
        self.rag.weights_changed()
        self.optimizer.load_state_dict(fsdp.parts_of_moments(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        checkpointing.set_random_state(state["random"])
        if ranks.is_main():  # the sums of all ranks
            window.restore(state["window"], device)
        progress = Progress(**state["progress"])
        if device.type == "cpu" and state["ranks"] == ranks.world():
            checkpointing.restore_threads(state["threads"], self.keep_threads)
        self.refresh.restore(snapshots, progress.step)
        return progress

    def _write(self, write: Callable, step: int, state: list, *what) -> None:
        """Writes a copy of `state` beside the steps to come: a disk takes half a minute for BART-large and its optimizer.

        One at a time, or copies would pile up in memory; what went wrong with the last one is raised here.
        """
        self.writing.result()
        if fsdp.is_sharded(self.rag):
            ranks.wait()  # for rank 0's disk
        elif not ranks.is_main():
            return
        copies = checkpointing.snapshot(state, self.copies.get(write.__name__))
        if ranks.is_main():
            self.copies[write.__name__] = copies
            self.writing = self.writer.submit(write, step, *copies, *what)


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors whose names do not begin so, and those that lie beside the model's under this prefix."""
    beside = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: value for name, value in tensors.items() if name not in beside}, beside
