"""Questions and their answers as the model takes them: all of a split, and a batch of them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stages.bm25.hits import Hits
from stages.corpus.token_store import TokenStore
from stages.encoders.cross_encoder import Asked


@dataclass
class Examples:
    """Questions and their gold answers, tokenized once."""

    for_encoder: TokenStore  # with special tokens
    for_generator: TokenStore  # " // question", without
    targets: Tensor  # [A, T] answer ids, EOS, padding
    target_mask: Tensor  # [A, T]
    hits: Hits | None = None  # BM25's, where retrieval is hybrid
    for_reranker: TokenStore | None = None  # without special tokens
    first_answers: Tensor | None = (
        None  # [N + 1] question i has the targets from the i-th up to the next; None: one each
    )
    golds: TokenStore | None = None  # rows of each question's gold passages, where they teach the retriever

    def __len__(self) -> int:
        return len(self.for_encoder)

    def answers_of(self, rows: Tensor, shares: Tensor | None = None) -> Tensor:
        """Which targets [B] the questions `rows` [B] get: their first or, by `shares` [N] in [0, 1), one of theirs."""
        if self.first_answers is None:
            return rows
        first = self.first_answers[rows]
        if shares is None:
            return first
        return first + (shares[rows.to(shares.device)].to(rows.device) * (self.first_answers[rows + 1] - first)).long()

    def to(self, device: torch.device) -> "Examples":
        return Examples(
            self.for_encoder.to(device),
            self.for_generator.to(device),
            self.targets.to(device),
            self.target_mask.to(device),
            self.hits and self.hits.to(device),
            self.for_reranker and self.for_reranker.to(device),
            self.first_answers if self.first_answers is None else self.first_answers.to(device),
            self.golds and self.golds.to(device),
        )


class RagBatch(NamedTuple):
    """B questions on the model's device."""

    question_ids: Tensor  # [B, L]
    question_mask: Tensor  # [B, L]
    generator_questions: Tensor  # [B, Q] ids of " // question"
    generator_question_lengths: Tensor  # [B]
    targets: Tensor  # [B, T]
    target_mask: Tensor  # [B, T]
    hits: Hits | None = None
    asked: Asked | None = None  # as the reranker reads them
    golds: Tensor | None = None  # [B, G] gold passages that teach the retriever; -1: no more, as in the last column

    def part(self, rows: slice) -> "RagBatch":
        """Some of the questions, as wide as all of them."""
        *tensors, hits, asked, golds = self
        return RagBatch(
            *(part[rows] for part in tensors), hits and hits.select(rows), asked and Asked(*(p[rows] for p in asked)),
            golds if golds is None else golds[rows],
        )  # fmt: skip
