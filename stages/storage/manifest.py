"""What a stage wrote, by size and hash, in `manifest.json` beside it: a file that was cut or altered is known on load.

Files of up to 64 MiB are hashed whole on load. Larger ones (60 GB of vectors) by their first and last MiB, which finds
what happens to large files - a copy that ended early, a full disk, another version - in milliseconds. A changed byte in
their middle is found by `python -m stages.check`, which reads everything: the hash of the whole file is recorded too.
What decides whether something runs again does not lean on this: it hashes whole files (stages/storage/hashes.py).
The hash is xxh3, which finds damage at ten times SHA-256's speed: that was a third of a large checkpoint's time.

Also how anything is written: beside its place, then renamed. Outputs that DVC checked out are read-only hardlinks into its
cache; who writes into one alters the cache as root and fails as anybody else.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from xxhash import xxh3_128

MANIFEST = "manifest.json"
WHOLE_FILE_LIMIT = 64 << 20
END = 1 << 20


def record(*files: Path) -> None:
    """Adds finished files to the manifest of their folder; they and it are on the disk when this returns."""
    for folder in {file.parent for file in files}:
        named = {str(file.relative_to(folder)): file for file in files if file.parent == folder}
        write_json(folder / MANIFEST, _read(folder) | {name: _facts(file) for name, file in named.items()})


def record_folder(folder: Path) -> None:
    """Makes the manifest of everything in `folder`, subfolders included."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MANIFEST)
    write_json(folder / MANIFEST, {file.relative_to(folder).as_posix(): _facts(file) for file in files})


def recorded(folder: Path, name: str) -> str | None:
    """The digest of a file that the manifest of its folder holds, or None."""
    facts = _read(folder).get(name)
    return facts["xxh3"] if isinstance(facts, dict) and "xxh3" in facts else None


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


def checked_facts(folder: Path, name: str, names: tuple[str, ...] | None, stage: str) -> dict:
    """What the JSON file `name` says, in which `stage` tells what it made of the rest of its folder.

    Raises ValueError where the stage has not run, or where one of the files `names` (None: of all) is damaged.
    """
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: not found; run `dvc repro` (or python -m stages.{stage}) first")
    check(folder, names, f"run `dvc repro --force {stage}`")
    return json.loads((folder / name).read_text(encoding="utf-8"))


def sync_folder(folder: Path) -> None:
    """Renames in `folder` are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: object) -> None:
    """Writes a JSON file that appears whole or not at all, and is on the disk when this returns."""
    write_whole(file, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_metrics(file: Path, metrics: dict[str, float]) -> None:
    """The same for a stage's metrics, in the order given, which is that of their tables; makes the folder."""
    write_whole(file, json.dumps(metrics, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Writes a text as it is, into a new file that takes the place of an old one; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with open(unfinished, "w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)
    sync_folder(file.parent)


def put_in_place(finished: Path, folder: Path) -> None:
    """Renames a finished folder to `folder` (copies between disks); one that was there goes only when it arrived."""
    old, new = folder.with_name(folder.name + ".old"), folder.with_name(folder.name + ".unfinished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if finished.stat().st_dev != folder.parent.stat().st_dev:
        shutil.rmtree(new, ignore_errors=True)
        finished = Path(shutil.copytree(finished, new))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, xxh3_128).hexdigest()


def _digest_of_ends(file: Path) -> str:
    with open(file, "rb") as stream:
        head = stream.read(END)
        stream.seek(-END, os.SEEK_END)
        return xxh3_128(head + stream.read()).hexdigest()


def _facts(file: Path) -> dict:
    with open(file, "rb") as stream:
        facts = {"size": file.stat().st_size, "xxh3": hashlib.file_digest(stream, xxh3_128).hexdigest()}
        os.fsync(stream.fileno())
    if facts["size"] > WHOLE_FILE_LIMIT:
        facts["xxh3_of_ends"] = _digest_of_ends(file)
    return facts


def _difference(file: Path, expected: dict, whole: bool) -> str | None:
    if not file.is_file() or file.stat().st_size != expected["size"]:
        return "is missing or cut short"
    if expected["size"] > WHOLE_FILE_LIMIT and not whole:
        same = _digest_of_ends(file) == expected["xxh3_of_ends"]
    else:
        same = _digest(file) == expected["xxh3"]
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
