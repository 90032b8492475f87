"""The passage index: FAISS over the passages' vectors, and the vectors themselves for scores with a gradient."""

import json
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor


@dataclass
class PassageIndex:
    """Passages of one corpus, searchable by inner product."""

    index: faiss.Index
    vectors: Tensor  # [N, d] fp32, memory-mapped until moved to a device

    def search(self, questions: Tensor, n_docs: int) -> Tensor:
        """Rows of the n_docs best passages of each question, best first: [B, n_docs] int64, -1 where there is none.

        On a GPU a flat index is searched exactly by one matrix product, which reads the vectors once; on a CPU FAISS.
        """
        if self.vectors.is_cuda:
            found = min(n_docs, len(self.vectors))
            with torch.autocast("cuda", enabled=False):
                rows = (questions.float() @ self.vectors.T).topk(found, dim=1).indices
            return torch.nn.functional.pad(rows, (0, n_docs - found), value=-1)
        # FAISS answers -1 for what it did not find, which indexes the last vector: callers must look for it.
        _, rows = self.index.search(questions.detach().float().cpu().numpy(), n_docs)
        return torch.from_numpy(rows)

    def gather(self, rows: Tensor) -> Tensor:
        """Vectors of the named passages: [..., d]; a missing passage (-1) gets some vector, to be masked."""
        return self.vectors[rows.clamp(min=0)]

    def to(self, device: torch.device) -> "PassageIndex":
        flat = isinstance(self.index, faiss.IndexFlat)
        return PassageIndex(self.index, self.vectors.to(device)) if device.type == "cuda" and flat else self


def doc_scores(questions: Tensor, passages: Tensor, rows: Tensor) -> Tensor:
    """Inner products of question vectors [B, d] and passage vectors [B, K, d] in fp32, -inf for missing passages.

    In fp32 whatever the autocast: at 64 to 128 the spacing of bf16 is half a nat.
    """
    with torch.autocast(questions.device.type, enabled=False):
        scores = torch.einsum("bd,bkd->bk", questions.float(), passages.float())
    return scores.masked_fill(rows < 0, float("-inf"))


def build_index(vectors: np.ndarray, factory: str) -> faiss.Index:
    """A FAISS index of the factory string by inner product over all vectors, trained on a sample where it learns.

    Raises ValueError for a factory string that FAISS does not know or that needs more passages than there are.
    """
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"index.factory: '{factory}' is not a factory string that FAISS can build ({reason})"
        ) from None
    if not index.is_trained:
        sample = vectors[np.random.default_rng(0).permutation(len(vectors))[:200_000]]
        try:
            index.train(np.ascontiguousarray(sample))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"index.factory: '{factory}' cannot be trained on {len(vectors)} passages ({reason})"
            ) from None
    for first in range(0, len(vectors), 65536):
        index.add(np.ascontiguousarray(vectors[first : first + 65536]))
    return index


def save_index(folder: Path, index: faiss.Index, facts: dict) -> None:
    """Writes index.faiss and index.json beside the vectors that are already in `folder`."""
    faiss.write_index(index, str(folder / "index.faiss"))
    (folder / "index.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_index(folder: Path) -> PassageIndex:
    """Opens what the index stage wrote; raises ValueError where a part is missing or does not fit the others."""
    paths = [folder / name for name in ("index.faiss", "vectors.npy", "index.json")]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: not found; run `dvc repro` (or python -m stages.index) first")
    try:
        index = faiss.read_index(str(paths[0]))
        vectors = np.load(paths[1], mmap_mode="c", allow_pickle=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: damaged ({str(error).splitlines()[0]}); run `dvc repro --force index`") from None
    if (index.ntotal, index.d) != vectors.shape:
        raise ValueError(
            f"{folder}: index.faiss holds {index.ntotal} vectors of {index.d} dimensions, vectors.npy {vectors.shape[0]} of "
            f"{vectors.shape[1]}; run `dvc repro --force index`"
        )
    return PassageIndex(index, torch.from_numpy(vectors))
