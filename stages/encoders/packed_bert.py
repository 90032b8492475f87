"""DPR's BERT without padding (packing.py): the library's weights, our way from layer to layer.

Only a passage's first position becomes its vector, so the last layer computes nothing else.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.packed.packing import Packing, attention


class Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class LayerWeights(NamedTuple):
    """What a BertLayer computes with; query, key and value are one matrix product."""

    query_key_value: Linear  # [3 H, H]
    mix: Linear
    norm: Linear
    widen: Linear
    narrow: Linear
    last_norm: Linear


def layer_weights(layer: nn.Module) -> LayerWeights:
    """The weights of a BertLayer, with gradient to it."""
    of_attention = layer.attention.self
    parts = (of_attention.query, of_attention.key, of_attention.value)
    joined = Linear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
    others = (
        layer.attention.output.dense, layer.attention.output.LayerNorm, layer.intermediate.dense, layer.output.dense,
        layer.output.LayerNorm,
    )  # fmt: skip
    return LayerWeights(joined, *(Linear(part.weight, part.bias) for part in others))


@torch.no_grad()
def folded(
    embedded: Linear, layers: list[LayerWeights], dtype: torch.dtype
) -> tuple[Linear, list[LayerWeights]]:  # fmt: skip
    """Copies in `dtype` of the embeddings' norm and the layers', which compute the same with fewer passes over memory.

    A product that is added to the residual stream has no bias left: the norm before adds it to the stream, and the
    product that reads the same stream has it taken out of its own bias. The sum is then part of the matrix product.
    """
    norms, without_bias = [embedded], []
    for layer in layers:
        norms[-1] = _shifted(norms[-1], layer.mix.bias)
        joined = _shifted(layer.query_key_value, -layer.query_key_value.weight @ layer.mix.bias)
        widen = _shifted(layer.widen, -layer.widen.weight @ layer.narrow.bias)
        norms += [_shifted(layer.norm, layer.narrow.bias), layer.last_norm]
        without_bias.append((joined, Linear(layer.mix.weight, None), widen, Linear(layer.narrow.weight, None)))
    norms = [_cast(norm, dtype) for norm in norms]
    return norms[0], [
        LayerWeights(_cast(joined, dtype), _cast(mix, dtype), norm, _cast(widen, dtype), _cast(narrow, dtype), last)
        for (joined, mix, widen, narrow), norm, last in zip(without_bias, norms[1::2], norms[2::2], strict=True)
    ]


def _shifted(weights: Linear, by: Tensor) -> Linear:
    return Linear(weights.weight, weights.bias + by)


def _cast(weights: Linear, dtype: torch.dtype) -> Linear:
    return Linear(*(part if part is None else part.detach().to(dtype) for part in weights))


class PackedBert:
    """The vectors of a DPREncoder, as `pooler_output` of its padded forward.

    `dtype`: for inference in that type, by copies of the present weights; otherwise by the model's own, with gradient,
    in whatever autocast makes of them. Throughout in bf16 half as much goes through memory as under autocast, which
    keeps residual stream and norms in fp32.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype | None = None):
        self.encoder, self.body = encoder, PackedBody(encoder.bert_model, dtype)

    def vectors(self, ids: Tensor, tokens: Packing) -> Tensor:
        """[R, dimension], in fp32, of packed ids [tokens] with special tokens."""
        pooled = self.body.first_states(ids, tokens)
        return self.encoder.encode_proj(pooled) if self.encoder.projection_dim > 0 else pooled


