"""TensorBoard's folders: one a training, under the name that its run has in MLflow."""

from pathlib import Path

OWNER = "fingerprint.txt"


def take_board(boards: Path, name: str, fingerprint: str) -> Path:
    """The folder `boards`/`name`, for this training alone.

    What the training has begun under another name comes along. What another one left under this name is kept, with its
    own fingerprint behind the name.
    """
    folder = boards / name
    if folder.is_dir() and (owner := _owner(folder)) != fingerprint:
        folder.rename(_free(boards / f"{name}-{owner[:6]}"))
    begun = [found for found in _boards(boards) if _owner(found) == fingerprint]
    if begun and begun[0] != folder:
        begun[0].rename(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER).write_text(fingerprint, encoding="utf-8")
    return folder


def _boards(boards: Path) -> list[Path]:
    return sorted(file.parent for file in boards.glob(f"*/{OWNER}"))


def _owner(folder: Path) -> str:
    file = folder / OWNER
    return file.read_text(encoding="utf-8") if file.is_file() else "earlier"


def _free(folder: Path) -> Path:
    number = 2
    found = folder
    while found.exists():
        found, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return found
