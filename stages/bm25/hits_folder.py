"""What the lexical stage's folder says of itself, for those too who load neither torch nor bm25s."""

import json
from pathlib import Path

from stages.storage import manifest

DEPTH = "lexical.json"
REMEDY = "run `dvc repro --force lexical`"


def kept_depth(folder: Path) -> int:
    """To which depth the stage kept hits; 0 where it kept none or has not run."""
    file = folder / DEPTH
    return json.loads(file.read_text(encoding="utf-8"))["depth"] if file.is_file() else 0


def check(folder: Path, depth: int, names: tuple[str, ...] | None) -> None:
    """Raises ValueError where the stage has not run, not for this depth, or one of its files is damaged (None: of all)."""
    if not (folder / DEPTH).is_file():
        raise ValueError(f"{folder / DEPTH}: not found; run `dvc repro` (or python -m stages.lexical) first")
    manifest.check(folder, names, REMEDY)
    found = json.loads((folder / DEPTH).read_text(encoding="utf-8"))["depth"]
    if found != depth:
        raise ValueError(f"{folder}: made for a depth of {found}, but retriever.hybrid_depth is {depth}; {REMEDY}")
