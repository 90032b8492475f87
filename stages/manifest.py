"""What a stage wrote, by size and hash, in `manifest.json` beside it: a file that was cut or altered is known on load.

Files of up to 64 MiB are hashed whole on load. Larger ones (60 GB of vectors) by their first and last MiB, which finds
what happens to large files - a copy that ended early, a full disk, another version - in milliseconds. A changed byte in
their middle is found by `python -m stages.check`, which reads everything: the hash of the whole file is recorded too.
"""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"
WHOLE_FILE_LIMIT = 64 << 20
END = 1 << 20


def record(*files: Path) -> None:
    """Adds finished files to the manifest of their folder; they and it are on the disk when this returns."""
    for folder in {file.parent for file in files}:
        named = {str(file.relative_to(folder)): file for file in files if file.parent == folder}
        _write(folder, _read(folder) | {name: _facts(file) for name, file in named.items()})


def record_folder(folder: Path) -> None:
    """Makes the manifest of everything in `folder`, subfolders included."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MANIFEST)
    _write(folder, {file.relative_to(folder).as_posix(): _facts(file) for file in files})


def damage(folder: Path, names: tuple[str, ...] | None = None, whole: bool = False) -> str | None:
    """What is wrong with the named files of `folder` (None: with all that were recorded), or None.

    `whole` reads large files to their last byte.
    """
    try:
        recorded = _read(folder, must_exist=True)
        for name in recorded if names is None else names:
            if name not in recorded:
                return f"{name} is not recorded in {MANIFEST}"
            problem = _difference(folder / name, recorded[name], whole)
            if problem:
                return f"{name} {problem}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"unfinished or without a readable {MANIFEST}"
    return None


def check(folder: Path, names: tuple[str, ...] | None, remedy: str) -> None:
    """Raises ValueError, one line that ends with the remedy, where `damage` finds something."""
    problem = damage(folder, names)
    if problem:
        raise ValueError(f"{folder}: damaged ({problem}); {remedy}")


def sync_folder(folder: Path) -> None:
    """Renames in `folder` are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ends(file: Path) -> bytes:
    """The first and the last MiB of a file."""
    with open(file, "rb") as stream:
        head = stream.read(END)
        stream.seek(max(0, file.stat().st_size - END))
        return head + stream.read()


def _facts(file: Path) -> dict:
    with open(file, "rb") as stream:
        facts = {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        os.fsync(stream.fileno())
    if facts["size"] > WHOLE_FILE_LIMIT:
        facts["sha256_of_ends"] = hashlib.sha256(ends(file)).hexdigest()
    return facts


def _difference(file: Path, expected: dict, whole: bool) -> str | None:
    if not file.is_file() or file.stat().st_size != expected["size"]:
        return "is missing or cut short"
    if expected["size"] > WHOLE_FILE_LIMIT and not whole:
        same = hashlib.sha256(ends(file)).hexdigest() == expected["sha256_of_ends"]
    else:
        with open(file, "rb") as stream:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == expected["sha256"]
    return None if same else "was altered after it was written"


def _read(folder: Path, must_exist: bool = False) -> dict:
    file = folder / MANIFEST
    if not file.exists() and not must_exist:
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        if must_exist:
            raise
        return {}  # what it listed is unknown, hence no longer trusted


def _write(folder: Path, facts: dict) -> None:
    unfinished = folder / f"{MANIFEST}.unfinished"
    with open(unfinished, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(folder / MANIFEST)
    sync_folder(folder)
