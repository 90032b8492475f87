"""Ranks that stay for job after job of a test file: what a rank imports takes longer than what most tests ask of it.

`python -m tests.crew FOLDER PROCESSES` does what `python -m tests.ranked` does, once for each of FOLDER/0.json, 1.json, ...
"""

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path
from unittest.mock import patch

from stages.machine.entry import run
from stages.machine.launching import launch
from tests import ranked

ROOT = Path(__file__).resolve().parents[1]
IDLE_SECONDS = 900  # after which nobody will ask any more


class Crew:
    """Two ranks, started with the first job; after a job that failed, anew with the next."""

    def __init__(self, folder: Path):
        self.folder, self.process, self.number = folder, None, 0

    def do(self, work: str, folder: Path, **settings) -> str:
        """What `python -m tests.ranked WORK` of two ranks leaves in the folder; returns all that they print."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        folder.mkdir(exist_ok=True)
        _write(self.place / f"{self.number}.json", json.dumps([work, str(folder), settings]))
        outputs = [self.place / f"{self.number}-{rank}.txt" for rank in range(2)]
        self.number += 1
        while not all(output.exists() for output in outputs):
            assert self.process.poll() is None, self.errors.read_text()[-4000:]
            time.sleep(0.02)
        return "".join(output.read_text() for output in outputs)

    def _start(self) -> None:
        self.number, self.place = 0, self.folder / f"{time.monotonic_ns()}"
        self.place.mkdir()
        self.errors = self.place / "errors.txt"
        outside = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "DVC_STAGE", "TORCHELASTIC_RUN_ID"}
        environment = {name: value for name, value in os.environ.items() if name not in outside}
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.crew", str(self.place), "2"], cwd=ROOT, stdout=errors, stderr=errors,
                env=environment | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def leave(self) -> None:
        if self.process is not None:
            _write(self.place / f"{self.number}.json", "null")
            assert self.process.wait(60) == 0, self.errors.read_text()[-4000:]


def _write(file: Path, text: str) -> None:
    """There only when it is whole."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


def main() -> None:
    place, processes = Path(sys.argv[1]), int(sys.argv[2])
    if launch(processes, "cpu"):
        return
    import torch

    from stages.compute import ranks
    from stages.training import trainer
    from stages.training.accumulation import Accumulation

    torch.set_num_threads(1)
    with ranks.group(torch.device("cpu")):
        for number in count():
            job, asked = place / f"{number}.json", time.monotonic()
            while not job.exists():
                assert time.monotonic() < asked + IDLE_SECONDS, "nobody asks for anything"
                time.sleep(0.02)
            if (wanted := json.loads(job.read_text())) is None:
                return
            work, folder, settings = wanted
            output = io.StringIO()
            with (
                redirect_stdout(output), patch.object(trainer, "make_optimizer", trainer.make_optimizer),
                patch.multiple(Accumulation, add=Accumulation.add, gradients=Accumulation.gradients),
            ):  # fmt: skip
                ranked.do(work, Path(folder), **settings)
            _write(place / f"{number}-{ranks.rank()}.txt", output.getvalue())


if __name__ == "__main__":
    run(main)
