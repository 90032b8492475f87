"""Vectors that were made elsewhere, a .npy file [passages, d], taken in place of encoding once they were held against the
passages. An index is built from them as from our own."""

from pathlib import Path

import numpy as np

from stages.search.adopted_index import KEY, check_exact
from stages.search.faiss_files import ROWS_A_CHUNK

KINDS = ("float16", "float32")


def open_own(path: Path, dimension: int, passages: int | None = None) -> np.ndarray:
    """The file's vectors [passages, dimension] as they are, memory-mapped; None: of any number.

    Raises ValueError, one line, where they do not fit.
    """
    if not path.is_file():
        raise ValueError(f"{KEY}: {path} not found; relative paths count from the folder of params.yaml")
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{KEY}: {path}: damaged or no array of numbers ({reason}); write it with numpy.save"
        ) from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.name not in KINDS:
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else "several arrays"
        raise ValueError(f"{KEY}: {path} holds {found}; give one array [passages, d] of float32 or float16")
    if vectors.shape[1] != dimension:
        raise ValueError(
            f"{KEY}: {path} holds vectors of {vectors.shape[1]} dimensions, the context encoder makes {dimension}; set "
            "models.context_encoder to the encoder that made them"
        )
    if passages is not None and len(vectors) != passages:
        raise ValueError(f"{KEY}: {path} holds {len(vectors)} vectors, data/prepared has {passages} passages")
    return vectors


def check_own(path: Path, vectors: np.ndarray, rows: np.ndarray, encoded: np.ndarray) -> None:
    """Holds the vectors of some passages against freshly encoded ones [R, d]. Raises ValueError."""
    held = np.asarray(vectors[rows], dtype=np.float32)
    _check_finite(path, held, rows)
    check_exact(path, held, encoded, rows)


def write_own(path: Path, vectors: np.ndarray, file: Path) -> None:
    """Copies them to a .npy file [N, d] fp32, in chunks. Raises ValueError where one of them is not finite."""
    written = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=vectors.shape)
    for first in range(0, len(vectors), ROWS_A_CHUNK):
        rows = np.arange(first, min(first + ROWS_A_CHUNK, len(vectors)))
        written[rows[0] : rows[-1] + 1] = vectors[rows[0] : rows[-1] + 1]
        _check_finite(path, written[rows[0] : rows[-1] + 1], rows)
    written.flush()


def _check_finite(path: Path, vectors: np.ndarray, rows: np.ndarray) -> None:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"{KEY}: {path}: the vector of passage {rows[finite.argmin()]} (from 0) holds NaN or infinity")
