"""Batches for the small base models, gathered on the device: cloze questions, inverse cloze, bare names, questions.

Inverse cloze is Lee et al. 2019 (arXiv:1906.00300). What a span is was worked out before (corpus.py).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.corpus.token_store import TokenStore
from stages.generation.contexts import assemble_contexts
from stages.pretraining.corpus import ANSWER_TOKENS, BOS, EOS, MASK, PAD, PASSAGE_TOKENS, QUESTION_TOKENS

CONTEXT_TOKENS = 256
QUERY_TOKENS = 46
ENCODER_PASSAGE_TOKENS = 160
WINDOW = 14
assert PASSAGE_TOKENS + 2 <= CONTEXT_TOKENS


class Arrays:
    """The arrays of `pretraining_corpus.build_arrays` on a device."""

    def __init__(self, path: Path, device: torch.device):
        with np.load(path, allow_pickle=False) as arrays:
            self.values = {name: torch.from_numpy(self._wide(arrays[name])).to(device) for name in arrays.files}
        self.passages = self.store("passages", "passage_offsets")
        self.span_starts, self.span_lengths = self.values["spans"].view(-1, 2).unbind(1)
        self.span_offsets = self.values["span_offsets"] // 2
        self.with_spans = torch.nonzero(self.span_offsets[1:] > self.span_offsets[:-1]).flatten()

    @staticmethod
    def _wide(array: np.ndarray) -> np.ndarray:
        return array.astype(np.int32) if array.dtype == np.uint16 else array

    def store(self, tokens: str, offsets: str) -> TokenStore:
        return TokenStore(self.values[tokens], self.values[offsets])

    def random_spans(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A random entity-like span of each passage: start and length in tokens, [R] each."""
        first, last = self.span_offsets[rows], self.span_offsets[rows + 1]
        chosen = first + (torch.rand(len(rows), device=rows.device) * (last - first)).long()
        return self.span_starts[chosen].long(), self.span_lengths[chosen].long()


