"""An index that was built elsewhere, adopted in place of a built one after it was held against the passages.

The file is not trusted: FAISS's format holds no code, but a damaged file can end the process that reads it, so that a
child process reads it first.
"""

import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from stages.search.faiss_files import ROWS_A_CHUNK, inner, opened, reason

KEY = "index.import_path"
SMALLEST_FILE = 32  # bytes; less holds no header
SAMPLE = 64  # passages that are encoded again
EXACT_TOLERANCE = 0.05  # relative; encoding in fp16 or bf16 moves a vector by about 0.01, another encoder by about 1
SHARE_RECOGNISED = 0.75  # of the sample, for compressed vectors
NORM_TOLERANCE = 1e-3
HEADER = struct.Struct("<4xi8x16xxi")  # of every kind: its name, dimension, size, unused, trained, metric
READ_IN_A_CHILD = """
import os, sys, faiss
if hasattr(faiss, "set_deserialization_vector_byte_limit"):
    faiss.set_deserialization_vector_byte_limit(os.path.getsize(sys.argv[1]))
try:
    index = faiss.read_index(sys.argv[1], getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
except Exception as error:
    sys.exit((str(error).strip().splitlines() or ["?"])[-1][:200])
"""


@dataclass
class Imported:
    """An index that fits in dimension, metric, size and ids."""

    path: Path
    index: faiss.Index
    places: np.ndarray | None  # [N] where the inner index holds row i; None: at i

    @property
    def holds_vectors(self) -> bool:
        """Whether the vectors can be read back exactly as they were added."""
        exact = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat)
        transformed = isinstance(_below_id_map(self.index), faiss.IndexPreTransform)
        return isinstance(inner(self.index), exact) and not transformed

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors [R, d] of the named passages, approximate where they were compressed. Raises ValueError."""
        places = rows if self.places is None else self.places[rows]
        try:
            return _below_id_map(self.index).reconstruct_batch(np.ascontiguousarray(places, dtype=np.int64))
        except RuntimeError as error:
            kind = type(inner(self.index)).__name__
            raise ValueError(f"{KEY}: {self.path}: a {kind} gives no vectors back to check ({reason(error)})") from None


def open_imported(path: Path, dimension: int, passages: int) -> Imported:
    """Opens an index file and checks dimension, metric, size and ids. Raises ValueError, one line."""
    check_header(path, dimension)
    child = subprocess.run([sys.executable, "-c", READ_IN_A_CHILD, str(path)], capture_output=True, text=True)
    if child.returncode:
        said = child.stderr.strip().splitlines()[-1] if child.returncode > 0 and child.stderr.strip() else "it crashes"
        raise ValueError(f"{KEY}: {path}: damaged or not a FAISS index (FAISS cannot read it: {said}); export it again")
    index = opened(path)
    _check_kind(path, index.d, index.metric_type, dimension)
    if index.ntotal != passages:
        raise ValueError(f"{KEY}: {path} holds {index.ntotal} vectors, data/prepared has {passages} passages")
    return Imported(path, index, _places(path, index))


def check_sample(imported: Imported, rows: np.ndarray, encoded: np.ndarray) -> None:
    """Holds the index's vectors of some passages against freshly encoded ones [R, d]. Raises ValueError.

    Exact vectors may differ by EXACT_TOLERANCE in norm. Compressed ones have no such bound: most must be nearer to
    their own passage's fresh vector than to any other of the sample.
    """
    held = imported.vectors(rows)
    if imported.index.metric_type == faiss.METRIC_L2:
        # Compressed vectors do not show the norm that they had, the encoder's own ones do.
        _check_norms(imported.path, held if imported.holds_vectors else encoded, rows)
    if imported.holds_vectors:
        check_exact(imported.path, held, encoded, rows)
        return
    distances = np.linalg.norm(held[:, None] - encoded[None], axis=2)
    recognised = float((np.diag(distances) <= distances.min(1) * (1 + 1e-6)).mean())
    if recognised < SHARE_RECOGNISED:
        raise ValueError(
            f"{KEY}: {imported.path}: of {len(rows)} passages encoded again, {recognised:.0%} are nearest to their own "
            f"compressed vector (at least {SHARE_RECOGNISED:.0%} are needed): other passages, another order, another encoder "
            "or another lengths.passage_tokens"
        )


def check_exact(path: Path, held: np.ndarray, encoded: np.ndarray, rows: np.ndarray) -> None:
    """Raises ValueError where vectors `held` [R, d] of passages `rows` are not those `encoded` [R, d] from them."""
    error = np.linalg.norm(held - encoded, axis=1) / np.maximum(np.linalg.norm(encoded, axis=1), 1e-12)
    worst = int(error.argmax())
    if not error[worst] <= EXACT_TOLERANCE:
        raise ValueError(
            f"{KEY}: {path}: the vector of passage {rows[worst]} (from 0) differs by {error[worst]:.2f} of its "
            f"length from what the context encoder makes (tolerance {EXACT_TOLERANCE}): other passages, another order, "
            "another encoder or another lengths.passage_tokens"
        )


def write_vectors(imported: Imported, file: Path) -> None:
    """Copies the vectors that the index holds exactly to a .npy file [N, d] fp32, in the passages' order, in chunks."""
    shape = (imported.index.ntotal, imported.index.d)
    vectors = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    for first in range(0, shape[0], ROWS_A_CHUNK):
        rows = np.arange(first, min(first + ROWS_A_CHUNK, shape[0]))
        chunk = imported.vectors(rows)
        if imported.index.metric_type == faiss.METRIC_L2:
            _check_norms(imported.path, chunk, rows)
        vectors[rows[0] : rows[-1] + 1] = chunk
    vectors.flush()


