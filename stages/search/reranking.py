"""The reranker: a cross-encoder over the best candidates of dense and lexical search, and every passage as it reads it.

All candidates are scored without gradient; those that are read then get their scores anew, with gradient. Passages are
tokenized once, by the stage of the same name, and gathered on the device.
"""

from pathlib import Path

import torch
from torch import Tensor

from stages.compute.precision import has_bf16
from stages.corpus.token_store import TokenStore
from stages.encoders.cross_encoder import Asked, CrossEncoder, load_cross_encoder
from stages.encoders.encoder import in_eval_mode
from stages.search import reranker_folder

TOKENS_AT_ONCE = {"cpu": 16384, "cuda": 262144}


class Reranker:
    """A cross-encoder and the token ids of all N passages."""

    def __init__(self, encoder: CrossEncoder, tokens: TokenStore):
        self.encoder, self.tokens = encoder, tokens
        self.longest = int(tokens.offsets.diff().max()) if len(tokens) else 0

    @property
    def device(self) -> torch.device:
        return next(self.encoder.model.parameters()).device

    def scores(self, asked: Asked, rows: Tensor) -> Tensor:
        """Scores [B, K] of each question's passages `rows` [B, K], with gradient; 0 for a missing one (-1)."""
        pairs = self.encoder.pairs(asked.repeated(rows.shape[1]), self.tokens, rows.flatten())
        return self.encoder.scores(pairs).view(rows.shape).masked_fill(rows < 0, 0.0)

    def scores_of_present(self, asked: Asked, rows: Tensor) -> Tensor:
        """The same where many are missing: these are not read."""
        there = (rows >= 0).flatten().nonzero().squeeze(1)
        scores = torch.zeros(rows.numel(), device=rows.device)
        if len(there):
            questions = Asked(*(part[there // rows.shape[1]] for part in asked))
            pairs = self.encoder.pairs(questions, self.tokens, rows.flatten()[there])
            scores = scores.index_put((there,), self.encoder.scores(pairs))
        return scores.view(rows.shape)

    @torch.no_grad()
    def scores_of_all(self, asked: Asked, rows: Tensor) -> Tensor:
        """The same of many candidates: without gradient and dropout, on a GPU in bf16, as many at once as memory takes."""
        device = self.device
        dtype = torch.bfloat16 if has_bf16(device) else None
        pair = asked.ids.shape[1] + self.encoder.frame.size + self.longest
        at_once = max(1, TOKENS_AT_ONCE[device.type] // (pair * rows.shape[1]))
        parts = []
        with in_eval_mode(self.encoder.model):
            for first in range(0, len(rows), at_once):
                some = slice(first, first + at_once)
                chosen, repeated = rows[some], Asked(asked.ids[some], asked.lengths[some]).repeated(rows.shape[1])
                pairs = self.encoder.pairs(repeated, self.tokens, chosen.flatten())
                parts.append(self.encoder.scores(pairs, dtype).view(chosen.shape))
        return torch.cat(parts).masked_fill(rows < 0, 0.0)

    def to(self, device: torch.device) -> "Reranker":
        """The passages' tokens on a GPU; the model follows its Rag."""
        return Reranker(self.encoder, self.tokens.to(device)) if device.type == "cuda" else self


def load_reranker(folder: Path, named: str | None, trained: Path | None = None) -> Reranker | None:
    """What the stage left in `folder`, the model by its training where `trained` is a folder; None without a reranker.

    `named` is models.reranker. Raises ValueError where the stage ran for another one, or not at all.
    """
    if named is None:
        return None
    reranker_folder.check(folder, named)
    tokens = TokenStore.open(folder / "tokens", "reranker")
    return Reranker(load_cross_encoder(str(trained or folder / "model")), tokens)
