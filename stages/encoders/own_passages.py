"""A question's own passages: one is drawn for a step of the warm-up, none of them is ever a negative of the question."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.corpus.token_store import TokenStore


class OwnPassages:
    """The positives of Q questions, by their rows in a store of passages, and the other rows of the same text.

    Passages are the same where all tokens that the encoder reads of them are, whatever their ids: their vectors are.
    """

    def __init__(self, rows: Sequence[list[int]], passages: TokenStore):
        self.rows = list(rows)
        self.text_of = same_texts(passages)  # [N] int64
        self._texts = [self.text_of[some].unique() for some in self.rows]

    def first(self, questions: Tensor) -> Tensor:
        """Rows [B] of the questions' first positives."""
        return torch.tensor([self.rows[question][0] for question in questions.tolist()])

    def draw(self, questions: Tensor, generator: torch.Generator) -> Tensor:
        """Rows [B] of one positive for each question; who has one alone draws nothing from the generator."""
        chosen = [self.rows[question] for question in questions.tolist()]
        drawn = (int(torch.randint(len(rows), (), generator=generator)) if len(rows) > 1 else 0 for rows in chosen)
        return torch.tensor([rows[at] for rows, at in zip(chosen, drawn, strict=True)])

    def among(self, questions: Tensor, passages: Tensor) -> Tensor:
        """Which of the passages [M] are the questions' own [B], copies too: bool [B, M]."""
        texts = self.text_of[passages]
        return torch.stack([torch.isin(texts, self._texts[question]) for question in questions.tolist()])

    def among_each(self, passages: Tensor) -> Tensor:
        """The same of passages [Q, M], each line for the question that stands there (-1: some passage): bool [Q, M]."""
        texts = self.text_of[passages.clamp(min=0)]
        own = pad_sequence(self._texts, batch_first=True, padding_value=-1)
        found = torch.zeros_like(texts, dtype=torch.bool)
        for column in own.T:
            found |= texts == column[:, None]
        return found


def same_texts(store: TokenStore) -> Tensor:
    """A number for each row [N] that rows of the same tokens share, by a hash of 64 bits."""
    tokens, ends = store.tokens.cpu().numpy(), store.offsets.tolist()
    digests = (
        hashlib.blake2b(tokens[first:last].tobytes(), digest_size=8).digest()
        for first, last in zip(ends[:-1], ends[1:], strict=True)
    )
    hashes = np.frombuffer(b"".join(digests), dtype=np.int64)
    return torch.from_numpy(np.unique(hashes, return_inverse=True)[1].astype(np.int64).reshape(-1))
