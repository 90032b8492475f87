"""Kinds of FAISS index: built from a factory string, told how thoroughly to search."""

import faiss
import numpy as np

from stages.search.faiss_files import ROWS_A_CHUNK, inner, reason

TRAIN_SIZE = 200_000
NPROBES, EF_SEARCHES = (1, 4, 16, 64, 256), (16, 64, 256)


def empty_index(dimension: int, factory: str, passages: int) -> faiss.Index:
    """An index of the factory string by inner product, with nothing in it.

    Raises ValueError for a string that FAISS does not know, or that needs more passages than there are: known before
    hours of encoding.
    """
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"index.factory: '{factory}' is not a factory string that FAISS can build ({reason(error)})"
        ) from None
    lists = faiss.try_extract_index_ivf(index)
    needed = lists.nlist if lists else 0
    quantizer = getattr(inner(index), "pq", None)
    needed = max(needed, 1 << quantizer.nbits if quantizer else 0)
    if needed > passages:
        raise ValueError(
            f"index.factory: '{factory}' needs at least {needed} passages to be trained on, there are {passages}; "
            "use Flat or fewer lists"
        )
    return index


def build_index(vectors: np.ndarray, factory: str, train_size: int = TRAIN_SIZE) -> faiss.Index:
    """A FAISS index of the factory string over all vectors [N, d], trained on `train_size` of them where it learns.

    Memory: the index, the training sample and ROWS_A_CHUNK vectors. Raises ValueError as `empty_index` does.
    """
    return filled(empty_index(vectors.shape[1], factory, len(vectors)), vectors, factory, train_size)


def filled(index: faiss.Index, vectors: np.ndarray, factory: str, train_size: int = TRAIN_SIZE) -> faiss.Index:
    """An empty index of the factory string, wherever it is, trained and filled with all vectors [N, d]."""
    train(index, vectors, factory, train_size)
    for first in range(0, len(vectors), ROWS_A_CHUNK):
        chunk = np.ascontiguousarray(vectors[first : first + ROWS_A_CHUNK])
        try:
            index.add(chunk)
        except RuntimeError:  # IDMap wants its ids said: row numbers
            index.add_with_ids(chunk, np.arange(first, first + len(chunk)))
    return index


def train(index: faiss.Index, vectors: np.ndarray, factory: str, train_size: int = TRAIN_SIZE) -> None:
    """Trains an index, wherever it is, on `train_size` of the vectors, unless it is trained or learns nothing."""
    if index.is_trained:
        return
    sample = np.random.default_rng(0).permutation(len(vectors))[:train_size]
    try:
        index.train(np.ascontiguousarray(vectors[np.sort(sample)]))  # sorted: the disk is read from front to back
    except RuntimeError as error:
        raise ValueError(
            f"index.factory: '{factory}' cannot be trained on {len(sample)} passages ({reason(error)})"
        ) from None


def set_search_parameters(index: faiss.Index, nprobe: int | None = None, ef_search: int | None = None) -> None:
    """Sets nprobe and ef_search; None leaves FAISS's default. Raises ValueError where the index has no such parameter."""
    lists, graph = faiss.try_extract_index_ivf(index), _graph(index)
    if nprobe is not None:
        if lists is None:
            raise ValueError(_no_parameter("nprobe", index, "an IVF index"))
        if nprobe > lists.nlist:
            raise ValueError(f"index.nprobe: {nprobe}, but the index has only {lists.nlist} lists")
        lists.nprobe = nprobe
    if ef_search is not None:
        if graph is None:
            raise ValueError(_no_parameter("ef_search", index, "an HNSW index"))
        graph.hnsw.efSearch = ef_search


def thoroughness(index: faiss.Index) -> list[tuple[str, int]]:
    """Settings worth measuring of an index that can be searched more or less thoroughly; empty for one that cannot."""
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        return [("nprobe", value) for value in NPROBES if value <= lists.nlist]
    return [("ef_search", value) for value in EF_SEARCHES] if _graph(index) is not None else []


def _graph(index: faiss.Index) -> faiss.Index | None:
    """The HNSW graph that an index is, or by which an IVF index finds its lists."""
    lists = faiss.try_extract_index_ivf(index)
    graph = faiss.downcast_index(lists.quantizer) if lists else inner(index)
    return graph if hasattr(graph, "hnsw") else None


def _no_parameter(name: str, index: faiss.Index, owner: str) -> str:
    kind = type(inner(index)).__name__.removeprefix("Index")
    return f"index.{name}: the index is of kind {kind}, which has no such parameter ({owner} has); set it to null"