def uniform(low: int, high: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(low, high + 1, (count,), device=device)


def compact(tokens: Tensor, keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The kept tokens of each row moved to its left: ids [R, width] padded, lengths [R]."""
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :width]
    lengths = keep.sum(1).clamp(max=width)
    inside = torch.arange(order.shape[1], device=tokens.device) < lengths[:, None]
    return torch.where(inside, tokens.gather(1, order), PAD), lengths


def window(arrays: Arrays, rows: Tensor, start: Tensor, length: Tensor, left: Tensor, right: Tensor) -> tuple:
    """Passage tokens around a span: ids [R, W], which of them exist [R, W], which belong to the span [R, W]."""
    span = ANSWER_TOKENS
    column = torch.arange(2 * WINDOW + span, device=rows.device)[None, :]
    at = start[:, None] - left[:, None] + column
    size = (arrays.passages.offsets[rows + 1] - arrays.passages.offsets[rows])[:, None]
    end = (start + length + right)[:, None]
    exists = (at >= 0) & (at < size) & (at < end)
    source = torch.where(exists, arrays.passages.offsets[rows][:, None] + at, 0)
    return arrays.passages.tokens[source].long(), exists, (at >= start[:, None]) & (at < (start + length)[:, None])


def cloze_questions(arrays: Arrays, rows: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cloze questions over passages: ids [R, Q], lengths [R], answers [R, ANSWER_TOKENS] ending in EOS."""
    device = rows.device
    start, length = arrays.random_spans(rows)
    sides = uniform(3, WINDOW, 2 * len(rows), device).view(2, -1)
    tokens, exists, in_span = window(arrays, rows, start, length, sides[0], sides[1])
    # Some words are left out, so that the window has to be understood rather than aligned.
    dropped = torch.rand(tokens.shape, device=device) < 0.25 * torch.rand(len(rows), 1, device=device)
    first_of_span = in_span & ~F.pad(in_span, (1, 0))[:, :-1]
    tokens = torch.where(first_of_span, MASK, tokens)
    keep = exists & ((~in_span & ~dropped) | first_of_span)
    asked, lengths = compact(tokens, keep, QUESTION_TOKENS - len(prefix))
    asked = torch.cat([prefix.expand(len(rows), -1), asked], dim=1)
    column = torch.arange(ANSWER_TOKENS, device=device)[None, :]
    at = arrays.passages.offsets[rows][:, None] + start[:, None] + column
    answers = arrays.passages.tokens[at.clamp(max=len(arrays.passages.tokens) - 1)].long()
    answers = torch.where(column < length[:, None], answers, torch.where(column == length[:, None], EOS, PAD))
    return asked, lengths + len(prefix), answers


def gold_answers(arrays: Arrays, split: str, chosen: Tensor) -> Tensor:
    answers, lengths = arrays.store(f"{split}_answers", f"{split}_answer_offsets").padded(
        chosen, ANSWER_TOKENS - 1, PAD
    )
    answers = F.pad(answers, (0, ANSWER_TOKENS - answers.shape[1]), value=PAD)
    return answers.scatter(1, lengths[:, None], EOS)


def fit(width: int, tokens: Tensor) -> Tensor:
    return F.pad(tokens, (0, width - tokens.shape[1]), value=PAD)


def generator_batch(arrays: Arrays, size: int, qa_share: float, prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Context ids and mask [size, CONTEXT_TOKENS] and answers [size, ANSWER_TOKENS]."""
    device = prefix.device
    qa = int(size * qa_share)
    chosen = torch.randint(len(arrays.values["train_positives"]), (qa,), device=device)
    asked, asked_lengths = arrays.store("train_questions", "train_question_offsets").padded(
        chosen, QUESTION_TOKENS, PAD
    )
    cloze_rows = arrays.with_spans[torch.randint(len(arrays.with_spans), (size - qa,), device=device)]
    cloze, cloze_lengths, cloze_answers = cloze_questions(arrays, cloze_rows, prefix)
    ids, mask = assemble_contexts(
        arrays.passages,
        torch.cat([arrays.values["train_positives"][chosen], cloze_rows]),
        torch.cat([fit(QUESTION_TOKENS, asked), fit(QUESTION_TOKENS, cloze)]),
        torch.cat([asked_lengths, cloze_lengths]),
        limit=CONTEXT_TOKENS, prefix=[BOS], suffix=[EOS], pad=PAD, width=CONTEXT_TOKENS,
    )  # fmt: skip
    return ids, mask, torch.cat([gold_answers(arrays, "train", chosen), cloze_answers])


def names_as_queries(arrays: Arrays, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A name from each passage (or its title) between words of an unrelated question: ids, lengths."""
    device = rows.device
    start, length = arrays.random_spans(rows)
    title = arrays.values["title_lengths"][rows].long()
    by_title = torch.rand(len(rows), device=device) < 0.5
    start = torch.where(by_title, 0, start)
    length = torch.where(by_title, title.clamp(max=ANSWER_TOKENS), length)
    none = torch.zeros_like(start)
    name, exists, _ = window(arrays, rows, start, length, none, none)
    other = torch.randint(len(arrays.values["train_positives"]), (len(rows),), device=device)
    words, word_lengths = arrays.store("train_questions", "train_question_offsets").padded(other, 18, PAD)
    column = torch.arange(words.shape[1], device=device)[None, :]
    before = column < uniform(0, 7, len(rows), device)[:, None]
    after = column >= (word_lengths - uniform(0, 4, len(rows), device))[:, None]
    real = column < word_lengths[:, None]
    return compact(
        torch.cat([words, name, words], dim=1),
        torch.cat([before & real, exists, after & real & ~before], dim=1),
        QUERY_TOKENS,
    )


def inverse_cloze(arrays: Arrays, rows: Tensor, remove: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A window around a name as the query, the passage mostly without it as the positive: ids and lengths of each."""
    device = rows.device
    start, length = arrays.random_spans(rows)
    sides = uniform(2, WINDOW, 2 * len(rows), device).view(2, -1)
    tokens, exists, _ = window(arrays, rows, start, length, sides[0], sides[1])
    dropped = torch.rand(tokens.shape, device=device) < 0.4 * torch.rand(len(rows), 1, device=device)
    query, query_lengths = compact(tokens, exists & ~dropped, QUERY_TOKENS)
    passage, lengths = arrays.passages.padded(rows, ENCODER_PASSAGE_TOKENS, PAD)
    column = torch.arange(passage.shape[1], device=device)[None, :]
    gone = (column >= (start - sides[0])[:, None]) & (column < (start + length + sides[1])[:, None])
    gone &= torch.rand(len(rows), 1, device=device) < remove
    passage, lengths = compact(passage, (column < lengths[:, None]) & ~gone, ENCODER_PASSAGE_TOKENS)
    return query, query_lengths, passage, lengths


def bracket(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`<s> tokens </s>`: ids and attention mask [R, L + 2]."""
    ids = F.pad(F.pad(tokens, (1, 0), value=BOS), (0, 1), value=PAD).scatter(1, (lengths + 1)[:, None], EOS)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < (lengths + 2)[:, None]).long()


def encoder_batch(arrays: Arrays, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and their positive passages, a third each of questions, inverse cloze and names: ids, mask, ids, mask."""
    device = arrays.passages.tokens.device
    third = size // 3
    chosen = torch.randint(len(arrays.values["train_positives"]), (size - 2 * third,), device=device)
    asked, asked_lengths = arrays.store("train_questions", "train_question_offsets").padded(chosen, QUERY_TOKENS, PAD)
    gold, gold_lengths = arrays.passages.padded(arrays.values["train_positives"][chosen], ENCODER_PASSAGE_TOKENS, PAD)
    rows = arrays.with_spans[torch.randint(len(arrays.with_spans), (2 * third,), device=device)]
    window_query, window_lengths, rest, rest_lengths = inverse_cloze(arrays, rows[:third], remove=0.8)
    names, name_lengths = names_as_queries(arrays, rows[third:])
    named, named_lengths = arrays.passages.padded(rows[third:], ENCODER_PASSAGE_TOKENS, PAD)
    queries = torch.cat([fit(QUERY_TOKENS, part) for part in (asked, window_query, names)])
    passages = torch.cat([fit(ENCODER_PASSAGE_TOKENS, part) for part in (gold, rest, named)])
    return (
        *bracket(queries, torch.cat([asked_lengths, window_lengths, name_lengths])),
        *bracket(passages, torch.cat([gold_lengths, rest_lengths, named_lengths])),
    )
