"""Hard negatives: passages that rank high for a question and do not answer it (Karpukhin et al. 2020, section 3.2).

They are found by the encoders in training themselves, as in ANCE (Xiong et al. 2021), but once, between two rounds of the
warm-up, not again and again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from stages.compute.exact_search import exact_scan
from stages.corpus.answers import hits_with_answers, sought
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder
from stages.encoders.own_passages import OwnPassages

PASSAGES_A_CHUNK = 8192  # tokenized at once, 20 KB a passage while the tokenizer works
QUESTIONS_A_SEARCH = 8192  # vectors are read once for so many
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}


@dataclass
class HardNegatives:
    """What was mined for each question, and how many of them it brings into a batch."""

    pool: Tensor  # [Q, depth] int64 rows of passages, best first; -1 behind the last one
    count: int

    @property
    def mean(self) -> float:
        """Passages a question."""
        return (self.pool >= 0).sum(1).float().mean().item()

    def draw(self, questions: Tensor, generator: torch.Generator) -> Tensor:
        """Passages [M] for the questions [B]: `count` different ones for each, all where its pool holds fewer."""
        drawn = self.draw_each(questions, generator)
        return drawn[drawn >= 0]

    def draw_each(self, questions: Tensor, generator: torch.Generator) -> Tensor:
        """The same as [B, count], -1 behind the last one of a smaller pool."""
        pool = self.pool[questions]
        order = torch.rand(pool.shape, generator=generator).masked_fill(pool < 0, 2.0).argsort(dim=1)
        return pool.gather(1, order[:, : self.count])


def tokenize_passages(encoder: Encoder, passages: Dataset, limit: int) -> TokenStore:
    """Token ids of all passages, cut to `limit`; four bytes a token, and one chunk's lists."""
    parts = [
        TokenStore.from_rows(encoder.passage_rows(chunk["title"], chunk["text"], limit))
        for chunk in tqdm(passages.iter(PASSAGES_A_CHUNK), desc="tokenize passages", unit=" chunks")
    ]
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return TokenStore(torch.cat([part.tokens for part in parts]), F.pad(lengths.cumsum(0), (1, 0)))


def best_hits(
    question_encoder: Encoder, context_encoder: Encoder, questions: TokenStore, passages: TokenStore, depth: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Rows [Q, min(depth, N)] of the passages with the highest scores, best first, by exact search.

    The vectors of all passages are held in memory on the host: 4 bytes a dimension and passage.
    """
    vectors = _vectors(context_encoder, passages, device, "encode passages")
    asked = _vectors(question_encoder, questions, device, "encode questions")
    parts = tqdm(asked.split(QUESTIONS_A_SEARCH), desc="search hard negatives", unit=" searches")
    return torch.cat([exact_scan(part.to(device), vectors, depth)[1].cpu() for part in parts])


def without_answers(
    hits: Tensor, answers: Sequence[list[str]], own: OwnPassages, passages: Dataset, skip: int = 0,
    patterns: bool = False, unanswerable: str | None = None,
) -> Tensor:  # fmt: skip
    """Those of the hits [Q, depth] that are negatives, in their order and behind them -1; the first `skip` are left out.

    A hit that contains an answer (answers.contains_answer, in title and text) is no negative, nor is one of the
    question's own passages or a copy of one. `patterns`: answers are regular expressions; `unanswerable` is none to be
    found: data.answers_are, data.unanswerable.
    """
    to_find = [sought(some, unanswerable) for some in answers]
    flagged = hits_with_answers(passages, hits.tolist(), to_find, patterns)
    flags = torch.tensor(list(tqdm(flagged, "look for answers", len(hits), unit=" questions"))).view(hits.shape)
    negative = (hits >= 0) & ~own.among_each(hits) & ~flags
    order = negative.sort(dim=1, descending=True, stable=True).indices
    pool = hits.gather(1, order).masked_fill(~negative.gather(1, order), -1)
    return F.pad(pool[:, skip:], (0, min(skip, pool.shape[1])), value=-1)


def _vectors(encoder: Encoder, store: TokenStore, device: torch.device, progress: str) -> Tensor:
    """fp32 vectors [N, d] of every row, on the host."""
    vectors = torch.empty(len(store), encoder.dimension)
    for first, rows in encoder.vectors(store, BATCH_TOKENS[device.type], device, progress):
        vectors[first : first + len(rows)] = torch.from_numpy(rows)
    return vectors
