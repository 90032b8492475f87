"""Which passages compete for a question, and in which order: dense search, with BM25's hits, reranked. Without gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.bm25.hits import Hits
from stages.encoders.cross_encoder import Asked
from stages.rag.prior import combined
from stages.search.fusion import fuse
from stages.search.passage_index import doc_scores

DENSE_CANDIDATES = 64  # as many as BM25 brings by the shipped parameters


class Ranked(NamedTuple):
    """B questions' passages, best first, with those parts of their scores that the searches gave."""

    rows: Tensor  # [B, C], -1: missing
    lexical: Tensor | None  # [B, C] BM25's, where retrieval is hybrid
    crossed: Tensor | None  # [B, C] the reranker's, where there is one

    def best(self, count: int) -> "Ranked":
        return Ranked(*(part if part is None else part[:, :count] for part in self))


@torch.no_grad()
def ranked(rag: Any, vectors: Tensor, hits: Hits | None, asked: Asked | None, everything: bool = False) -> Ranked:
    """A Rag's best n_docs passages of the questions `vectors` [B, d], or `everything` that competes.

    With BM25's `hits` both rankings compete (fusion.py); with a reranker, which reads the questions as `asked`, the best
    `rerank_depth` of them by the weights of params.yaml compete again. Dense hits alone compete for nothing: then everything
    is the best DENSE_CANDIDATES.
    """
    wanted = max(rag.n_docs, rag.rerank_depth) if rag.reranker else rag.n_docs
    if everything and not rag.reranker and hits is None:
        wanted = max(wanted, DENSE_CANDIDATES)
    searched = wanted if hits is None else max(wanted, hits.rows.shape[1])
    rows = rag.index.search(vectors, searched).to(vectors.device)
    lexical = None
    if hits is not None:
        plain = rag.prior.named if rag.reranker else rag.prior().detached()
        if everything and not rag.reranker:
            wanted = searched + hits.rows.shape[1]
        rows, lexical = fuse(rag.index, vectors, rows, hits, plain.score_scale, plain.hybrid_weight, wanted)
    found = Ranked(rows, lexical, None)
    if rag.reranker:
        found = _reranked(rag, vectors, found, asked)
    return found if everything else found.best(rag.n_docs)


def _reranked(rag: Any, vectors: Tensor, found: Ranked, asked: Asked) -> Ranked:
    """The candidates by all scores together.

    More than `rerank_depth` are wanted by evaluation alone: what comes behind these keeps its order behind them.
    """
    rows, lexical, _ = found
    crossed = rag.reranker.scores_of_all(asked, rows[:, : rag.rerank_depth])
    dense = doc_scores(vectors, rag.passage_vectors(rows), rows)
    crossed = torch.nn.functional.pad(crossed, (0, rows.shape[1] - crossed.shape[1]))
    scores = combined(rag.prior(), dense, lexical, crossed)
    scores[:, rag.rerank_depth :] = float("-inf")
    best = scores.sort(dim=1, descending=True, stable=True).indices
    return Ranked(
        rows.gather(1, best), lexical if lexical is None else lexical.gather(1, best), crossed.gather(1, best)
    )
