"""A cross-encoder: question and passage read together by one BERT-like model, one score out (Nogueira & Cho 2019).

Its folder is that of transformers' sequence classification with one label, which sentence-transformers' CrossEncoder
reads and writes too. A plain encoder, DPR's included, gets a new head on its first token.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
)

from stages.corpus.text_tokens import text_rows
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import ROOTS
from stages.encoders.loading import ARCHITECTURES, BERT_LIKE, found_model, load_encoder, one_line
from stages.encoders.packed_bert import PackedBody
from stages.packed.packing import Packing

FEWEST_PASSAGE_TOKENS = 16


class Frame(NamedTuple):
    """What stands around a question and a passage: special tokens before, between and behind, and their token types."""

    tokens: tuple[list[int], list[int], list[int]]
    types: tuple[int, int, int, int, int] | None  # before, question, between, passage, behind; None: the model has none

    @property
    def size(self) -> int:
        return sum(map(len, self.tokens))


class Asked(NamedTuple):
    """B questions' tokens without special ones: padded ids [B, Q] and lengths [B]."""

    ids: Tensor
    lengths: Tensor

    def pin_memory(self) -> "Asked":
        return Asked(*(part.pin_memory() for part in self))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Asked":
        return Asked(*(part.to(device, non_blocking=non_blocking) for part in self))

    def repeated(self, times: int) -> "Asked":
        return Asked(*(part.repeat_interleave(times, 0) for part in self))


class Pairs(NamedTuple):
    """R pairs of a question and a passage, packed."""

    ids: Tensor  # [tokens]
    types: Tensor | None  # [tokens]
    packing: Packing


@dataclass
class CrossEncoder:
    """A model that scores pairs, and its tokenizer."""

    model: Any  # one of transformers' ...ForSequenceClassification, with one label
    tokenizer: PreTrainedTokenizerBase
    frame: Frame

    def question_rows(self, questions: list[str], limit: int) -> list[list[int]]:
        """Token ids of questions without special tokens, cut to `limit`."""
        return self._rows(questions, limit)

    def passage_rows(self, titles: list[str], texts: list[str], limit: int) -> list[list[int]]:
        """Token ids of "title text" without special tokens, cut to `limit`."""
        return self._rows([f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)], limit)

    def _rows(self, texts: list[str], limit: int) -> list[list[int]]:
        rows = text_rows(self.tokenizer, texts, add_special_tokens=False)
        return [row[:limit] for row in rows]

    def passage_room(self, question_tokens: int, passage_tokens: int) -> int:
        """Tokens of a passage that are read beside a question of `question_tokens`, at most `passage_tokens`.

        Raises ValueError where the model's positions leave too little.
        """
        config = self.model.config
        shifted = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions from behind padding
        positions = config.max_position_embeddings - (config.pad_token_id + 1 if shifted else 0)
        room = min(passage_tokens, positions - question_tokens - self.frame.size)
        if room < FEWEST_PASSAGE_TOKENS:
            raise ValueError(
                f"models.reranker: its {positions} positions leave {max(room, 0)} tokens for a passage beside a question of "
                f"lengths.question_tokens ({question_tokens}); lower that or take another model"
            )
        return room

    def pairs(self, asked: Asked, passages: TokenStore, rows: Tensor) -> Pairs:
        """Each of R questions with the passage that `rows` [R] names (-1: some passage, its score means nothing)."""
        device, count = asked.ids.device, len(rows)
        ids, lengths = passages.padded(rows.clamp(min=0).to(passages.offsets.device), limit=1 << 30, pad=0)
        parts, inside, types = [], [], []
        of_types = self.frame.types or (0,) * 5
        texts = [(asked.ids, asked.lengths), (ids.to(device), lengths.to(device)), None]
        for tokens, text, (own, texts_own) in zip(
            self.frame.tokens, texts, ((0, 1), (2, 3), (4, 4)), strict=True
        ):  # fmt: skip
            special = torch.tensor(tokens, dtype=torch.long, device=device).expand(count, -1)
            parts.append(special)
            inside.append(torch.ones_like(special, dtype=torch.bool))
            types.append(torch.full_like(special, of_types[own]))
            if text is not None:
                parts.append(text[0])
                inside.append(torch.arange(text[0].shape[1], device=device) < text[1][:, None])
                types.append(torch.full_like(text[0], of_types[texts_own]))
        mask = torch.cat(inside, dim=1)
        sizes = mask.sum(1)
        total, longest = torch.stack([sizes.sum(), sizes.max()]).tolist()
        return Pairs(
            torch.cat(parts, dim=1)[mask],
            torch.cat(types, dim=1)[mask] if self.frame.types else None,
            Packing.of_lengths(sizes, total, longest),
        )

    def scores(self, pairs: Pairs, dtype: torch.dtype | None = None) -> Tensor:
        """Scores [R] in fp32, the logits of the one label; `dtype` as PackedBert's, for inference.

        BERT reads the pairs without padding; other kinds read them padded, in whatever autocast makes of them.
        """
        ids, types, packing = pairs
        if reads_packed(self.model):
            with torch.autocast(ids.device.type, enabled=False) if dtype else nullcontext():
                first = PackedBody(self.model.bert, dtype).first_states(ids, packing, types)
            # The head in fp32: a score of 16 in bf16 is right to an eighth of a nat.
            with torch.autocast(ids.device.type, enabled=False):
                pooled = self.model.bert.pooler(first[:, None])
                return self.model.classifier(self.model.dropout(pooled)).squeeze(1)
        mask = packing.unpack(torch.ones_like(ids))
        given = {"input_ids": packing.unpack(ids) + (1 - mask) * self.tokenizer.pad_token_id, "attention_mask": mask}
        if types is not None:
            given["token_type_ids"] = packing.unpack(types)
        return self.model(**given).logits.squeeze(1).float()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def reads_packed(model: nn.Module) -> bool:
    return isinstance(model, BertForSequenceClassification)


