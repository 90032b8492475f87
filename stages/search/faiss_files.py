"""A FAISS index as it lies in a file: opened, looked into, its errors in one line."""

from pathlib import Path

import faiss

ROWS_A_CHUNK = 65536


def opened(file: Path) -> faiss.Index:
    """Reads an index, memory-mapped as far as FAISS can. Raises RuntimeError as FAISS does."""
    return faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))


def inner(index: faiss.Index) -> faiss.Index:
    """The index that holds the vectors, below id maps, transformations and refinement."""
    index = faiss.downcast_index(index)
    while True:
        if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2 | faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        elif isinstance(index, faiss.IndexRefine):
            index = faiss.downcast_index(index.base_index)
        else:
            return index


def reason(error: Exception) -> str:
    """What a FAISS exception says, in one line."""
    return str(error).strip().splitlines()[-1][:200]
