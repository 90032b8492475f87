"""BM25's hits: what they are, those of a split as the lexical stage wrote them, and those of new questions."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.bm25.hits_folder import DEPTH, REMEDY, check


class Hits(NamedTuple):
    """What BM25 found for B questions: rows [B, D] int64 and scores [B, D] fp32, best first; -1 and 0: no more."""

    rows: Tensor
    scores: Tensor

    def select(self, rows: Tensor | slice) -> "Hits":
        return Hits(self.rows[rows], self.scores[rows])

    def pin_memory(self) -> "Hits":
        return Hits(self.rows.pin_memory(), self.scores.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> "Hits":
        return Hits(self.rows.to(device, non_blocking=non_blocking), self.scores.to(device, non_blocking=non_blocking))


def read_hits(folder: Path, split: str, depth: int, questions: int, passages: int) -> Hits | None:
    """The hits of all questions of a split; None where retrieval is dense alone (depth 0).

    Raises ValueError where they are missing, damaged or not those of `questions` questions over `passages` passages.
    """
    if not depth:
        return None
    names = (f"{split}_rows.npy", f"{split}_scores.npy")
    check(folder, depth, (DEPTH, *names))
    try:
        rows, scores = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder}: damaged ({str(error).splitlines()[0]}); {REMEDY}") from None
    if rows.shape != (questions, depth) or rows.shape != scores.shape or (rows >= passages).any():
        raise ValueError(
            f"{folder}: hits of {len(rows)} {split} questions to a depth of {rows.shape[-1]}, but there are {questions} "
            f"questions over {passages} passages and retriever.hybrid_depth is {depth}; {REMEDY}"
        )
    return Hits(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(np.array(scores)))


def find_hits(folder: Path, questions: list[str], depth: int) -> Hits | None:
    """BM25's hits of new questions; None where retrieval is dense alone."""
    if not depth:
        return None
    from stages.bm25 import (
        lexical_search,  # its library takes a second to import, which dense retrieval need not wait for
    )

    language = check(folder, depth, None)["language"]
    rows, scores = lexical_search.search(lexical_search.load(folder / "index"), questions, depth, language=language)
    return Hits(torch.from_numpy(rows), torch.from_numpy(scores))