def load_cross_encoder(path_or_name: str, key: str = "models.reranker", weights: bool = True) -> CrossEncoder:
    """Loads a cross-encoder in fp32, or makes one of an encoder with a new head, drawn by torch's random state.

    Without `weights` its model is made of the configuration alone, on the meta device. Raises ValueError, which names the
    parameter `key`.
    """
    _, source, within, config = found_model(path_or_name, key)
    architecture = (config.architectures or ["?"])[0]
    if architecture in ARCHITECTURES:
        encoder = load_encoder(path_or_name, key, weights=weights)
        with nullcontext() if weights else torch.device("meta"):
            model = bert_of_dpr(encoder.model)
        return _framed(model, encoder.tokenizer, path_or_name, key)
    if config.model_type not in BERT_LIKE:
        raise ValueError(
            f"{key}: '{path_or_name}' is a {architecture} (model type {config.model_type}); give a cross-encoder or an "
            f"encoder of one of the kinds {', '.join(BERT_LIKE)}"
        )
    if architecture.endswith("ForSequenceClassification") and config.num_labels != 1:
        raise ValueError(
            f"{key}: '{path_or_name}' tells {config.num_labels} classes apart; a reranker gives one score (num_labels 1)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **within)
        if weights:
            model = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=1, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, **within
            )
        else:
            config.num_labels = 1
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{key}: '{path_or_name}' is incomplete: {one_line(error)}") from None
    return _framed(model, tokenizer, path_or_name, key)


def bert_of_dpr(dpr: nn.Module) -> BertForSequenceClassification:
    """DPR's BERT under a new head."""
    shared = BertConfig().to_dict().keys() - {"id2label", "label2id"}
    known = {name: value for name, value in dpr.config.to_dict().items() if name in shared}
    config = BertConfig(**{**known, "architectures": ["BertForSequenceClassification"], "num_labels": 1})
    model = BertForSequenceClassification(config)
    root = f"{ROOTS[type(dpr)]}bert_model."
    weights = {
        f"bert.{name.removeprefix(root)}": value for name, value in dpr.state_dict().items() if name.startswith(root)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(("bert.pooler.", "classifier.")) for name in missing), missing
    return model


def _framed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path_or_name: str, key: str) -> CrossEncoder:
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"{key}: the tokenizer in '{path_or_name}' has no padding token or no tokenizer.json")
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    return CrossEncoder(model.eval(), tokenizer, frame_of(tokenizer, has_types))


def frame_of(tokenizer: PreTrainedTokenizerBase, has_types: bool) -> Frame:
    """How this tokenizer joins two texts, read off a pair that it has joined."""
    encoded = tokenizer(["a"], ["a"])
    ids, texts = encoded["input_ids"][0], encoded.sequence_ids(0)
    first, last = ([place for place, text in enumerate(texts) if text == which] for which in (0, 1))
    tokens = ids[: first[0]], ids[first[-1] + 1 : last[0]], ids[last[-1] + 1 :]
    of = encoded["token_type_ids"][0] if has_types and "token_type_ids" in encoded else None
    if of is None:
        return Frame(tokens, None)
    # A side without special tokens has no type of its own, and needs none.
    places = (0, first[0], first[-1] + 1 if tokens[1] else first[0], last[0], len(ids) - 1)
    return Frame(tokens, tuple(of[place] for place in places))
