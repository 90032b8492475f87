"""What lies under .checkpoints: whose it is, how it differs from the training at hand, how it goes away again."""

import json
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = ".checkpoints"


def lock(root: Path, name: str, doing: str = "trains") -> FileLock:
    """Takes what belongs to a fingerprint for this process until it ends, however it ends.

    Where another process has it, waits until that one ends: what it finishes is then found, what it leaves unfinished is
    gone on with.
    """
    file = root / FOLDER / f"{name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    taken = FileLock(file)
    try:
        taken.acquire(timeout=0)
    except Timeout:
        print(f"another process {doing} exactly this ({file.with_suffix('')}): waits for it", flush=True)
        taken.acquire()
    return taken


def lines(root: Path, name: str, description: dict) -> list[str]:
    """What to tell before a training starts: in what the newest training of the same recipe differs, and the room that
    others take. Empty where there is nothing to tell."""
    others = [folder for folder in (root / FOLDER).glob("*") if folder.is_dir() and folder.name != name]
    told = []
    recipe = description["settings"].get("train", {}).get("recipe")
    known = [(folder, found) for folder in others if (found := _description(folder)) and _checkpoints(folder)]
    alike = [pair for pair in known if pair[1]["settings"].get("train", {}).get("recipe") == recipe]
    if alike and not _checkpoints(root / FOLDER / name):
        folder, found = max(alike, key=lambda pair: pair[0].stat().st_mtime)
        last = _checkpoints(folder)[-1].name
        told.append(f"starts anew: {FOLDER}/{folder.name} ({last}) differs in {differences(found, description)}")
    if others:
        size = sum(file.stat().st_size for folder in others for file in folder.rglob("*") if file.is_file())
        told.append(
            f"{FOLDER} holds {len(others)} other trainings, {size / 1e9:.2f} GB, to go on from; "
            f"`make clean` removes all, `rm -r {FOLDER}/NAME` one"
        )
    return told


def differences(old: dict, new: dict) -> str:
    """Parameters with both values, inputs and code by name."""
    before, now = _flat(old["settings"]), _flat(new["settings"])
    parts = [
        f"{key} {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    for kind in ("inputs", "code"):
        names = [key for key in sorted({*old[kind], *new[kind]}) if old[kind].get(key) != new[kind].get(key)]
        if names:
            parts.append(f"{kind} {', '.join(names)}")
    return "; ".join(parts)


def drop_finished(root: Path, name: str) -> None:
    """Deletes what a finished training kept: a later stage runs, so DVC has the model.

    Not while another process holds it, which has waited for the very same training; its own later stage comes here too.
    """
    if not (root / FOLDER / name / "finished").is_dir():
        return
    held = FileLock(root / FOLDER / f"{name}.lock")
    try:
        with held.acquire(timeout=0):
            shutil.rmtree(root / FOLDER / name, ignore_errors=True)
    except Timeout:
        return


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(one for one in folder.glob("step-*") if one.suffix != ".unfinished")


def _description(folder: Path) -> dict | None:
    try:
        found = json.loads((folder / "description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= {"settings", "inputs", "code"} else None


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
