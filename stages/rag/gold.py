"""What the warm-up teaches goes on beside the answers: -log p(gold passages | x), p the prior over all candidates.

The marginal's gradient, prior minus posterior over the n_docs passages read, orders these alone. Here the passages that are
known to be right compete with all that retrieval found: rerank_depth candidates with a reranker, else those of dense search
and BM25 together, or of dense search alone. Inner products and the prior's weights get their gradient from all of them.
What a pass through a model would have to give does not: the cross-encoder (and a context encoder that trains) learns from
the passages read, which it scores with gradient anyway, and from one gold passage beside them. The other candidates' scores,
which the ranking has computed without gradient, enter as constants: scoring 50 candidates once more, forth and back, would
cost ten times what the five passages read do.
"""

from typing import Any

import torch
from torch import Tensor

from stages.generation.retriever_losses import gold_nll
from stages.rag.batches import RagBatch
from stages.rag.prior import combined
from stages.rag.ranked import ranked
from stages.search.fusion import lexical_scores
from stages.search.passage_index import doc_scores


def retrieve_with_golds(rag: Any, question_vectors: Tensor, batch: RagBatch) -> tuple[Tensor, Tensor, Tensor]:
    """`Rag.retrieve` of a batch with `golds`: rows and scores [B, K] of the passages read and, nats a question [B],
    -log p(gold passages | x), 0 for a question that has none.

    A question that reads none of its gold passages gets one beside them: the best of its candidates or, where none is one,
    the first, with its score by the same weights; BM25's as fusion.py has it for a passage outside of the hits. Further
    gold passages count as far as they are candidates.
    """
    every = ranked(rag, question_vectors.detach(), batch.hits, batch.asked, everything=True)
    read, rest = every.rows[:, : rag.n_docs], every.rows[:, rag.n_docs :]
    beside = gold_beside(read, rest, batch.golds)
    rest = rest.masked_fill(rest == beside, -1)
    scored = torch.cat([read, beside], dim=1)
    rows = torch.cat([scored, rest], dim=1)
    lexical = crossed = None
    if batch.hits is not None:
        of_read, of_rest = every.lexical[:, : rag.n_docs], every.lexical[:, rag.n_docs :]
        lexical = torch.cat([of_read, lexical_scores(beside, batch.hits)[0], of_rest], dim=1)
    if rag.reranker:
        crossed = torch.cat(
            [rag.reranker.scores_of_present(batch.asked, scored), every.crossed[:, rag.n_docs :]], dim=1
        )
    if rag.passage_encoder:
        passages = torch.cat([rag.passage_encoder.vectors(scored).float(), rag.passage_vectors(rest)], dim=1)
    else:
        passages = rag.passage_vectors(rows)
    scores = combined(rag.prior(), doc_scores(question_vectors, passages, rows), lexical, crossed)
    return read, scores[:, : rag.n_docs], gold_nll(scores, is_gold(rows, batch.golds))


def gold_beside(read: Tensor, rest: Tensor, golds: Tensor) -> Tensor:
    """The gold passage [B, 1] of each question to be scored beside those that it reads: -1 where these hold one, or it has
    none. `read` [B, K] and `rest` [B, R] are its candidates, best first, `golds` [B, G] its own; -1 is no passage.
    """
    among = torch.cat([rest.masked_fill(~is_gold(rest, golds), -1), golds], dim=1)
    first = among.gather(1, (among >= 0).int().argmax(dim=1, keepdim=True))
    return first.masked_fill(is_gold(read, golds).any(dim=1, keepdim=True), -1)


def is_gold(rows: Tensor, golds: Tensor) -> Tensor:
    """Which of the passages `rows` [B, C] are among their question's `golds` [B, G]."""
    return (rows[:, :, None] == golds[:, None, :]).any(2) & (rows >= 0)
