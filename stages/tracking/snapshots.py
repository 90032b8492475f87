"""Files that wait beside a journal until MLflow has taken them, as they were when they were logged.

A record never names a path that can hold something else later: the files of a snapshot lie in a folder of their own,
`train-0123456789abcdef.files/RANDOM` beside `train-0123456789abcdef.jsonl`, which nobody writes to again.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path


class Snapshots:
    """The snapshots of one journal, each under a name that a record can hold."""

    def __init__(self, journal: Path):
        self.folder = journal.with_name(f"{journal.stem}.files")

    def take(self, linked: Mapping[str, Path], copied: Mapping[str, Path]) -> str:
        """Brings files and folders to the places of their names; bytecode is left out.

        linked: files that are only ever replaced, as stages write them: hardlinks, where the disk allows it. Where the
        journal's disk cannot be written, the snapshot lies among the system's temporary files. Raises OSError where
        something is missing; then nothing is left of the snapshot.
        """
        name = uuid.uuid4().hex
        try:
            return self._take(name, linked, copied)
        except OSError:
            return self._take(f"{tempfile.gettempdir()}/tracking-{name}", linked, copied)

    def _take(self, name: str, linked: Mapping[str, Path], copied: Mapping[str, Path]) -> str:
        unfinished = self.path(f"{name}.unfinished")
        try:
            for files, link in ((linked, True), (copied, False)):
                for place, source in files.items():
                    copy_tree(source, unfinished / place, link)
            if not unfinished.exists():  # empty folders alone
                unfinished.mkdir(parents=True)
            unfinished.rename(self.path(name))
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return name

    def path(self, name: str) -> Path:
        return self.folder / name

    def drop(self, name: str) -> None:
        shutil.rmtree(self.path(name), ignore_errors=True)

    def keep_only(self, names: set[str]) -> None:
        """Removes all others, unfinished ones too."""
        found = list(self.folder.iterdir()) if self.folder.is_dir() else []
        for folder in found:
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)


def copy_tree(source: Path, target: Path, link: bool) -> None:
    """A file or folder at another place, bytecode left out; links to files become files. Raises OSError."""
    if source.is_dir():
        for entry in sorted(source.iterdir()):
            if entry.name != "__pycache__":
                copy_tree(entry, target / entry.name, link)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            return os.link(source.resolve(), target)
        except OSError:
            pass  # another disk, or a file system without hardlinks
    shutil.copyfile(source, target)
