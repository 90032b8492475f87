"""Candidates of dense and lexical search for a whole split, how they are ordered, and the prior that suits them."""

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
from stages.settings.retrieval import Retriever

QUESTIONS_AT_ONCE = 256
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
FIT_STEPS = 50
SPREAD = 1.0  # standard deviation of the log weights before any question is seen
WEIGHTS = ("score_scale", "hybrid_weight", "cross_weight", "temperature")  # of the prior, as rag/prior.py has them


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
        tokens = self.encoder.question_rows(questions["question"][:], self.question_tokens)
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
    found: Candidates, alone: dict[str, Tensor], crossed: Tensor | None, golds: list[list[int]], settings: Retriever,
    depths: tuple[int, ...],
) -> tuple[dict[str, float], dict[str, float] | None]:  # fmt: skip
    """Recall of N questions' candidates and of each search `alone` ({name: rows [N, K]}), and the prior that suits them.

    As they came (`candidates`), with the reranker's scores `crossed` [N, C] by these alone and by all with the weights of
    params.yaml, and by those weights that make the gold passages likeliest (`fitted`), which come second, too. Where no
    question names a gold passage there is neither.
    """
    named = [index for index, some in enumerate(golds) if some]
    if not named:
        return {}, None
    missing, gold = found.rows < 0, is_gold(found.rows, golds)
    # The temperature changes no order and the fit hardly depends on it: a warm-up need not run again for another.
    start = {name: getattr(settings, name) for name in WEIGHTS[:-1]} | {"temperature": 1.0}
    fitted, _, nll = fitted_prior(found, crossed, gold, start)

    def recall(name: str, hits: Tensor) -> dict[str, float]:
        return recalls(hits[named].tolist(), [k for k in depths if k <= hits.shape[1]], f"{name}_")

    def ranked(name: str, scores: Tensor) -> dict[str, float]:
        order = scores.masked_fill(missing, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        return recall(name, gold.gather(1, order))

    metrics = {
        "candidates": found.rows.shape[1],
        "candidates_recall": recall_at(gold[named].tolist(), found.rows.shape[1]),  # the most that reranking can reach
    }
    for name, rows in alone.items():
        metrics |= recall(name, is_gold(rows, golds))
    metrics |= ranked("candidates", found.scores(settings.score_scale, settings.hybrid_weight))
    if crossed is not None:
        metrics |= ranked("reranker", crossed) | ranked("reranked", weighted(found, crossed, start))
    metrics |= ranked("fitted", weighted(found, crossed, fitted))
    there = {"hybrid_weight": found.lexical.any(), "cross_weight": crossed is not None, "temperature": True}
    metrics |= {f"fitted_{name}": fitted[name] for name, is_there in there.items() if is_there}
    return metrics | {"fitted_gold_nll": nll}, fitted


def is_gold(rows: Tensor, golds: list[list[int]]) -> Tensor:
    """Which of the rows [N, C] are their question's own."""
    return torch.tensor([[row in some for row in of_one] for some, of_one in zip(golds, rows.tolist(), strict=True)])


def weighted(found: Candidates, crossed: Tensor | None, weights: dict[str, float]) -> Tensor:
    """The scores [N, C] whose softmax is the prior, as rag/prior.py has them; a missing candidate's means nothing."""
    scores = found.scores(weights["score_scale"], weights["hybrid_weight"])
    if crossed is not None:
        scores = scores + weights["cross_weight"] * crossed
    return scores / weights["temperature"]


def fitted_prior(
    found: Candidates, crossed: Tensor | None, gold: Tensor, start: dict[str, float]
) -> tuple[dict[str, float], float, float]:
    """The prior's weights under which the gold candidates [N, C] are likeliest, and their mean negative log-likelihood in
    nats, before and after, over the questions that have some.

    It begins at the weights `start` and never ends with a lower likelihood. The temperature moves in place of score_scale.
    A weight of 0, or of what there is none of (BM25 hits, a reranker), stays.
    """
    named = {"score_scale": start["score_scale"] * found.dense}
    if found.lexical.any() and start["hybrid_weight"]:
        named["hybrid_weight"] = start["hybrid_weight"] * found.lexical
    if crossed is not None and start["cross_weight"]:
        named["cross_weight"] = start["cross_weight"] * crossed
    missing = found.rows < 0
    factors = fitted_weights(torch.stack(list(named.values())) / start["temperature"], gold, missing).tolist()
    of_dense, *others = factors
    fitted = start | {"temperature": start["temperature"] / of_dense}
    for name, factor in zip(list(named)[1:], others, strict=True):
        fitted[name] = start[name] * factor / of_dense
    before, after = (gold_nll(weighted(found, crossed, weights), gold, missing) for weights in (start, fitted))
    return (fitted, before, after) if after <= before else (start, before, before)


def gold_nll(scores: Tensor, gold: Tensor, missing: Tensor) -> float:
    """-log of the share that the gold candidates have of the scores' softmax, the mean over the questions that have some;
    0 of none."""
    asked = gold.any(1)
    prior = scores.double().masked_fill(missing, float("-inf"))[asked].log_softmax(1)
    return prior.masked_fill(~gold[asked], float("-inf")).logsumexp(1).sum().neg().item() / max(1, int(asked.sum()))


def fitted_weights(parts: Tensor, gold: Tensor, missing: Tensor) -> Tensor:
    """Positive weights [P] of the `parts` [P, N, C] of a score under whose softmax the gold candidates [N, C] are
    likeliest, all of a question's together; what has none of them is left out. Of few questions they stay near 1."""
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
        # Of a few questions, all ranked right, an infinitely sharp prior is the likeliest: no passage behind the first would
        # ever get a gradient. So the weights are log-normal around 1, which many questions outvote.
        wrong = wrong + (log_weights**2).sum() / (2 * SPREAD**2 * len(gold))
        wrong.backward()
        return wrong

    optimizer.step(loss)
    return log_weights.detach().exp().float()
