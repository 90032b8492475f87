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


def check(folder: Path, depth: int, names: tuple[str, ...] | None) -> dict:
    """What the stage says of itself: {"depth", "language"}.

    Raises ValueError where it has not run, not for this depth, or one of its files `names` (None: of all) is damaged.
    """
    facts = manifest.checked_facts(folder, DEPTH, names, "lexical")
    found = facts["depth"]
    if found != depth:
        raise ValueError(f"{folder}: made for a depth of {found}, but retriever.hybrid_depth is {depth}; {REMEDY}")
    return facts
