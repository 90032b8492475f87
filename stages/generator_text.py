"""Text to token ids and back, as every family of generators does it."""

import torch
from torch import BoolTensor, LongTensor
from transformers import PreTrainedTokenizerBase


def token_rows(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without special tokens."""
    # verbose=False: lengths are cut by the caller, the tokenizer need not warn about them.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def passage_tokens(tokenizer: PreTrainedTokenizerBase, titles: list[str], texts: list[str]) -> list[list[int]]:
    """Token ids of "title / text" without special tokens, the first part of transformers' RAG layout."""
    return token_rows(tokenizer, [f"{title} / {text}" for title, text in zip(titles, texts, strict=True)])


def padded_targets(
    answers: list[list[int]], eos: int, pad: int, max_answer_tokens: int
) -> tuple[LongTensor, BoolTensor]:
    """Targets [B, T] and their mask [B, T], True at an answer and its EOS; T <= max_answer_tokens.

    A long answer loses its end, never its EOS.
    """
    assert answers and max_answer_tokens >= 1
    rows = [ids[: max_answer_tokens - 1] + [eos] for ids in answers]
    targets = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(targets, dtype=torch.bool)
    for i, row in enumerate(rows):
        targets[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return targets, mask


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of one answer, without special tokens and surrounding blanks."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
