"""SHA-256 of whole files, as that decides what runs again; of a large file it is remembered, so that 60 GB are read once.

Remembered at the real root by device, inode, size and time of change, in a file that may be deleted at any time.
"""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from stages.machine.entry import root_folder
from stages.storage import manifest
from stages.storage.leftovers import FOLDER

REMEMBERED = f"{FOLDER}/hashes.json"
MOST = 1000  # files remembered
# A file changed so shortly before may be changed again within the same tick of its file system's clock (FAT: 2 s).
SETTLED_SECONDS = 3.0


def sha256_of(file: Path) -> str:
    """The hash of the whole file. Of several processes one reads a large file, the others wait and are told."""
    if file.stat().st_size <= manifest.WHOLE_FILE_LIMIT:
        return _read(file)
    store = root_folder() / REMEMBERED
    lock = FileLock(store.with_suffix(".lock"))
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # a root that cannot be written
        return _read(file)
    try:
        return _remembered(file, store)
    finally:
        lock.release()


def _remembered(file: Path, store: Path) -> str:
    known, now, before = _known(store), time.time(), file.stat()
    name, state = f"{before.st_dev}-{before.st_ino}", [before.st_size, before.st_mtime_ns]
    found = known.get(name)
    if isinstance(found, dict) and found.get("state") == state and "sha256" in found:
        return found["sha256"]
    digest, after = _read(file), file.stat()
    settled = now - before.st_mtime > SETTLED_SECONDS
    if settled and (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
        known.pop(name, None)
        known[name] = {"state": state, "sha256": digest}
        with suppress(OSError):  # a full disk: it is read again the next time
            manifest.write_whole(store, json.dumps(dict(list(known.items())[-MOST:]), indent=1) + "\n")
    return digest


def _known(store: Path) -> dict[str, dict]:
    try:
        found = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