def check_header(path: Path, dimension: int) -> None:
    """Checks dimension and metric alone, which stand in the file's first bytes, whatever its size. Raises ValueError."""
    _check_file(path)
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) == HEADER.size:
        _check_kind(path, *HEADER.unpack(head), dimension)


def _check_kind(path: Path, found: int, metric: int, dimension: int) -> None:
    if found == dimension + 1 and metric == faiss.METRIC_L2:
        raise ValueError(
            f"{KEY}: {path} holds vectors of {found} dimensions, one more than the context encoder makes: DPR's auxiliary "
            "dimension, which makes L2 of the inner product; it cannot be adopted, index.factory: HNSW32 builds such an index"
        )
    if found != dimension:
        raise ValueError(
            f"{KEY}: {path} holds vectors of {found} dimensions, the context encoder makes {dimension}; "
            "set models.context_encoder to the encoder that made the index"
        )
    if metric not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise ValueError(f"{KEY}: {path} uses FAISS metric {metric}; build it with METRIC_INNER_PRODUCT")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{KEY}: {path} is a folder; name the index file in it")
    if not path.is_file():
        raise ValueError(f"{KEY}: {path} not found; relative paths count from the folder of params.yaml")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"{KEY}: {path} cannot be read: {error.strerror}") from None
    if size < SMALLEST_FILE:
        raise ValueError(f"{KEY}: {path} has {size} bytes, too few for a FAISS index; export it again")
    if not (magic[:1] == b"I" and magic.isalnum()):
        raise ValueError(
            f"{KEY}: {path} is not a FAISS index (it starts with {magic!r}); give a file of faiss.write_index"
        )


def _check_norms(path: Path, vectors: np.ndarray, rows: np.ndarray) -> None:
    off = np.abs(np.linalg.norm(vectors, axis=1) - 1)
    if not off.max() <= NORM_TOLERANCE:
        raise ValueError(
            f"{KEY}: {path} ranks by L2 and its vectors are not of length 1 (passage {rows[off.argmax()]}, from 0, is off by "
            f"{off.max():.3f}): not the order of inner products; build it with metric_type=faiss.METRIC_INNER_PRODUCT"
        )


def _below_id_map(index: faiss.Index) -> faiss.Index:
    mapped = isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2)
    return faiss.downcast_index(index.index) if mapped else index


def _places(path: Path, index: faiss.Index) -> np.ndarray | None:
    """Where the inner index holds each row, for those that know ids; an IVF index learns to find its vectors by id."""
    lists = faiss.try_extract_index_ivf(index)
    mapped = _ids_of_map(index)
    for ids, where in ((mapped, "its id map"), (_ids_of_lists(lists), "its inverted lists")):
        if ids is not None and not np.array_equal(np.sort(ids), np.arange(index.ntotal)):
            raise ValueError(
                f"{KEY}: {path}: the ids in {where} are not the row numbers 0 to {index.ntotal - 1}, each once; number the "
                "passages by their row in data/prepared"
            )
    if lists is not None:
        lists.make_direct_map()
    return None if mapped is None else np.argsort(mapped)


def _ids_of_map(index: faiss.Index) -> np.ndarray | None:
    mapped = isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2)
    return faiss.vector_to_array(index.id_map) if mapped else None


def _ids_of_lists(lists) -> np.ndarray | None:
    if lists is None:
        return None
    held = lists.invlists
    parts = [faiss.rev_swig_ptr(held.get_ids(i), held.list_size(i)) for i in range(lists.nlist) if held.list_size(i)]
    return np.concatenate([np.array(part) for part in parts]) if parts else np.empty(0, dtype=np.int64)
