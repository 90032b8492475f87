"""Sequence-to-sequence generators: BART and the T5 families. An encoder reads the context, a decoder writes the answer.

The interface is described in generator.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import BoolTensor, LongTensor, Tensor
from transformers.modeling_outputs import BaseModelOutput

from stages.generation.packed_bart import PackedBart
from stages.generation.tokenizer import decoded, padded_targets, token_rows
from stages.generation.vocabulary import logits_behind
from stages.packed.packing import Packing

FAMILIES = ("bart", "t5", "mt5", "longt5")  # umt5: its cache and its forward disagree in transformers 5.17


@dataclass
class Contexts:
    """R encoded contexts: `states` [R, L, H] and `mask` [R, L], 1 at real tokens.

    `bias` [R, L], fp32, is added to the logits of a decoder's attention to each token.
    """

    states: Tensor
    mask: Tensor
    bias: Tensor | None = None

    def repeat(self, times: int) -> "Contexts":
        """Every row `times` times, copies side by side."""
        return self.select(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(times))

    def select(self, rows: LongTensor) -> "Contexts":
        """The given rows in the given order; a row may come more than once."""
        return Contexts(self.states[rows], self.mask[rows], None if self.bias is None else self.bias[rows])

    def attention_mask(self) -> Tensor:
        """The mask as the library's decoders take it: [R, L], or added to the logits, [R, 1, 1, L] in the states' dtype."""
        if self.bias is None:
            return self.mask
        least = torch.finfo(self.states.dtype).min
        return self.bias.masked_fill(self.mask == 0, least).to(self.states.dtype)[:, None, None]

    def joined(self, times: int, log_prior: Tensor | None = None) -> "Contexts":
        """R / times rows, each the real tokens of `times` neighbouring rows end to end: what a decoder reads together.

        Fusion-in-Decoder (Izacard & Grave 2021); rows whose mask is all 0 are left out. `log_prior` [R / times, times] is the
        bias of each row's tokens.
        """
        mask = self.mask.unflatten(0, (-1, times)).flatten(1)
        states = self.states.unflatten(0, (-1, times)).flatten(1, 2)
        order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
        bias = None if log_prior is None else log_prior.repeat_interleave(self.mask.shape[1], 1).gather(1, order)
        return Contexts(
            states.gather(1, order[..., None].expand(-1, -1, states.shape[-1])), mask.gather(1, order), bias
        )


@dataclass
class Seq2Seq:
    """A transformers sequence-to-sequence model (`.model`, where all weights are) and its tokenizer."""

    model: Any
    tokenizer: Any
    # What the decoder starts from, the same in training, scoring and generating.
    decoder_prefix: list[int]
    eos_token_id: int
    pad_token_id: int
    # Special tokens before and after the tokens of a context.
    context_prefix: list[int]
    context_suffix: list[int]
    # Positions of the longest context or answer that the model can take; None is no limit.
    max_positions: int | None
    # Whether weights may be read past the modules' own forward passes, which FSDP does not allow.
    past_modules: bool = True

    def question_tokens(self, questions: list[str]) -> list[list[int]]:
        """Token ids of " // question" without special tokens: they follow the passage's."""
        return token_rows(self.tokenizer, [f" // {question}" for question in questions])

    def answer_tokens(self, answers: list[str], max_answer_tokens: int) -> tuple[LongTensor, BoolTensor]:
        """Targets and their mask (see `padded_targets`)."""
        rows = token_rows(self.tokenizer, answers)
        return padded_targets(rows, self.eos_token_id, self.pad_token_id, max_answer_tokens)

    def decode(self, token_ids: list[int]) -> str:
        """The text of one answer."""
        return decoded(self.tokenizer, token_ids)

    def positions_needed(self, context_tokens: int, answer_tokens: int, together: int = 1) -> int:
        """Positions that the model must have for contexts and answers of these lengths, however many are read together."""
        return max(context_tokens, answer_tokens + len(self.decoder_prefix))

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Contexts:
        """Encode contexts [R, L]; `attention_mask` [R, L] is 0 at padding. BART without gradient: no padding is computed."""
        if self.past_modules and not torch.is_grad_enabled() and PackedBart.fits(self.model.config):
            tokens = Packing.of(attention_mask)
            packed = PackedBart(self.model, self.decoder_prefix[-1]).contexts(tokens.pack(input_ids), tokens)
            return Contexts(tokens.unpack(packed), attention_mask)
        encoder = self.model.get_encoder()
        states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return Contexts(states, attention_mask)

    def logits(self, contexts: Contexts, targets: Tensor) -> Tensor:
        """Teacher-forced logits [R, T, V] in the model's dtype; position t predicts `targets[:, t]`.

        The decoder reads prefix + targets[:, :-1] without a mask: it is causal, so padding on the right of a
        target changes no real position. Gradients flow to the weights and to `contexts.states`.
        """
        logits = forward(self.model, contexts, self._fed(targets), use_cache=False).logits
        return logits[:, len(self.decoder_prefix) - 1 :]

    def states(self, contexts: Contexts, targets: Tensor) -> Tensor:
        """The decoder's states [R, T, H] at the positions that predict `targets`; `logits_behind` makes logits of them."""
        decoder = self.model.get_decoder()
        states = decoder(
            input_ids=self._fed(targets), encoder_hidden_states=contexts.states, encoder_attention_mask=contexts.attention_mask(),
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        return states[:, len(self.decoder_prefix) - 1 :]

    def logits_behind(self, states: Tensor) -> Tensor:
        """Logits [N, V] of states [N, H]."""
        unused = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        return logits_behind(
            self.model,
            states,
            encoder_outputs=BaseModelOutput(last_hidden_state=states[None]),
            decoder_input_ids=unused,
        )

    def _fed(self, targets: Tensor) -> Tensor:
        return torch.cat([self.prefix(len(targets), targets.device), targets[:, :-1]], dim=1)

    def prefix(self, rows: int, device: torch.device) -> Tensor:
        """What the decoder starts from, for `rows` rows: [rows, P]."""
        return torch.tensor([self.decoder_prefix], device=device).expand(rows, -1)


def forward(model: Any, contexts: Contexts, tokens: Tensor, **cache):
    """The whole model, not its decoder and its head: scalings and biases of a family stay the library's."""
    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=contexts.states),
        attention_mask=contexts.attention_mask(),
        decoder_input_ids=tokens,
        **cache,
    )


def seq2seq_from(model, tokenizer) -> Seq2Seq:
    """Wrap a loaded model of one of FAMILIES. ValueError where the tokenizer is another model's."""
    config = model.config
    assert config.model_type in FAMILIES
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected, found = getattr(config, name, None), getattr(tokenizer, name)
        needed = name != "bos_token_id" or config.model_type == "bart"
        if needed and (expected is None or expected != found):
            raise ValueError(f"models.generator: {name} is {expected} in the model, {found} in its tokenizer")
    eos, pad = config.eos_token_id, config.pad_token_id
    if config.model_type == "bart":
        # transformers' RAG trains BART from <s> and generates from </s>: here it is <s> everywhere.
        bos = config.bos_token_id
        return Seq2Seq(model, tokenizer, [bos], eos, pad, [bos], [eos], config.max_position_embeddings)
    start = getattr(config, "decoder_start_token_id", None)
    return Seq2Seq(model, tokenizer, [pad if start is None else start], eos, pad, [], [eos], None)
