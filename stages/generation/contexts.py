"""Contexts for the generator, put together on the device from passages that were tokenized once.

A context is `prefix passage question suffix` (transformers' RAG layout, "title / text // question"). Where it would be
longer than the limit the passage is cut, never the question. Read together, several passages stand in one context, one
after the other with a separator between them, and the question stands once, behind them. No text is decoded or encoded
here: the training loop gathers token ids.

Read in parallel (blocks.py), they stand so without a separator, and beside the ids is said which token is of which passage.
"""

import torch
from torch import Tensor

from stages.corpus.token_store import TokenStore
from stages.generation.blocks import Blocks


def assemble_contexts(
    passages: TokenStore,
    rows: Tensor,
    questions: Tensor,
    question_lengths: Tensor,
    *,
    limit: int,
    prefix: list[int],
    suffix: list[int],
    pad: int,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Context ids and attention mask, both [R, L].

    `rows` [R] names a passage for each context (-1: no passage, the question alone), `questions` [R, Q] holds the
    padded question ids, `question_lengths` [R] their true lengths. L is the longest context of the batch, at most
    `limit`; `width` fixes L instead (compiled graphs want one shape). A question that leaves no room for its special
    tokens is the caller's to prevent: `limit` must exceed Q by their number.
    """
    return assemble_together(
        passages, rows[:, None], questions, question_lengths, limit=limit, prefix=prefix, separator=[], suffix=suffix,
        pad=pad, width=width,
    )  # fmt: skip


def assemble_together(
    passages: TokenStore,
    rows: Tensor,
    questions: Tensor,
    question_lengths: Tensor,
    *,
    limit: int,
    prefix: list[int],
    separator: list[int],
    suffix: list[int],
    pad: int,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, L], of contexts `prefix passage separator passage ... question suffix`.

    `rows` [B, K] names the passages of each context in their order; those of -1 are left out, and where all are, the
    question stands alone. Each passage is cut as `assemble_contexts` cuts it: so that it would have room beside the
    question in a context of `limit` tokens. So L is at most K x limit, as long as the question is no shorter than the
    separator. The other arguments are as there; one passage gives its context.
    """
    return _assembled(passages, rows, questions, question_lengths, limit, prefix, separator, suffix, pad, width)[:2]


def assemble_blocks(
    passages: TokenStore,
    rows: Tensor,
    questions: Tensor,
    question_lengths: Tensor,
    *,
    limit: int,
    prefix: list[int],
    suffix: list[int],
    pad: int,
) -> tuple[Tensor, Tensor, Blocks]:
    """`assemble_together` without a separator and, beside ids and mask, the blocks that its passages are."""
    ids, mask, ends = _assembled(passages, rows, questions, question_lengths, limit, prefix, [], suffix, pad)
    return ids, mask, Blocks.of(ends, len(prefix), ids.shape[1])


def _assembled(
    passages: TokenStore, rows: Tensor, questions: Tensor, question_lengths: Tensor, limit: int, prefix: list[int],
    separator: list[int], suffix: list[int], pad: int, width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Ids and mask [B, L], and the columns [B, K] behind which the passages end."""
    device = rows.device
    assert questions.shape[1] + len(prefix) + len(suffix) <= limit, "the question alone is longer than a context"
    held, there = rows.clamp(min=0), rows >= 0
    begins = passages.offsets[held].to(device)
    room = limit - len(prefix) - len(suffix) - question_lengths[:, None]
    lengths = torch.minimum(passages.offsets[held + 1].to(device) - begins, room)
    # Each passage but the first has the separator before it.
    separated = torch.where(there & (there.cumsum(1) > 1), len(separator), 0)
    ends = len(prefix) + (separated + torch.where(there, lengths, 0)).cumsum(1)
    starts = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=len(prefix))

    passage_end = ends[:, -1:]
    question_end = passage_end + question_lengths[:, None]
    total = question_end + len(suffix)
    column = torch.arange(width or int(total.max()), device=device).expand(len(rows), -1)

    in_passages = (column >= len(prefix)) & (column < passage_end)
    in_question = (column >= passage_end) & (column < question_end)
    # The last of those that start here: one left out starts where the next one does.
    which = (torch.searchsorted(starts, column.contiguous(), right=True) - 1).clamp(min=0)
    place = column - (starts + separated).gather(1, which)
    source = torch.where(in_passages & (place >= 0), begins.gather(1, which) + place, 0)
    passage_ids = passages.tokens[source.to(passages.tokens.device)].to(device).long()
    question_ids = questions.gather(1, (column - passage_end).clamp(0, questions.shape[1] - 1))
    ids = torch.full(source.shape, pad, dtype=torch.long, device=device)
    ids = torch.where(in_passages, passage_ids, ids)
    ids = torch.where(in_question, question_ids, ids)
    for position, token in enumerate(prefix):
        ids[:, position] = token
    for position, token in enumerate(separator, -len(separator)):
        ids = torch.where(in_passages & (place == position), token, ids)
    for position, token in enumerate(suffix):
        ids = torch.where(column == question_end + position, token, ids)
    return ids, (column < total).long(), ends
