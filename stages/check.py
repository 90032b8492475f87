"""Reads every file that the stages wrote to its last byte and holds it against what was recorded when it was written.

    python -m stages.check                          # data/prepared, tokens, ..., model, as far as they exist
    python -m stages.check data/index

Loading checks large files only by size and ends; this is the thorough check after a crash or a copy.
"""

import argparse
from pathlib import Path

from stages.machine.entry import run

WRITTEN_BY = {
    "prepared": "prepare", "tokens": "tokens", "positives": "positives", "lexical": "lexical", "vectors": "encode",
    "index": "index", "reranker": "reranker", "model": "train",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="*", type=Path, help="without one, all that exist")
    arguments = parser.parse_args()
    from stages.storage.manifest import MANIFEST, damage

    known = [Path("data") / name for name in WRITTEN_BY]
    for folder in arguments.folder or [folder for folder in known if folder.is_dir()]:
        problem = damage(folder, whole=True)
        if problem:
            stage = WRITTEN_BY.get(folder.name)
            remedy = f"run `dvc repro --force {stage}`" if stage else f"see {folder / MANIFEST}"
            raise ValueError(f"{folder}: damaged ({problem}); {remedy}")
        print(f"{folder}: whole")


if __name__ == "__main__":
    run(main)
