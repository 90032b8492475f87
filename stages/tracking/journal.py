"""The journal of a tracked run: JSON lines on local disk that wait there until MLflow has taken them.

One line is one record: {"kind": "metrics", "time": 1700000000000, ...}. Beside `run.jsonl` lie
`run.jsonl.sent` (how many bytes MLflow has taken, and into which run), `run.jsonl.lock` (held by the one process
that sends) and `run.files/` (files that wait with their records, see stages/tracking/snapshots.py). Nothing here needs
MLflow. Trouble with the disk raises nothing: it must not end a training that lasted for days.
"""

import errno
import json
import os
import re
import sys
import threading
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stages.tracking.snapshots import Snapshots


def say(text: str) -> None:
    """One line on stderr; a closed stderr is no reason to stop a training."""
    with suppress(OSError, ValueError):
        print(f"tracking: {text}", file=sys.stderr, flush=True)


def without_credentials(text: str) -> str:
    """`https://user:password@host` becomes `https://host`."""
    return re.sub(r"//[^@/\s]*@", "//", text)


class Journal:
    """An append-only file of records, and the position up to which they were sent.

    path: the journal of one training, on a disk that outlives the process. `state` is what is remembered
    between processes: `offset` (bytes sent), and what mlflow_run.MlflowRun adds. Records that could not be
    written (disk full) wait in `unwritten` and are tried again with each new one, so the order stays.
    """

    def __init__(self, path: Path):
        self.path = Path(path).absolute()
        self.snapshots = Snapshots(self.path)
        self.unwritten: list[dict] = []
        self._mutex = threading.Lock()
        self._lock = FileLock(f"{self.path}.lock", thread_local=False)  # the sending thread releases it
        self._warned = False
        self.state = {"offset": 0}
        with suppress(OSError, ValueError):
            self.state |= json.loads(self._sent_path.read_text())
        if self.state["offset"] > self._size():  # the journal was removed by hand and starts anew
            self.state = {"offset": 0}

    @property
    def _sent_path(self) -> Path:
        return self.path.with_name(self.path.name + ".sent")

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def lock(self, timeout: float) -> bool:
        """False: another process sends this journal. Else it is ours until `release` or the process's end."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=timeout)
        except Timeout:
            return False
        except OSError:
            pass  # an unwritable folder: nobody else can write there either
        return True

    def release(self) -> None:
        with suppress(OSError):
            self.snapshots.folder.rmdir()  # unless something waits there
        with suppress(OSError):
            self._lock.release()

    def append(self, entry: dict) -> None:
        """Writes one record, and those that could not be written before it. TypeError: it is not JSON."""
        json.dumps(entry, default=str)
        with self._mutex:
            self.unwritten.append(entry)
            try:
                while self.unwritten:
                    self._write(json.dumps(self.unwritten[0], default=str).encode() + b"\n")
                    self.unwritten.pop(0)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    say(f"cannot write {self.path} ({error}); the training goes on, records wait in memory")

    def _write(self, line: bytes) -> None:
        """Opens the file each time, so that a journal that was moved away is started again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                line = b"\n" + line  # the last writer was killed, or out of space, inside its line
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def take(self, limit: int = 200) -> list[tuple[dict, int | None]]:
        """The next unsent records, each with the offset behind it (None: only in memory). Removes nothing."""
        taken = []
        if self.state["offset"] > self._size():
            self.state["offset"] = 0
        offset = self.state["offset"]
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(offset)
            while len(taken) < limit and (line := file.readline()).endswith(b"\n"):
                offset += len(line)
                taken.append((_parse(line), offset))
        if not taken:
            with self._mutex:
                taken = [(entry, None) for entry in self.unwritten[:limit]]
        return taken

    def mark_sent(self, taken: list[tuple[dict, int | None]]) -> None:
        """Moves the position behind these records and writes it, with `state`, to disk."""
        for entry, offset in taken:
            if offset is None:  # unless it was written to the file meanwhile: then it is sent a second time
                with self._mutex:
                    self.unwritten = [one for one in self.unwritten if one is not entry]
            else:
                self.state["offset"] = offset
        temporary = self._sent_path.with_name(self._sent_path.name + ".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(self.state))
            os.replace(temporary, self._sent_path)
        for entry, _ in taken:
            if "snapshot" in entry:
                self.snapshots.drop(entry["snapshot"])

    def drop_orphans(self) -> None:
        """Removes snapshots that no unsent record names, left by a killed process; before any new one is taken."""
        self.snapshots.keep_only({entry["snapshot"] for entry in self._waiting() if "snapshot" in entry})

    def _waiting(self) -> list[dict]:
        waiting = list(self.unwritten)
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self.state["offset"])
            waiting += [entry for line in file if (entry := _parse(line))]
        return waiting

    def logged_steps(self) -> set[int]:
        """The steps of the metrics that this file holds for the run that a resumed training goes on in."""
        steps: set[int] = set()
        with suppress(OSError), self.path.open("rb") as file:
            for line in file:
                entry = _parse(line)
                if entry.get("kind") == "close" and entry.get("status") == "FINISHED":
                    steps = set()
                elif entry.get("kind") == "metrics" and entry.get("step") is not None:
                    steps.add(entry["step"])
        return steps

    def unsent(self) -> int:
        """How many records wait, in the file and in memory."""
        return len(self._waiting())


def _parse(line: bytes) -> dict:
    """A torn line (the process was killed while writing it) counts as an empty record."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
