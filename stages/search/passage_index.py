"""The passage index: FAISS over the passages' vectors, and the vectors themselves for scores with a gradient."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor

from stages.compute import ranks
from stages.compute.exact_search import ExactSearch, fp32_scores
from stages.search.faiss_files import inner, opened, reason
from stages.search.index_kinds import TRAIN_SIZE, empty_index, filled, set_search_parameters, train
from stages.search.sharded_search import ShardedSearch
from stages.settings.retrieval import Index
from stages.storage import manifest

FILES = ("index.faiss", "index.json")
INDEX_REMEDY, VECTORS_REMEDY = "run `dvc repro --force index`", "run `dvc repro --force encode`"
SHARE_OF_FREE_MEMORY = 0.25
NO_KERNELS = (
    f"faiss {faiss.__version__} has no kernels that run on this GPU; install faiss-gpu 1.14.3 or newer, which has them for "
    "compute capability 7.0 and up (faiss-gpu-cu12 ends at 8.9; an H100 is 9.0)"
)
# What FAISS's GPU kernels must be able to do, as a program of its own.
PROBE = """
import sys, faiss, numpy
index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), int(sys.argv[1]), faiss.IndexFlatIP(8))
index.add(numpy.ones((8, 8), numpy.float32))
index.search(numpy.ones((1, 8), numpy.float32), 1)
"""


@dataclass
class PassageIndex:
    """Passages of one corpus, searchable by inner product."""

    index: faiss.Index
    vectors: Tensor  # [N, d] fp32, memory-mapped until moved to a device
    exact: ExactSearch | ShardedSearch | None = field(default=None, repr=False)  # in place of a flat index, on a GPU

    def search(self, questions: Tensor, n_docs: int) -> Tensor:
        """Rows of the n_docs best passages of each question, best first: [B, n_docs] int64, -1 where there is none.

        On a GPU a flat index is searched exactly by one matrix product (exact_search.py), which reads the vectors once; on a
        CPU, and where the index is approximate, by FAISS.
        """
        if self.exact is not None:
            rows = self.exact.search(questions.detach(), n_docs)
            return torch.nn.functional.pad(rows, (0, n_docs - rows.shape[1]), value=-1)
        # FAISS answers -1 for what it did not find, which indexes the last vector: callers must look for it.
        _, rows = self.index.search(questions.detach().float().cpu().numpy(), n_docs)
        return torch.from_numpy(rows)

    def gather(self, rows: Tensor) -> Tensor:
        """Vectors of the named passages: [..., d]; a missing passage (-1) gets some vector, to be masked."""
        return self.vectors[rows.clamp(min=0)]

    def finish_searches(self) -> None:
        """To be called on every rank behind searches that some ranks may have more of: see sharded_search.py."""
        if isinstance(self.exact, ShardedSearch):
            self.exact.finish()

    def to(self, device: torch.device, together: bool = False) -> "PassageIndex":
        """The same index for searching on `device`.

        On a GPU a flat index becomes a bf16 copy there. The fp32 vectors follow if they take at most a quarter of the
        free memory, else they stay memory-mapped and only the rows that are needed travel. Other kinds move if FAISS
        has GPU support and an implementation of that kind, else they stay with FAISS on the CPU.

        `together`: every rank calls this and will search in step with the others. Where the bf16 copy takes more than a
        quarter of any rank's free memory, each then holds only its part of it.
        """
        if device.type != "cuda":
            return self
        if not isinstance(inner(self.index), faiss.IndexFlat):
            return PassageIndex(on_gpu(self.index, device), self.vectors)
        free, _ = torch.cuda.mem_get_info(device)
        in_parts = together and ranks.world() > 1 and not self._fits_everywhere(free)
        fits = self.vectors.numel() * 4 <= SHARE_OF_FREE_MEMORY * free
        vectors = self.vectors.to(device) if fits else self.vectors
        exact = ShardedSearch(self.vectors, device) if in_parts else ExactSearch(vectors, device)
        return PassageIndex(self.index, vectors, exact)

    def _fits_everywhere(self, free: int) -> bool:
        """Whether every rank has room for the whole bf16 copy, this one having `free` bytes."""
        ranks.wait()
        return bool(ranks.least([int(self.vectors.numel() * 2 <= SHARE_OF_FREE_MEMORY * free)])[0])


def build_index_on(
    device: torch.device, vectors: np.ndarray, factory: str, train_size: int = TRAIN_SIZE
) -> faiss.Index:
    """`kinds.build_index` with what FAISS can do on a GPU done there; the index is on the CPU in the end.

    A kind that learns is trained on the GPU; it is filled there too if the vectors, which take more than any kind makes
    of them, fit into a quarter of the free memory. What the GPU does not manage the CPU does.
    """
    index = empty_index(vectors.shape[1], factory, len(vectors))
    there = index if device.type != "cuda" or index.is_trained else on_gpu(index, device)
    if there is index:
        return filled(index, vectors, factory, train_size)
    try:
        train(there, vectors, factory, train_size)
        free, _ = torch.cuda.mem_get_info(device)
        if vectors.nbytes <= SHARE_OF_FREE_MEMORY * free:
            return faiss.index_gpu_to_cpu(filled(there, vectors, factory))
        return filled(faiss.index_gpu_to_cpu(there), vectors, factory)
    except (RuntimeError, ValueError) as error:
        _say_once(f"{type(index).__name__} is built on the CPU: FAISS does not build it on this GPU ({reason(error)})")
        return filled(index, vectors, factory, train_size)


def on_gpu(index: faiss.Index, device: torch.device) -> faiss.Index:
    """The index on the GPU where FAISS can take it there, else the index itself."""
    if not finds_gpu():
        return index
    kind = type(index).__name__
    if not kernels_run(device.index or 0):
        _say_once(f"{kind} stays on the CPU: {NO_KERNELS}")
        return index
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    except RuntimeError as error:
        _say_once(f"{kind} stays on the CPU: FAISS does not move it to a GPU ({reason(error)})")
        return index


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def finds_gpu() -> bool:
    """Whether FAISS has GPU support and finds a GPU."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@cache
