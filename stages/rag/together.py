"""Reading together: an answer's likelihood under all of its question's passages at once, and beside it under each alone.

Encoder-decoder: the passages are encoded apart, each with the question, and the decoder attends to all of them end to end
(Fusion-in-Decoder, Izacard & Grave 2021). The likelihoods under each passage alone, which train the retriever, come from
the same encodings. Read `weighted`, log p(z | x) is added to the logits of the attention to z's tokens: a passage is attended
to p(z | x) times as much, one that is sure as if it were alone, and the likelihood itself trains the retriever (MARGE, Lewis
et al. 2020, arXiv:2006.15020, which adds the scores; the softmax of attention does not see the difference).

Decoder-only: one prompt holds all passages in the order of the prior and the question once, behind them
(generation/causal.py), which in `parallel` and `weighted` do not see each other (generation/blocks.py); under each passage
alone it reads prompts of their own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.generation.causal import Prompts
from stages.generation.contexts import assemble_blocks, assemble_together
from stages.generation.seq2seq import Contexts
from stages.generation.vocabulary import padded_log_probs
from stages.rag.batches import RagBatch

APART = ("parallel", "weighted")  # ways to read in which no passage sees another, by a decoder-only generator either


class Together(NamedTuple):
    joint: Tensor  # [B, T] log p(y_t | y_<t, x, z_1..z_K), zero or anything behind the answer
    alone: Tensor | None  # [B, K, T] log p(y_t | y_<t, x, z), without gradient; None: not asked for
    context_tokens: Tensor  # real tokens read; those read without a gradient alone count a third, as their pass does


def read_together(
    rag: nn.Module, batch: RagBatch, rows: Tensor, reading: str, log_prior: Tensor | None = None,
    label_smoothing: float = 0.0, alone: bool = False,
) -> Together:  # fmt: skip
    """The batch's answers under all of their passages `rows` [B, K] by a Rag; those that are missing (-1) are left out.

    `reading` is together, parallel or weighted, which alone looks at `log_prior` [B, K] and needs it. A question for which
    nothing was found is read alone. `alone`: under each passage by itself too, without label smoothing.
    """
    if not rag.generator_model.config.is_encoder_decoder:
        return _read_in_one_prompt(rag, batch, rows, reading, log_prior, label_smoothing, alone)
    weights = _weights(reading, log_prior)
    input_ids, attention_mask = rag.contexts(batch, rows)
    read = attention_mask * read_at_all(rows).flatten()[:, None]
    if rag.packed:
        of_contexts = None if weights is None else weights.flatten()
        packed = rag.packed.pack(input_ids, read, batch.targets, batch.target_mask, rows.shape[1], alone, of_contexts)
        scored = rag.packed_log_probs(packed, label_smoothing)
        if not alone:
            return Together(scored, None, read.sum())
        return Together(scored[..., 0], scored[..., 1:].detach().transpose(1, 2), read.sum())
    contexts = rag.generator.encode(input_ids, attention_mask)
    joined = Contexts(contexts.states, read).joined(rows.shape[1], weights)
    joint = padded_log_probs(rag.generator, joined, batch.targets, label_smoothing)
    if not alone:
        return Together(joint, None, read.sum())
    # After the joint pass: autocast keeps the copies of weights that the first one casts, with gradient or without.
    with torch.no_grad():
        each = padded_log_probs(rag.generator, contexts, batch.targets.repeat_interleave(rows.shape[1], 0))
    return Together(joint, each.unflatten(0, rows.shape), read.sum())


def joint_contexts(
    rag: nn.Module, batch: RagBatch, rows: Tensor, contexts: Any, reading: str, log_prior: Tensor | None = None
) -> Any:
    """What B questions' answers read at once: encoded contexts [B] of all of their passages `rows` [B, K].

    `contexts` are those of each passage alone [B * K], as the generator encoded them; `reading` and `log_prior` as in
    `read_together`.
    """
    if not rag.generator_model.config.is_encoder_decoder:
        return prompts_together(rag, batch, rows, reading, log_prior)
    read = contexts.mask * read_at_all(rows).flatten()[:, None]
    return Contexts(contexts.states, read).joined(rows.shape[1], _weights(reading, log_prior))


def prompts_together(
    rag: nn.Module, batch: RagBatch, rows: Tensor, reading: str, log_prior: Tensor | None = None
) -> Prompts:
    """Every question with all of its passages `rows` [B, K] in one prompt: B of them; as `read_together` says."""
    generator = rag.generator
    parts = rag.passages, rows, batch.generator_questions, batch.generator_question_lengths
    frame = {
        "limit": rag.lengths.context_tokens, "prefix": generator.context_prefix, "suffix": generator.context_suffix,
        "pad": generator.pad_token_id,
    }  # fmt: skip
    if reading in APART:
        ids, mask, blocks = assemble_blocks(*parts, **frame)
        weights = _weights(reading, log_prior)
        return Prompts(ids, mask, blocks if weights is None else blocks.weighed(weights))
    return Prompts(*assemble_together(*parts, separator=generator.passage_separator, **frame))


def _read_in_one_prompt(
    rag: nn.Module, batch: RagBatch, rows: Tensor, reading: str, log_prior: Tensor | None, label_smoothing: float,
    alone: bool,
) -> Together:  # fmt: skip
    prompts = prompts_together(rag, batch, rows, reading, log_prior)
    if rag.packed:
        packed = rag.packed.pack(prompts.ids, prompts.mask, batch.targets, batch.target_mask, prompts.blocks)
        joint = rag.packed_log_probs(packed, label_smoothing)
    else:
        joint = padded_log_probs(rag.generator, prompts, batch.targets, label_smoothing)
    if not alone:
        return Together(joint, None, prompts.mask.sum())
    with torch.no_grad():
        ids, mask = rag.contexts(batch, rows)
        each = rag.token_log_probs(batch, ids, mask)
    return Together(joint, each, prompts.mask.sum() + mask.sum() / 3)


def _weights(reading: str, log_prior: Tensor | None) -> Tensor | None:
    """What each passage weighs [B, K], where the prior is what it is attended to by."""
    assert reading != "weighted" or log_prior is not None
    return log_prior if reading == "weighted" else None


def read_at_all(rows: Tensor) -> Tensor:
    """Which of the contexts [B, K] are read together: those of passages found, or the first, which is the question alone."""
    found = rows >= 0
    first = torch.arange(rows.shape[1], device=rows.device) == 0
    return found | (first & ~found.any(1, keepdim=True))
