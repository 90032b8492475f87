"""Where a training works: its fingerprint, its checkpoints and its journal, held by one process at a time.

Lies at the real root, outside of DVC's outputs, also in DVC's temporary runs: a killed training goes on from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from stages.compute import ranks
from stages.machine.entry import root_folder
from stages.machine.signals import Interrupts
from stages.machine.stage_params import settings_of
from stages.params import Params
from stages.rag.batches import Examples
from stages.storage import leftovers
from stages.storage.checkpoints import Checkpoints, checkpoint_folder, describe, fingerprint
from stages.training.trainer import Trainer


@dataclass
class Workplace:
    name: str  # the fingerprint
    checkpoints: Checkpoints | None  # None: nothing is trained
    journal: Path  # of MLflow's records
    skipped: Path  # questions of skipped steps
    lock: FileLock | None  # rank 0's

    def run(self, trainer: Trainer, examples: dict[str, Examples], on_point: Callable[[dict], None]) -> None:
        """Trains to the end, or raises Interrupted behind the step at which a signal came."""
        with Interrupts() as interrupts:
            trainer.run(examples["train"], examples["validation"], on_point, interrupts.asked)

    def release(self) -> None:
        self.lock.release()


def take_workplace(params: Params, inputs: list[Path], trains: bool = True) -> Workplace:
    """Finds or makes the place of exactly this training; tells what it differs in from others, where it is new.

    Where nothing `trains` there are no checkpoints. Every rank calls it. Waits where another process trains the same.
    """
    root, description = root_folder(), describe(settings_of(params), inputs)
    name = fingerprint(description)
    ranks.wait()  # however unequally long the hosts' disks took
    ranks.check_same("fingerprint", int(name[:12], 16))
    folder, keep = checkpoint_folder(name), params.train.save_total_limit
    checkpoints = lock = None
    if ranks.is_main():
        lock = leftovers.lock(root, name)
        if trains:
            for line in leftovers.lines(root, name, description):
                print(line)
            checkpoints = Checkpoints(folder, keep, description)
    ranks.wait()
    if trains and not ranks.is_main():
        checkpoints = Checkpoints(folder, keep)
    tracking = root / ".tracking"
    return Workplace(name, checkpoints, tracking / f"train-{name}.jsonl", tracking / f"skipped-{name}.json", lock)
