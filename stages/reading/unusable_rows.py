"""The rows that cannot be used: counted, listed in a file, and too many of them refused (`data.max_unusable`).

Listed too, but not counted: rows that are used without a part of theirs.
"""

import json
import os
from collections import Counter
from pathlib import Path


class Report:
    """The rows that cannot be used, as JSON lines {file, line, reason}; the file is whole when the block is left."""

    def __init__(self, path: Path, most: float):
        self.path, self.most = path, most
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def __enter__(self) -> "Report":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished = self.path.with_name(self.path.name + ".unfinished")
        self.file = open(self.unfinished, "w", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        return self

    def __exit__(self, *_) -> None:
        try:
            with self.file:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.unfinished.replace(self.path)
        finally:
            self.unfinished.unlink(missing_ok=True)

    def add(self, file: str, line: int, reason: str) -> None:
        """A row that is left out."""
        self.counts[file] += 1
        self.first.setdefault(file, f"{file}:{line}: {reason}")
        self.note(file, line, reason)

    def note(self, file: str, line: int, reason: str) -> None:
        """A row that is used all the same: listed alone."""
        self.file.write(json.dumps({"file": file, "line": line, "reason": reason}, ensure_ascii=True) + "\n")

    def check(self, file: str, rows: int | None = None) -> None:
        """Raises ValueError where more than the allowed share of the file's rows is unusable, or all of them are.

        `rows` is needed the first time only.
        """
        rows = self.rows.setdefault(file, rows or 0)
        count = self.counts[file]
        if count and (count > self.most * rows or count >= rows):
            raise ValueError(
                f"{self.first[file]}; {count} of {rows} rows cannot be used (data.max_unusable: {self.most:g}), "
                f"{self.path} lists them"
            )
