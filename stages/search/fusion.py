"""Hybrid retrieval: dense scores and BM25 scores added up, over the best passages of both.

A weighted sum of scores keeps what joint training needs: the prior is their softmax, and its gradient reaches the question
vector through the dense part alone (Ma et al. 2021, arXiv:2104.05740, fuse DPR and BM25 like this).
"""

import torch
from torch import Tensor

from stages.bm25.hits import Hits
from stages.search.passage_index import PassageIndex, doc_scores


@torch.no_grad()
def fuse(
    index: PassageIndex, questions: Tensor, dense: Tensor, hits: Hits, score_scale: float, weight: float, n_docs: int
) -> tuple[Tensor, Tensor]:
    """The n_docs best passages of each question [B, d] by score_scale x inner product + weight x BM25.

    Candidates are the rows `dense` [B, C] and the hits. Returns rows [B, n_docs], best first, -1 where there are no
    more, and their BM25 scores [B, n_docs].
    """
    of_dense, same = lexical_scores(dense, hits)
    rows = torch.cat([dense, hits.rows.masked_fill(same.any(1), -1)], dim=1)
    lexical = torch.cat([of_dense, hits.scores], dim=1)
    passages = index.gather(rows.to(index.vectors.device)).to(questions.device)
    scores = score_scale * doc_scores(questions, passages, rows) + weight * lexical
    scores, best = scores.topk(min(n_docs, scores.shape[1]), dim=1)
    rows, lexical = rows.gather(1, best), lexical.gather(1, best)
    missing = n_docs - rows.shape[1]
    pad = torch.nn.functional.pad
    return pad(rows, (0, missing), value=-1), pad(lexical, (0, missing))


def lexical_scores(rows: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
    """BM25 scores [B, C] of the passages `rows` [B, C], and which of the hits each is [B, C, D].

    A passage outside a full list of hits counts with the list's lowest score, which is the most that it can have; outside a
    list that is not full it shares no word.
    """
    same = rows[:, :, None] == hits.rows[:, None, :]
    known = (same & (rows >= 0)[:, :, None]).any(2)
    lowest = torch.where(hits.rows[:, -1] >= 0, hits.scores[:, -1], 0.0)
    return torch.where(known, (same * hits.scores[:, None, :]).sum(2), lowest[:, None]), same
