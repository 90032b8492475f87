"""Questions and their answers as the model takes them: all of a split, and a batch of them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stages.bm25.hits import Hits
from stages.corpus.token_store import TokenStore


@dataclass
class Examples:
    """Questions and one gold answer each, tokenized once."""

    for_encoder: TokenStore  # with special tokens
    for_generator: TokenStore  # " // question", without
    targets: Tensor  # [N, T] answer ids, EOS, padding
    target_mask: Tensor  # [N, T]
    hits: Hits | None = None  # BM25's, where retrieval is hybrid

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Examples":
        return Examples(
            self.for_encoder.to(device),
            self.for_generator.to(device),
            self.targets.to(device),
            self.target_mask.to(device),
            self.hits and self.hits.to(device),
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
