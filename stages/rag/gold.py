"""What the warm-up teaches goes on beside the answers: -log p(gold passages | x), p the prior over what competes with them.

The marginal's gradient, prior minus posterior over the n_docs passages read, orders these alone. Here the passages that are
known to be right compete with what retrieval found: all candidates of dense search and BM25 together, or of dense search
alone. Where a model scores passages anew in each step, a reranker or a context encoder that trains, these would be fifty
passes forth and back; there the passages read compete, one gold passage beside them and two candidates from further down.

All of these are scored with gradient. Candidates whose scores enter as constants would push the scores of the others up for
ever: a softmax does not change where all scores grow, but its gradient on a part of them has a sum, and an optimizer that
divides by the gradient's size follows it. Forty steps of that took a reranker's own recall@5 from 91 to 13 on the sample.
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

FURTHER = (0.1, 0.4)  # of the candidates that are not read, how far down they lie that are scored beside those that are


def retrieve_with_golds(rag: Any, question_vectors: Tensor, batch: RagBatch) -> tuple[Tensor, Tensor, Tensor]:
    """`Rag.retrieve` of a batch with `golds`: rows and scores [B, K] of the passages read and, nats a question [B],
    -log p(gold passages | x), 0 for a question that has none.

    A question that reads none of its gold passages gets one beside them: the best of its candidates or, where none is one,
    the first, with its score by the same weights; BM25's as fusion.py has it for a passage outside of the hits. Further
    gold passages count as far as they compete.
    """
    every = ranked(rag, question_vectors.detach(), batch.hits, batch.asked, everything=True)
    read, rest = every.rows[:, : rag.n_docs], every.rows[:, rag.n_docs :]
    beside = gold_beside(read, rest, batch.golds)
    rest = rest.masked_fill(rest == beside, -1)
    places = list(range(rest.shape[1]))
    if rag.reranker or rag.passage_encoder:
        places = sorted({int(share * len(places)) for share in FURTHER}) if places else []
    rows = torch.cat([read, beside, rest[:, places]], dim=1)
    lexical = crossed = None
    if batch.hits is not None:
        of_read, of_rest = every.lexical[:, : rag.n_docs], every.lexical[:, rag.n_docs :]
        lexical = torch.cat([of_read, lexical_scores(beside, batch.hits)[0], of_rest[:, places]], dim=1)
    if rag.reranker:
        crossed = rag.reranker.scores_of_present(batch.asked, rows)
    passages = rag.passage_encoder.vectors(rows) if rag.passage_encoder else rag.passage_vectors(rows)
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
