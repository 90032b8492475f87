"""What lies under .checkpoints: whose it is, how it differs from the training at hand, how it goes away again."""

import json
import shutil
from contextlib import suppress
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
    goes_on = bool(_checkpoints(root / FOLDER / name)) or (root / FOLDER / name / "finished").is_dir()
    if alike and not goes_on:
        folder, found = max(alike, key=lambda pair: pair[0].stat().st_mtime)
        last = _checkpoints(folder)[-1].name
        told.append(f"starts anew: {FOLDER}/{folder.name} ({last}) differs in {differences(found, description)}")
    if not goes_on and (told_of := finished_otherwise(root, description)) is not None:
        told.append(told_of)
    if others:
        size = sum(file.stat().st_size for folder in others for file in folder.rglob("*") if file.is_file())
        told.append(
            f"{FOLDER} holds {len(others)} other trainings, {size / 1e9:.2f} GB, to go on from; "
            f"`make clean` removes all, `rm -r {FOLDER}/NAME` one"
        )
    return told


def finished_otherwise(root: Path, description: dict) -> str | None:
    """What to tell where the same training has finished at another train.max_steps: why it is not continued, how it can be."""
    asked, steps = _but_steps(description)
    kept = [folder.parent / "description.json" for folder in (root / FOLDER).glob("*/finished")]
    for file in [*kept, *(root / FOLDER).glob("*.finished.json")]:
        found = _read_description(file)
        if found is None or found["inputs"] != description["inputs"]:
            continue
        settings, before = _but_steps(found)
        if settings == asked and before is not None and steps is not None and before < steps:
            return (
                f"the same training has finished with train.max_steps {before}: its learning rate had come down to zero there, "
                f"at {steps} it takes another way from the first step, so this one begins anew. To start from its weights: "
                "stop this, `dvc checkout` (brings data/model back), `cp -rL data/model my-model && cp -rL "
                "data/retriever/context_encoder my-model/`, name my-model in models.question_encoder, context_encoder and "
                "generator, retriever.steps 0"
            )
    return None


def _but_steps(description: dict) -> tuple[dict, int | None]:
    """The settings without train.max_steps, and that."""
    train = dict(description["settings"].get("train", {}))
    steps = train.pop("max_steps", None)
    return description["settings"] | {"train": train}, steps


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
            # What it was stays, some KB, for `finished_otherwise`.
            with suppress(OSError):
                shutil.copyfile(root / FOLDER / name / "description.json", root / FOLDER / f"{name}.finished.json")
            shutil.rmtree(root / FOLDER / name, ignore_errors=True)
    except Timeout:
        return


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(one for one in folder.glob("step-*") if one.suffix != ".unfinished")


def _description(folder: Path) -> dict | None:
    return _read_description(folder / "description.json")


def _read_description(file: Path) -> dict | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= {"settings", "inputs", "code"} else None


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
