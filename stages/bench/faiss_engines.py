"""FAISS on a GPU beside FAISS on the CPU: an index that is moved there, and one that is trained and filled there."""

import time
from argparse import Namespace
from functools import partial

import faiss
import numpy as np
import torch
from torch import Tensor

from stages.bench import random_models
from stages.bench.timing import timed
from stages.compute.exact_search import fp32_scores
from stages.search.index_kinds import build_index, empty_index, filled
from stages.search.index_quality import SAME_SCORE
from stages.search.passage_index import NO_KERNELS, PassageIndex, finds_gpu, kernels_run, on_gpu

FACTORIES = ("Flat", "IVF1024,Flat")
NPROBE = 32


def compare_engines(options: Namespace, device: torch.device) -> dict:
    """Milliseconds of a search by every index of FACTORIES, and how much of the CPU's results the GPU's are.

    Raises ValueError where FAISS has no GPU support, or does not take a kind to a GPU.
    """
    check_faiss_gpu(device)
    faiss.omp_set_num_threads(torch.get_num_threads())
    config, count = random_models.ENCODERS[options.shapes], options.passages[0]
    dimension, questions = config.projection_dim or config.hidden_size, int(options.batch.split("x")[0])
    vectors = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    asked = torch.randn(questions, dimension, generator=torch.Generator().manual_seed(0)).to(device)
    results, exact = {}, None
    for factory in FACTORIES:
        results[factory], rows = {}, {}
        for name, (index, seconds) in made(vectors, factory, device).items():
            searched = PassageIndex(index, torch.from_numpy(vectors))
            search = partial(searched.search, asked, options.n_docs)
            rows[name] = search()
            exact = rows["cpu"] if exact is None else exact  # a flat index's
            results[factory][name] = {
                "seconds_to_make": seconds,
                "milliseconds": {
                    key: 1000 * value for key, value in timed(search, max(20, options.runs), device).items()
                },
                "same_as_cpu": same_rows(rows[name], rows["cpu"], asked.cpu(), searched.vectors),
                "among_cpu": overlap(rows[name], rows["cpu"]),
                "among_exact": overlap(rows[name], exact),
            }
    return {"engine": "faiss-gpu", "passages": count, "questions": questions, "by_index": results}


def made(vectors: np.ndarray, factory: str, device: torch.device) -> dict[str, tuple[faiss.Index, float]]:
    """An index on the CPU, the same moved to the GPU, one made on the GPU from the same sample; seconds that each took."""
    started = time.perf_counter()
    index = with_nprobe(build_index(vectors, factory))
    built = time.perf_counter()
    moved = with_nprobe(on_gpu(index, device))
    there = time.perf_counter()
    if moved is index:
        raise ValueError(f"--engine faiss-gpu: FAISS does not take {factory} to a GPU, its reason is above")
    empty = on_gpu(empty_index(vectors.shape[1], factory, len(vectors)), device)
    own = with_nprobe(filled(empty, vectors, factory))
    finished = time.perf_counter()
    return {"cpu": (index, built - started), "moved": (moved, there - built), "built_there": (own, finished - there)}


def check_faiss_gpu(device: torch.device) -> None:
    """Raises ValueError where FAISS cannot search on `device`."""
    if device.type != "cuda" or not finds_gpu():
        raise ValueError(
            f"--engine faiss-gpu: faiss {faiss.__version__} finds no GPU here; it needs one and faiss-gpu in place of "
            "faiss-cpu, --engine exact needs neither"
        )
    if not kernels_run(device.index or 0):
        raise ValueError(f"--engine faiss-gpu: {NO_KERNELS}, or use --engine exact, which needs none")


def with_nprobe(index: faiss.Index) -> faiss.Index:
    if hasattr(index, "nprobe"):
        index.nprobe = NPROBE
    return index


def same_rows(found: Tensor, expected: Tensor, questions: Tensor, vectors: Tensor) -> float:
    """Share of the places [B, k] where both name the same row, or rows that score the same but for rounding: a tie."""
    scores = [fp32_scores(questions, vectors[rows.clamp(min=0)]) for rows in (found, expected)]
    tie = (scores[0] - scores[1]).abs() <= SAME_SCORE * scores[1].abs()
    present = (found >= 0) & (expected >= 0)
    return float(((found == expected) | (tie & present)).float().mean())


def overlap(found: Tensor, expected: Tensor) -> float:
    """Share of the rows `expected` [B, k] (-1: none) that are anywhere among the same question's `found`."""
    wanted = expected >= 0
    return float(((expected[:, :, None] == found[:, None]).any(2) & wanted).sum() / wanted.sum().clamp(min=1))
