"""Whose model the reranker stage's folder holds, for those too who load none."""

import json
from pathlib import Path

from stages.storage import manifest

FACTS = "reranker.json"
REMEDY = "run `dvc repro --force reranker`"


def record(folder: Path, named: str | None) -> None:
    """named: models.reranker."""
    manifest.write_json(folder / FACTS, {"model": named})


def check(folder: Path, named: str) -> None:
    """Raises ValueError where the stage ran for another model than `named`, or not at all, or a file is damaged."""
    if not (folder / FACTS).is_file():
        raise ValueError(f"{folder / FACTS}: not found; run `dvc repro` (or python -m stages.reranker) first")
    manifest.check(folder, None, REMEDY)
    found = json.loads((folder / FACTS).read_text(encoding="utf-8"))["model"]
    if found != named:
        raise ValueError(f"{folder}: made of {found}, but models.reranker is {named}; {REMEDY}")