def kernels_run(gpu: int) -> bool:
    """Whether FAISS's kernels run on GPU number `gpu`; tried in another process, since FAISS aborts its own."""
    return not subprocess.run([sys.executable, "-c", PROBE, str(gpu)], capture_output=True).returncode


def doc_scores(questions: Tensor, passages: Tensor, rows: Tensor) -> Tensor:
    """Inner products of question vectors [B, d] and passage vectors [B, K, d] in fp32, -inf for missing passages.

    In fp32 whatever the autocast: at 64 to 128 the spacing of bf16 is half a nat.
    """
    with torch.autocast(questions.device.type, enabled=False):
        scores = fp32_scores(questions.float(), passages.float())
    return scores.masked_fill(rows < 0, float("-inf"))


def flat_index(passages: int, dimension: int) -> PassageIndex:
    """A flat index whose `vectors` [passages, dimension] are its own memory, to be filled: 60 GB need not lie there twice."""
    index = faiss.IndexFlatIP(dimension)
    index.codes.resize(4 * passages * dimension)
    index.ntotal = passages
    return PassageIndex(index, torch.from_numpy(np.asarray(_FlatMemory(index))))


class _FlatMemory:
    """The vectors inside of a flat index, for numpy, whose array keeps this object and with it the index alive."""

    def __init__(self, index: faiss.IndexFlat):
        self.index = index
        self.__array_interface__ = {
            "shape": (index.ntotal, index.d), "typestr": "<f4", "data": (int(index.get_xb()), False), "version": 3,
        }  # fmt: skip


def write_index(index: faiss.Index, folder: Path) -> None:
    """Writes index.faiss. Raises ValueError where the disk cannot take it."""
    try:
        faiss.write_index(index, str(folder / "index.faiss"))
    except RuntimeError as error:
        raise ValueError(f"{folder / 'index.faiss'}: cannot be written ({reason(error)}); is the disk full?") from None


def describe_index(folder: Path, facts: dict, vectors: Path) -> None:
    """Writes index.json, with the digest of the vectors.npy in the folder `vectors` that the index was made from, and
    records what lies in `folder`."""
    facts = facts | {"vectors": manifest.recorded(vectors, "vectors.npy")}
    (folder / "index.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    manifest.record(*(folder / name for name in FILES))


def index_folders(model: Path, index: Path, vectors: Path) -> tuple[Path, Path]:
    """Where the index and its vectors lie that belong to a trained model: in its own folder if its context encoder was
    trained, else in `index` and `vectors`."""
    own = model / "index"
    return (own, own) if own.is_dir() else (index, vectors)


def open_vectors(folder: Path) -> np.ndarray:
    """The passages' vectors [N, d] fp32, memory-mapped. Raises ValueError where they are missing or damaged."""
    file = folder / "vectors.npy"
    if not file.is_file():
        raise ValueError(f"{file}: not found; run `dvc repro` (or python -m stages.encode) first")
    manifest.check(folder, ("vectors.npy",), VECTORS_REMEDY)
    try:
        return np.load(file, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder}: damaged ({str(error).splitlines()[0]}); {VECTORS_REMEDY}") from None


def load_index(folder: Path, vectors_folder: Path, settings: Index | None = None) -> PassageIndex:
    """Opens an index and the vectors that it was made from, memory-mapped, with the search parameters of `settings`
    (nprobe, ef_search).

    Raises ValueError where a part is missing, altered or does not fit the others, or where the index has no such
    parameter.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: not found; run `dvc repro` (or python -m stages.index) first")
    manifest.check(folder, FILES, INDEX_REMEDY)
    vectors = open_vectors(vectors_folder)
    try:
        index = opened(folder / "index.faiss")
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{folder}: damaged ({str(error).splitlines()[0]}); {INDEX_REMEDY}") from None
    if (index.ntotal, index.d) != vectors.shape:
        raise ValueError(
            f"{folder}: index.faiss holds {index.ntotal} vectors of {index.d} dimensions, {vectors_folder / 'vectors.npy'} "
            f"{vectors.shape[0]} of {vectors.shape[1]}; {INDEX_REMEDY}"
        )
    if facts.get("vectors") != manifest.recorded(vectors_folder, "vectors.npy"):
        raise ValueError(f"{folder}: made from other vectors than those in {vectors_folder}; {INDEX_REMEDY}")
    if settings is not None:
        set_search_parameters(index, settings.nprobe, settings.ef_search)
    return PassageIndex(index, torch.from_numpy(vectors))
