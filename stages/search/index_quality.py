"""What an index costs and what it loses: milliseconds a question, and how much of the exact result it finds."""

import time

import torch
from torch import Tensor

from stages.compute.exact_search import exact_scan
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder
from stages.search.index_kinds import set_search_parameters, thoroughness
from stages.search.passage_index import PassageIndex, doc_scores

DEPTHS = (1, 5, 20, 50)
QUESTIONS_A_SEARCH = 32  # as a training step or an evaluation batch asks
SAME_SCORE = 1e-5  # relative; FAISS and torch sum in different orders


def search_quality(
    index: PassageIndex, encoder: Encoder, questions: list[str], question_tokens: int, device: torch.device
) -> dict:
    """Recall against exact search, for real questions, and the time of a search on `device`.

    recall_of_exact_at_k, in percent: the share of the exact k best that the index's first k hold, averaged over the
    questions. By score, as ann-benchmarks counts: of two equally good passages either is right. An index that can be
    searched more or less thoroughly is measured at several settings, each under its name (nprobe_4, ef_search_64).
    """
    if not questions:
        return {}
    store = TokenStore.from_rows(encoder.question_rows(questions, question_tokens))
    asked = torch.cat([torch.from_numpy(rows) for _, rows in encoder.vectors(store, 8192, device)]).to(device)
    depth = min(max(DEPTHS), len(index.vectors))
    placed = index.to(device)
    best, _ = exact_scan(asked, placed.vectors, depth)
    best = best.cpu()

    def measured(placed: PassageIndex) -> dict[str, float]:
        placed.search(asked[:QUESTIONS_A_SEARCH], depth)  # the first search pays for reading the index from the disk
        started = time.perf_counter()
        found = torch.cat([placed.search(batch, depth) for batch in asked.split(QUESTIONS_A_SEARCH)]).cpu()
        milliseconds = (time.perf_counter() - started) * 1000 / len(asked)
        return {"search_ms_per_question": milliseconds, **recall_of_exact(asked.cpu(), best, found, index.vectors)}

    results: dict = {"questions": len(questions)}
    settings = thoroughness(index.index)
    if not settings:
        return results | measured(placed)
    for name, value in settings:
        set_search_parameters(index.index, **{name: value})
        results[f"{name}_{value}"] = measured(index.to(device))
    return results


def recall_of_exact(questions: Tensor, best: Tensor, found: Tensor, vectors: Tensor) -> dict[str, float]:
    """Percent of the exact best, by their scores `best` [B, depth], among the rows `found` [B, depth] (-1: none)."""
    recalls = {}
    scores = torch.cat([
        doc_scores(question[None], vectors[rows.clamp(min=0)][None], rows[None])
        for question, rows in zip(questions, found, strict=True)
    ])  # fmt: skip
    for k in DEPTHS:
        if k <= best.shape[1]:
            least = best[:, k - 1 : k]
            hits = (scores[:, :k] >= least - SAME_SCORE * least.abs()).float().mean(1)
            recalls[f"recall_of_exact_at_{k}"] = 100 * float(hits.mean())
    return recalls