class PackedBody:
    """A BertModel's last states of every row's first token; `dtype` as PackedBert's."""

    def __init__(self, bert: nn.Module, dtype: torch.dtype | None = None):
        self.bert, self.dtype = bert, dtype
        if dtype:
            weights = [layer_weights(layer) for layer in bert.encoder.layer]
            embeddings = bert.embeddings
            self.embedded, self.copies = folded(
                Linear(embeddings.LayerNorm.weight, embeddings.LayerNorm.bias), weights, dtype
            )
            self.tables = [
                table.weight.detach().to(dtype)
                for table in (embeddings.word_embeddings, embeddings.position_embeddings)
            ]
            self.types = embeddings.token_type_embeddings.weight.detach().to(dtype)
            self.tables[1] = self.tables[1] + self.types[0]

    def first_states(self, ids: Tensor, tokens: Packing, types: Tensor | None = None) -> Tensor:
        """[R, H], in fp32, of packed ids [tokens] with special tokens and their token types [tokens] (None: all 0)."""
        bert = self.bert
        if self.dtype:
            of_words, of_positions = self.tables
            states = F.embedding(ids, of_words) + F.embedding(tokens.positions, of_positions)
            if types is not None:
                states = states + F.embedding(types, self.types - self.types[0])
            states = F.layer_norm(states, states.shape[1:], *self.embedded, bert.embeddings.LayerNorm.eps)
            weights = self.copies
        else:
            of_types = bert.embeddings.token_type_embeddings
            states = (
                bert.embeddings.word_embeddings(ids)
                + (of_types.weight[0] if types is None else of_types(types))
                + F.embedding(tokens.positions, bert.embeddings.position_embeddings.weight)
            )
            states = bert.embeddings.dropout(bert.embeddings.LayerNorm(states))
            weights = [layer_weights(layer) for layer in bert.encoder.layer]
        *layers, last = zip(bert.encoder.layer, weights, strict=True)
        for layer, its_weights in layers:
            states = bert_layer(layer, its_weights, states, tokens)
        return bert_layer(*last, states, tokens, first_alone=True).float()


def bert_layer(
    layer: nn.Module, weights: LayerWeights, states: Tensor, tokens: Packing, first_alone: bool = False
) -> Tensor:
    """One BertLayer over packed `states` [tokens, H]; `first_alone`: of every row's first position, [R, H]."""
    heads, hidden = layer.attention.self.num_attention_heads, states.shape[1]
    dropout = layer.attention.self.dropout.p if layer.training else 0.0
    if first_alone:
        (matrix, bias), all_states = weights.query_key_value, states
        states = all_states[tokens.offsets[:-1].long()]
        query = F.linear(states, matrix[:hidden], bias[:hidden]).unflatten(1, (heads, -1))
        key, value = F.linear(all_states, matrix[hidden:], bias[hidden:]).unflatten(1, (2, heads, -1)).unbind(1)
        row = torch.arange(tokens.rows + 1, device=states.device)
        asking = Packing(row[:-1], torch.zeros_like(row[:-1]), row.int(), tokens.rows, 1)
    else:
        asking = tokens
        query, key, value = F.linear(states, *weights.query_key_value).unflatten(1, (3, heads, -1)).unbind(1)
    mixed = attention(query, key, value, asking, tokens, dropout).flatten(1)
    states = added(states, mixed, weights.mix, layer.attention.output.dropout)
    states = F.layer_norm(states, (hidden,), *weights.norm, layer.attention.output.LayerNorm.eps)
    states = added(states, widened(layer.intermediate, states, weights.widen), weights.narrow, layer.output.dropout)
    return F.layer_norm(states, (hidden,), *weights.last_norm, layer.output.LayerNorm.eps)


def added(residual: Tensor, states: Tensor, weights: Linear, dropout: nn.Module) -> Tensor:
    """The residual stream and a product; without a bias (see `folded`) written over the stream, which nobody reads again."""
    if weights.bias is None:
        return residual.addmm_(states, weights.weight.t())
    return residual + dropout(F.linear(states, *weights))


def widened(module: nn.Module, states: Tensor, weights: Linear) -> Tensor:
    """The inner layer with its activation; without gradient in bf16 on a GPU one kernel does both.

    That kernel's GELU is the tanh approximation, which is nearer to the exact one than bf16 can tell.
    """
    fused = states.is_cuda and states.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    if fused and type(module.intermediate_act_fn).__name__ == "GELUActivation":
        return torch.ops.aten._addmm_activation(weights.bias, states, weights.weight.t(), use_gelu=True)
    return module.intermediate_act_fn(F.linear(states, *weights))
