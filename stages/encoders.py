"""DPR encoders (Karpukhin et al. 2020): a question or a passage in, one vector out.

Embedded models, hub names and local folders load through the same `from_pretrained`. Scores are inner products.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, DPRContextEncoder, DPRQuestionEncoder, PreTrainedTokenizerBase

from stages.contexts import TokenStore
from stages.packed_bert import PackedBert
from stages.packing import Packing

ARCHITECTURES = {"DPRQuestionEncoder": DPRQuestionEncoder, "DPRContextEncoder": DPRContextEncoder}
# The two classes differ in the name of the one module that holds all weights.
ROOTS = {DPRQuestionEncoder: "question_encoder.", DPRContextEncoder: "ctx_encoder."}
SORTING_WINDOW = 8192


@dataclass
class Encoder:
    """A DPR encoder and its tokenizer."""

    model: DPRQuestionEncoder | DPRContextEncoder
    tokenizer: PreTrainedTokenizerBase

    @property
    def dimension(self) -> int:
        config = self.model.config
        return config.projection_dim or config.hidden_size

    def question_rows(self, questions: list[str], limit: int) -> list[list[int]]:
        """Token ids of questions with special tokens, cut to `limit` and to what the model can take."""
        return self._rows(questions, None, limit, truncation=True)

    def passage_rows(self, titles: list[str], texts: list[str], limit: int) -> list[list[int]]:
        """Token ids of (title, text) pairs, DPR's layout; the text is cut, then a title that is too long alone."""
        return self._rows(titles, texts, limit, truncation="longest_first")

    def _rows(self, first, second, limit, truncation) -> list[list[int]]:
        limit = min(limit, self.model.config.max_position_embeddings)
        return self.tokenizer(first, second, truncation=truncation, max_length=limit)["input_ids"]

    def vectors(self, store: TokenStore, batch_tokens: int, device: torch.device, progress: str = "") -> Iterator:
        """Vectors of every row of `store`, in order: (first row, fp32 array [rows, dimension]) a sorting window.

        A batch holds at most `batch_tokens` tokens, none of them padding. Rows are sorted by length within a window of
        SORTING_WINDOW, so that those of a batch are alike.
        """
        packed = PackedBert(getattr(self.model, ROOTS[type(self.model)].rstrip(".")))
        lengths = store.offsets[1:] - store.offsets[:-1]
        bar = tqdm(total=len(store), desc=progress, unit=" rows", disable=not progress)
        for first in range(0, len(store), SORTING_WINDOW):
            last = min(first + SORTING_WINDOW, len(store))
            tokens = store.tokens[store.offsets[first] : store.offsets[last]].to(device)
            ordered, order = lengths[first:last].sort(descending=True, stable=True)
            sizes = batches_of_tokens(ordered.tolist(), batch_tokens)
            starts = (store.offsets[first:last] - store.offsets[first])[order].to(device)
            # All on the device until the window's end: a copy for every batch would keep it waiting for the host.
            out = torch.empty(last - first, self.dimension, device=device)
            splits = (
                ordered.split(sizes),
                ordered.to(device).split(sizes),
                starts.split(sizes),
                order.to(device).split(sizes),
            )
            for known, some, begin, rows in zip(*splits, strict=True):
                packing = Packing.of_lengths(some, int(known.sum()), int(known[0]))
                source = begin.repeat_interleave(some, output_size=len(packing.positions)) + packing.positions
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    out[rows] = packed.vectors(tokens[source].long(), packing).float()
                bar.update(len(rows))
            yield first, out.cpu().numpy()
        bar.close()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


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


def load_encoder(path_or_name: str, key: str, as_class: type = DPRQuestionEncoder) -> Encoder:
    """Loads a DPR encoder saved as either DPR class and returns it as `as_class`, in fp32.

    `key` is the parameter that named it (`models.question_encoder`), for messages. Raises ValueError.
    """
    try:
        config = AutoConfig.from_pretrained(path_or_name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}: no model at '{path_or_name}' ({_one_line(error)}); give a folder or a hub name"
        ) from None
    architecture = (config.architectures or ["?"])[0]
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise ValueError(
            f"{key}: '{path_or_name}' is a {architecture} (model type {config.model_type}); give a {known}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name, trust_remote_code=False)
        model = ARCHITECTURES[architecture].from_pretrained(path_or_name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{key}: '{path_or_name}' is incomplete: {_one_line(error)}") from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{key}: the tokenizer in '{path_or_name}' has no padding token")
    return Encoder(as_role(model, as_class).eval(), tokenizer)


def as_role(model: torch.nn.Module, as_class: type) -> torch.nn.Module:
    """The same weights as the other DPR class; a copy, so that the two can be trained apart."""
    if isinstance(model, as_class):
        return model
    old, new = ROOTS[type(model)], ROOTS[as_class]
    other = as_class(model.config)
    other.load_state_dict({new + name.removeprefix(old): value for name, value in model.state_dict().items()})
    return other


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
