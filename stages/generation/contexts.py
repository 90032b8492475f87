"""Contexts for the generator, put together on the device from passages that were tokenized once.

A context is `prefix passage question suffix` (transformers' RAG layout, "title / text // question"). Where it would be
longer than the limit the passage is cut, never the question. No text is decoded or encoded here: the training loop
gathers token ids.
"""

import torch
from torch import Tensor

from stages.corpus.token_store import TokenStore


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
    device = rows.device
    assert questions.shape[1] + len(prefix) + len(suffix) <= limit, "the question alone is longer than a context"
    held = rows.clamp(min=0)
    starts = passages.offsets[held].to(device)
    room = limit - len(prefix) - len(suffix) - question_lengths
    lengths = torch.minimum(passages.offsets[held + 1].to(device) - starts, room)
    lengths = torch.where(rows >= 0, lengths, 0)

    passage_end = len(prefix) + lengths[:, None]
    question_end = passage_end + question_lengths[:, None]
    total = question_end + len(suffix)
    column = torch.arange(width or int(total.max()), device=device)[None, :]

    in_passage = (column >= len(prefix)) & (column < passage_end)
    in_question = (column >= passage_end) & (column < question_end)
    source = torch.where(in_passage, starts[:, None] + column - len(prefix), 0)
    passage_ids = passages.tokens[source.to(passages.tokens.device)].to(device).long()
    question_ids = questions.gather(1, (column - passage_end).clamp(0, questions.shape[1] - 1))
    ids = torch.full(source.shape, pad, dtype=torch.long, device=device)
    ids = torch.where(in_passage, passage_ids, ids)
    ids = torch.where(in_question, question_ids, ids)
    for position, token in enumerate(prefix):
        ids[:, position] = token
    for position, token in enumerate(suffix):
        ids = torch.where(column == question_end + position, token, ids)
    return ids, (column < total).long()
