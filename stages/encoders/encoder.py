"""Encoders: a question or a passage in, one vector out. Scores are inner products.

DPR's two classes (Karpukhin et al. 2020), and BERT-like models whose states are pooled: the first one or the mean of all
(Reimers & Gurevych 2019), scaled to length 1 or not. How they are loaded: loading.py.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DPRContextEncoder, DPRQuestionEncoder, PreTrainedTokenizerBase

from stages.corpus.text_tokens import text_rows
from stages.corpus.token_store import TokenStore
from stages.encoders.packed_bert import PackedBert
from stages.encoders.sentence_layout import SentenceLayout, write_layout
from stages.packed.packing import Packing

# The two classes differ in the name of the one module that holds all weights.
ROOTS = {DPRQuestionEncoder: "question_encoder.", DPRContextEncoder: "ctx_encoder."}
SORTING_WINDOW = 8192


@dataclass
class Encoder:
    """An encoder and its tokenizer."""

    model: Any  # a DPR class, or a BERT-like AutoModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Literal["dpr", "cls", "mean"] = "dpr"
    normalize: bool = False
    question_prefix: str = ""
    passage_prefix: str = ""
    max_tokens: int | None = None  # where the model's own folder asks for less than it could take

    @property
    def dimension(self) -> int:
        config = self.model.config
        return getattr(config, "projection_dim", 0) or config.hidden_size

    @property
    def is_plain_dpr(self) -> bool:
        """Whether the model alone says everything."""
        return self.pooling == "dpr" and not (self.normalize or self.question_prefix or self.passage_prefix)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Vectors [R, dimension] of token ids [R, L]; `mask` [R, L] is 0 at padding."""
        return self.pooled(self.model(ids, attention_mask=mask), mask)

    def pooled(self, output: Any, mask: Tensor) -> Tensor:
        """Vectors [R, dimension] of what the model gave for tokens [R, L]."""
        if self.pooling == "dpr":
            vectors = output.pooler_output
        elif self.pooling == "cls":
            vectors = output.last_hidden_state[:, 0]
        else:
            inside = mask[..., None]
            vectors = (output.last_hidden_state.float() * inside).sum(1) / inside.sum(1)
        return self._scaled(vectors)

    def question_rows(self, questions: list[str], limit: int) -> list[list[int]]:
        """Token ids of questions with special tokens, cut to `limit` and to what the model can take."""
        if self.question_prefix:
            questions = [self.question_prefix + question for question in questions]
        return self._rows(questions, None, limit, truncation=True)

    def passage_rows(self, titles: list[str], texts: list[str], limit: int) -> list[list[int]]:
        """Token ids of passages with special tokens; what is too long is cut.

        DPR reads (title, text) pairs: the text is cut, then a title that is too long alone. Others read "title text".
        """
        if self.pooling == "dpr":
            if self.passage_prefix:
                titles = [self.passage_prefix + title for title in titles]
            return self._rows(titles, texts, limit, truncation="longest_first")
        joined = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
        return self._rows([self.passage_prefix + passage for passage in joined], None, limit, truncation=True)

    def _rows(self, first, second, limit, truncation) -> list[list[int]]:
        limit = min(limit, self.most_tokens)
        return text_rows(self.tokenizer, first, second, truncation=truncation, max_length=limit)

    @property
    def most_tokens(self) -> int:
        """Tokens that the model can take, or less where its folder asks for less.

        RoBERTa and MPNet count positions from behind the padding id.
        """
        positions = self.model.config.max_position_embeddings
        padding = getattr(getattr(self.model, "embeddings", None), "padding_idx", None)
        positions = positions if padding is None else positions - padding - 1
        return min(positions, self.max_tokens or positions)

    def vectors(self, store: TokenStore, batch_tokens: int, device: torch.device, progress: str = "") -> Iterator:
        """Vectors of every row of `store`, in order: (first row, fp32 array [rows, dimension]) a sorting window.

        A batch holds at most `batch_tokens` tokens besides padding, of which DPR has none. Rows are sorted by length
        within a window of SORTING_WINDOW, so that those of a batch are alike.
        """
        starts = range(0, len(store), SORTING_WINDOW)
        windows = (TokenStore(store.tokens, store.offsets[start : start + SORTING_WINDOW + 1]) for start in starts)
        with tqdm(total=len(store), desc=progress, unit=" rows", disable=not progress) as bar:
            for start, rows in zip(starts, self.stream(windows, batch_tokens, device), strict=True):
                bar.update(len(rows))
                yield start, rows

    def stream(self, stores: Iterable[TokenStore], batch_tokens: int, device: torch.device) -> Iterator[np.ndarray]:
        """Each store's vectors, fp32 [rows, dimension]; a store's rows are sorted together.

        A GPU works on the next store while the caller has the vectors of the last one.
        """
        packed = self.without_padding(torch.bfloat16 if device.type == "cuda" else torch.float32)
        queued = None
        for store in stores:
            last, queued = queued, self._queue(store, packed, batch_tokens, device)
            if device.type == "cpu":
                yield queued.fetch()
            elif last:
                yield last.fetch()
        if queued and device.type != "cpu":
            yield queued.fetch()

    def _queue(
        self, store: TokenStore, packed: PackedBert | None, batch_tokens: int, device: torch.device
    ) -> "_Queued":
        begin, end = store.offsets[0], store.offsets[-1]
        ordered, order = (store.offsets[1:] - store.offsets[:-1]).sort(descending=True, stable=True)
        sizes = batches_of_tokens(ordered.tolist(), batch_tokens)

        def sent(tensor: Tensor) -> Tensor:
            # Only from page-locked memory does a copy join the GPU's queue; any other waits until that is empty.
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        tokens, places, lengths = sent(store.tokens[begin:end]), sent(order), sent(ordered)
        starts = sent(store.offsets[:-1][order] - begin)
        out = torch.empty(len(store), self.dimension, device=device)
        splits = (part.split(sizes) for part in (ordered, lengths, starts, places))
        for known, some, first, rows in zip(*splits, strict=True):
            packing = Packing.of_lengths(some, int(known.sum()), int(known[0]))
            source = first.repeat_interleave(some, output_size=len(packing.positions)) + packing.positions
            # Without padding the weights are of the right type; autocast would keep the states in fp32.
            casting = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not packed)
            with torch.inference_mode(), casting:
                out[rows] = self.packed_vectors(tokens[source].long(), packing, packed).float()
        return _Queued.of(out)

    def without_padding(self, dtype: torch.dtype | None = None) -> PackedBert | None:
        """The model for packed rows, for DPR, which has one; `dtype` as PackedBert's."""
        if self.pooling != "dpr":
            return None
        return PackedBert(getattr(self.model, ROOTS[type(self.model)].rstrip(".")), dtype)

    def packed_vectors(self, tokens: Tensor, packing: Packing, packed: PackedBert | None) -> Tensor:
        """Vectors of packed rows; where no packed model is given, padding is put between them again."""
        if packed:
            return self._scaled(packed.vectors(tokens, packing))
        mask = packing.unpack(torch.ones_like(tokens))
        return self.embed(packing.unpack(tokens) + (1 - mask) * self.tokenizer.pad_token_id, mask)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(vectors.float(), dim=-1) if self.normalize else vectors

    def save(self, folder: Path) -> None:
        """A plain DPR folder, or that of sentence-transformers, which says how states become a vector."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if not self.is_plain_dpr:
            pooling = None if self.pooling == "dpr" else self.pooling
            layout = SentenceLayout(
                pooling, self.normalize, self.max_tokens, "", self.question_prefix, self.passage_prefix
            )
            write_layout(folder, layout, self.dimension)


class _Queued(NamedTuple):
    """Vectors that a GPU is still at, or that are there."""

    vectors: Tensor  # in the host's memory
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, vectors: Tensor) -> "_Queued":
        if not vectors.is_cuda:
            return cls(vectors, None)
        copied = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        copied.copy_(vectors, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return cls(copied, ready)

    def fetch(self) -> np.ndarray:
        if self.ready:
            self.ready.synchronize()
        return self.vectors.numpy()


def batches_of_tokens(lengths: list[int], most: int) -> list[int]:
    """How many rows, taken in order, fit into batches of at most `most` tokens; a longer row is a batch of its own."""
    sizes, tokens = [], 0
    for length in lengths:
        if not sizes or tokens + length > most:
            sizes.append(0)
            tokens = 0
        sizes[-1] += 1
        tokens += length
    return sizes


def padded_rows(store: TokenStore, rows: Tensor, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The named rows as ids and attention mask [R, L] on `device`."""
    ids, lengths = store.padded(rows.to(store.offsets.device), limit=1 << 30, pad=pad)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return ids.to(device, non_blocking=True), mask.long().to(device, non_blocking=True)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout until the block ends."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
