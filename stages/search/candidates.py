"""Candidates of dense and lexical search for a whole split, and how a reranker orders them."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from stages.bm25.hits import Hits
from stages.corpus.recall import recall_at, recalls
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder
from stages.encoders.reranker_warmup import asked_rows
from stages.params import Params
from stages.search.fusion import fuse
from stages.search.passage_index import PassageIndex, doc_scores
from stages.search.reranking import Reranker

QUESTIONS_AT_ONCE = 256
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
FIT_STEPS = 50


@dataclass
class Candidates:
    """N questions' candidates [N, C] on the host, best first (-1: none), with their scores by each search."""

    rows: Tensor
    dense: Tensor  # inner products; 0 where there is none
    lexical: Tensor  # BM25's; 0 without a lexical search

    def scores(self, score_scale: float, hybrid_weight: float) -> Tensor:
        """What the candidates are ordered by; a missing one's means nothing."""
        return score_scale * self.dense + hybrid_weight * self.lexical


class Searched:
    """An index, a question encoder and, for all questions that will be asked, BM25's hits where there are any."""

    def __init__(self, index: PassageIndex, encoder: Encoder, hits: Hits | None, params: Params, device: torch.device):
        self.index, self.encoder, self.hits, self.device = index.to(device), encoder, hits, device
        self.question_tokens = params.lengths.question_tokens
        encoder.model.to(device)

    @torch.no_grad()
    def candidates(
        self, questions: Dataset, depth: int, score_scale: float, weight: float | None, rows: Tensor | None = None
    ) -> Candidates:
        """The `depth` best for each question, or for those that `rows` name, by score_scale and the hybrid `weight` (None:
        by the dense search alone)."""
        hits = None if weight is None else self.hits
        if rows is not None:
            questions, hits = questions.select(rows.tolist()), hits and hits.select(rows)
        tokens = self.encoder.question_rows(list(questions["question"]), self.question_tokens)
        batches = self.encoder.vectors(TokenStore.from_rows(tokens), BATCH_TOKENS[self.device.type], self.device)
        vectors = torch.from_numpy(np.concatenate([batch for _, batch in batches]))
        parts = []
        for part in torch.arange(len(vectors)).split(QUESTIONS_AT_ONCE):
            asked = vectors[part].to(self.device)
            found = self.index.search(asked, depth if hits is None else max(depth, hits.rows.shape[1])).to(self.device)
            lexical = torch.zeros(found.shape, device=self.device)
            if hits is not None:
                some = hits.select(part).to(self.device)
                found, lexical = fuse(self.index, asked, found, some, score_scale, weight, depth)
            stored = self.index.gather(found.to(self.index.vectors.device)).to(self.device)
            dense = doc_scores(asked, stored, found).masked_fill(found < 0, 0.0)
            parts.append((found.cpu(), dense.cpu(), lexical.cpu()))
        return Candidates(*(torch.cat(of) for of in zip(*parts, strict=True)))


def reranker_scores(reranker: Reranker, found: Candidates, questions: list[str], limit: int) -> Tensor:
    """The reranker's score of every candidate [N, C], on the host."""
    store = TokenStore.from_rows(reranker.encoder.question_rows(questions, limit))
    parts = torch.arange(len(questions)).split(QUESTIONS_AT_ONCE)
    return torch.cat(
        [
            reranker.scores_of_all(asked_rows(store, part, reranker.device), found.rows[part].to(reranker.device)).cpu()
            for part in parts
        ]
    )


def ranking_metrics(
    reranker: Reranker, found: Candidates, questions: Dataset, golds: list[list[int]], params: Params,
    depths: tuple[int, ...],
) -> dict[str, float]:  # fmt: skip
    """Recall of candidates as they came, by the reranker alone, by all with the weights of params.yaml and by those
    weights that make the gold passages likeliest (`fitted_*`, score_scale being what it is), and the pairs a second. Where
    no question names a gold passage the speed is all.
    """
    settings = params.retriever
    started = time.perf_counter()
    crossed = reranker_scores(reranker, found, list(questions["question"]), params.lengths.question_tokens)
    seconds = time.perf_counter() - started
    missing = found.rows < 0
    plain = found.scores(settings.score_scale, settings.hybrid_weight)
    gold = torch.tensor([[row in some for row in rows] for some, rows in zip(golds, found.rows.tolist(), strict=True)])
    parts = torch.stack([settings.score_scale * found.dense, found.lexical, crossed])
    fitted = fitted_weights(parts, gold, missing)
    named = [index for index, some in enumerate(golds) if some]

    def recall(name: str, scores: Tensor) -> dict[str, float]:
        order = scores.masked_fill(missing, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        hits = gold.gather(1, order)[named].tolist()
        return recalls(hits, depths, f"{name}_")

    speed = {"candidates": found.rows.shape[1], "pairs_per_second": found.rows.numel() / seconds}
    if not named:
        return speed
    return speed | {
        "candidates_recall": recall_at(gold[named].tolist(), found.rows.shape[1]),  # the most that reranking can reach
        **recall("candidates", plain),
        **recall("reranker", crossed),
        **recall("reranked", plain + settings.cross_weight * crossed),
        **recall("fitted", (fitted[:, None, None] * parts).sum(0)),
        "fitted_hybrid_weight": (fitted[1] / fitted[0]).item(),
        "fitted_cross_weight": (fitted[2] / fitted[0]).item(),
        "fitted_temperature": (1 / fitted[0]).item(),
    }


def fitted_weights(parts: Tensor, gold: Tensor, missing: Tensor) -> Tensor:
    """Positive weights [P] of the `parts` [P, N, C] of a score under whose softmax the gold candidates [N, C] are
    likeliest, all of a question's together; what has none of them is left out."""
    asked = gold.any(1)
    parts, gold, missing = parts[:, asked].double(), gold[asked], missing[asked]
    log_weights = torch.zeros(len(parts), dtype=torch.double, requires_grad=True)
    if not len(gold):
        return log_weights.detach().exp().float()
    optimizer = torch.optim.LBFGS([log_weights], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = (log_weights.exp()[:, None, None] * parts).sum(0).masked_fill(missing, float("-inf"))
        wrong = scores.log_softmax(1).masked_fill(~gold, float("-inf")).logsumexp(1).mean().neg()
        wrong = wrong + 1e-4 * (log_weights**2).sum()  # a part that is no help would go to nothing for ever
        wrong.backward()
        return wrong

    optimizer.step(loss)
    return log_weights.detach().exp().float()
