"""Llama and its like, one token after another, for generating: the library's weights, keys and values kept our way.

Prompts are read without padding. Their keys and values are made once and never copied: all hypotheses that stand on a
prompt ask it together. What the hypotheses have written lies in one tensor for all layers, so that beams change places
by one operation. The library's way (transformers.models.llama.modeling_llama) gives the same logits; it pads prompts,
copies them for every beam and takes several times as long between the kernels.

Passages read in parallel (generation/blocks.py) make one prompt too: what is written sees all of it, at the positions behind,
weighted or not.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from stages.evaluation.shared_contexts import SharedContexts, attend_before, merged
from stages.generation.blocks import PackedBlocks, causal_attention
from stages.generation.causal import Causal, Prompts
from stages.packed.packing import Packing, biased

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROOM = 8  # tokens that a hypothesis has room for at first; doubled where it gets longer


class LlamaState:
    """Where R hypotheses over C prompts stand."""

    shares_contexts = True

    def __init__(self, layers: "Layers", contexts: SharedContexts, own: Tensor, states: Tensor, starts: Tensor):
        """`own` [layers, 2, R, heads, room, d]: keys and values of the `fed` tokens so far; `states` [R, H] of the prompts'
        last tokens; `starts` [R] the positions behind these."""
        self.layers, self.contexts, self.own, self.states, self.starts = layers, contexts, own, states, starts
        self.fed = 0

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether these layers are what is written here: one of FAMILIES, all of whose layers see everything before them,
        with plain weights and positions that do not depend on the text's length."""
        config = model.config
        return (
            config.model_type in FAMILIES
            and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
            and (config.model_type != "mistral" or config.sliding_window is None)
            and model.model.rotary_emb.rope_type not in ("dynamic", "longrope")
            and all(type(layer.self_attn.q_proj) is nn.Linear for layer in model.model.layers)
        )

    @classmethod
    def of(cls, generator: Causal, prompts: Prompts) -> "LlamaState":
        """Reads the prompts, once; a hypothesis stands on each."""
        layers, packing = Layers(generator.model), Packing.of(prompts.mask)
        asking = PackedBlocks.of(prompts.blocks, prompts.mask) if prompts.blocks else packing
        bias = asking.bias if prompts.blocks else None
        read = []

        def mix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            # Contiguous: as parts of one projection they would keep the queries in memory.
            pair = key.contiguous(), value.contiguous()
            read.append(pair if bias is None else biased(*pair, bias / scale))
            return causal_attention(query, *pair, asking, scale=scale)

        states = layers.states(packing.pack(prompts.ids), asking.positions, mix)
        last = packing.offsets[1:].long() - 1
        key = read[0][0]
        own = key.new_empty(len(read), 2, packing.rows, key.shape[1], ROOM, layers.head_dim)
        return cls(
            layers, SharedContexts.of(read, packing, bias is not None), own, states[last], asking.positions[last] + 1
        )

    def first(self) -> Tensor:
        """log p of the answer's first token, fp32 [R, V]."""
        return self.layers.head(self.states).log_softmax(-1, dtype=torch.float)

    def advance(self, tokens: Tensor) -> Tensor:
        """Feeds `tokens` [R, n]; the logits [R, n, V] after each of them."""
        rows, count = tokens.shape
        end = self.fed + count
        while self.own.shape[4] < end:
            self.own = F.pad(self.own, (0, 0, 0, self.own.shape[4]))
        places = torch.arange(self.fed, end, device=tokens.device)
        positions = self.starts[:, None] + places
        layers = iter(range(len(self.own)))

        def mix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            layer = next(layers)
            own = self.own[layer]
            for place, made in enumerate((key, value)):
                own[place, :, :, self.fed : end] = made.unflatten(0, (rows, count)).transpose(1, 2)
            query = query.unflatten(0, (rows, count))
            written = attend_before(query, *own[:, :, :, :end], scale)
            return merged(written, self.contexts.read(query, layer, scale)).flatten(0, 1)

        states = self.layers.states(tokens.flatten(), positions.flatten(), mix)
        self.fed = end
        return self.layers.head(states).unflatten(0, (rows, count))

    def reorder(self, rows: LongTensor) -> None:
        """Row r goes on from the hypothesis of row `rows[r]`, which must stand on the same prompt."""
        self.own = self.own.index_select(2, rows)

    def fork(self, rows: LongTensor) -> "LlamaState":
        """A new state of the given rows, also repeated ones; the old one stays as it is. Both have the same prompts."""
        kept = self.own.index_select(2, rows), self.states[rows], self.starts[rows]
        new = LlamaState(self.layers, self.contexts.under(rows), *kept)
        new.fed = self.fed
        return new


class Layers:
    """The library's layers with as few kernels between the matrix products as torch has: what they compute is theirs."""

    def __init__(self, model: nn.Module):
        self.model, self.head = model.model, model.lm_head
        self.head_dim = model.model.layers[0].self_attn.head_dim
        # One product in place of three. Made for every batch anew: a copy of a few weights, and no older one can be met.
        self.projections = []
        for layer in self.model.layers:
            three = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
            bias = None if three[0].bias is None else torch.cat([part.bias for part in three])
            self.projections.append((torch.cat([part.weight for part in three]), bias))

    def states(self, ids: Tensor, positions: Tensor, mix: Callable[..., Tensor]) -> Tensor:
        """The states [tokens, H] that the head reads; `mix` is each layer's attention, [tokens, heads, d] its arguments."""
        states = self.model.embed_tokens(ids)
        cos, sin = (part[0, :, None] for part in self.model.rotary_emb(states, positions[None]))
        lower, upper = sin.chunk(2, dim=-1)
        sin = torch.cat([-lower, upper], dim=-1)  # the sign of the halves that change places
        for layer, projection in zip(self.model.layers, self.projections, strict=True):
            module = layer.self_attn
            projected = F.linear(_norm(layer.input_layernorm, states), *projection).unflatten(-1, (-1, module.head_dim))
            values = module.v_proj.out_features // module.head_dim
            turned, value = projected[:, :-values], projected[:, -values:]
            if hasattr(module, "q_norm"):
                query, key = turned[:, :-values], turned[:, -values:]
                turned = torch.cat([_norm(module.q_norm, query), _norm(module.k_norm, key)], dim=1)
            lower, upper = turned.chunk(2, dim=-1)
            turned = torch.addcmul(turned * cos, torch.cat([upper, lower], dim=-1), sin)
            mixed = mix(turned[:, :-values], turned[:, -values:], value, module.scaling)
            # What is merged of two softmaxes is fp32.
            states = states + module.o_proj(mixed.flatten(1).to(states.dtype))
            states = states + layer.mlp(_norm(layer.post_attention_layernorm, states))
        return _norm(self.model.norm, states)


def _norm(module: nn.Module, states: Tensor) -> Tensor:
    """The library's RMSNorm as one kernel."""
    return F.rms_norm(states, states.shape[-1:], module.weight, module.variance_epsilon)
