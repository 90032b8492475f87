"""BART's decoder, one token after another, for generating: the library's weights, keys and values kept our way.

A context's keys and values are made once and never copied: all hypotheses that stand on it ask it together. What the
hypotheses have written lies in one tensor for all layers, so that beams change places by one operation. The library's
way (transformers.models.bart.modeling_bart) gives the same logits; it copies contexts for every beam and takes several
times as long between the kernels.
"""

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from stages.evaluation.shared_contexts import Hypotheses
from stages.generation.seq2seq import Contexts
from stages.generation.vocabulary import in_rows_of_8

ROOM = 8  # tokens that a hypothesis has room for at first; doubled where it gets longer


class BartState:
    """Where R hypotheses over C contexts stand."""

    shares_contexts = True

    def __init__(self, model: nn.Module, contexts: Contexts, prefix: list[int]):
        """A hypothesis on each of the C contexts; `prefix` starts answers."""
        states, self.prefix = contexts.states, prefix
        self.decoder = model.model.decoder
        self.heads = model.config.decoder_attention_heads
        mask = contexts.attention_mask()
        self.mask = mask if mask.dim() == 4 else mask.bool()[:, None, None]
        self.of_contexts, self.projections = [], []
        for layer in self.decoder.layers:
            key, value = (
                self._split(project(states)) for project in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
            )
            self.of_contexts.append((key, value))
            parts = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
            self.projections.append(
                (torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
            )
        self.vocab = len(model.lm_head.weight)
        self.head = in_rows_of_8(model.lm_head.weight, model.final_logits_bias[0])
        self.hypotheses = Hypotheses.on(torch.arange(len(states), device=states.device), len(states))
        # [layers, 2, R, heads, room, H / heads]: keys and values of the `fed` tokens so far
        self.own = states.new_empty(
            len(self.decoder.layers), 2, len(states), self.heads, ROOM, states.shape[2] // self.heads
        )
        self.fed = 0

    def first(self) -> Tensor:
        """Feeds the decoder's prefix; log p of the answer's first token, fp32 [R, V]."""
        tokens = torch.tensor([self.prefix], device=self.mask.device).expand(len(self.mask), -1)
        return self.advance(tokens)[:, -1].float().log_softmax(-1)

    def advance(self, tokens: Tensor) -> Tensor:
        """Feeds `tokens` [R, n]; the logits [R, n, V] after each of them."""
        count = tokens.shape[1]
        end = self.fed + count
        while self.own.shape[4] < end:
            self.own = F.pad(self.own, (0, 0, 0, self.own.shape[4]))
        places = torch.arange(self.fed, end, device=tokens.device)
        # Several tokens at once: each sees what was there before and itself.
        causal = None if count == 1 else torch.arange(end, device=tokens.device) <= places[:, None]
        stack = self.decoder
        position = stack.embed_positions.weight[places + stack.embed_positions.offset]
        states = stack.layernorm_embedding(stack.embed_tokens(tokens) + position)
        for layer, own, projection, of_contexts in zip(
            stack.layers, self.own, self.projections, self.of_contexts, strict=True
        ):
            query, *written = self._split(F.linear(states, *projection), 3)
            own[:, :, :, self.fed : end] = torch.stack(written)
            mixed = F.scaled_dot_product_attention(query, *own[:, :, :, :end], attn_mask=causal)
            states = layer.self_attn_layer_norm(states + layer.self_attn.out_proj(_joined(mixed)))
            mixed = self._read(layer.encoder_attn.q_proj(states), of_contexts)
            states = layer.encoder_attn_layer_norm(states + layer.encoder_attn.out_proj(mixed))
            inner = layer.fc2(layer.activation_fn(layer.fc1(states)))
            states = layer.final_layer_norm(states + inner)
        self.fed = end
        return F.linear(states, *self.head)[..., : self.vocab]

    def reorder(self, rows: LongTensor) -> None:
        """Row r goes on from the hypothesis of row `rows[r]`, which must stand on the same context."""
        self.own = self.own.index_select(2, rows)

    def fork(self, rows: LongTensor) -> "BartState":
        """A new state of the given rows, also repeated ones; the old one stays as it is. Both have the same contexts."""
        new = object.__new__(BartState)
        vars(new).update(vars(self))
        new.own = self.own.index_select(2, rows)
        new.hypotheses = Hypotheses.on(self.hypotheses.context[rows], len(self.mask))
        return new

    def _read(self, query: Tensor, of_contexts: tuple[Tensor, Tensor]) -> Tensor:
        """What the hypotheses' queries [R, n, H] find in their contexts, [R, n, H]."""
        width, place = self.hypotheses.width, self.hypotheses.place
        asked = query.new_zeros(len(self.mask) * width, *query.shape[1:]).index_copy(0, place, query)
        asked = self._split(asked.view(len(self.mask), -1, query.shape[2]))
        found = _joined(F.scaled_dot_product_attention(asked, *of_contexts, attn_mask=self.mask))
        return found.view(-1, *query.shape[1:]).index_select(0, place)

    def _split(self, states: Tensor, parts: int | None = None) -> Tensor:
        """[R, n, H] to [R, heads, n, H / heads], or [R, n, parts x H] to as many of these."""
        if parts is None:
            return states.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return states.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


def _joined(mixed: Tensor) -> Tensor:
    """[R, heads, n, d] to [R, n, heads x d]."""
    return mixed.transpose(1, 2).flatten(2)
