"""DPR's BERT without padding (packing.py), for encoding passages: library modules, our way from layer to layer.

Only a passage's first position becomes its vector, so the last layer computes nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.packing import Packing, attention


def bert_layer(layer: nn.Module, asking_states: Tensor, states: Tensor, asking: Packing, tokens: Packing) -> Tensor:
    """One BertLayer: packed `asking_states` [A, H], each attending to the packed `states` [tokens, H] of its row."""
    attend, mixer, output = layer.attention.self, layer.attention.output, layer.output
    query, key, value = (
        project(source).unflatten(-1, (attend.num_attention_heads, -1))
        for project, source in ((attend.query, asking_states), (attend.key, states), (attend.value, states))
    )
    mixed = attention(query, key, value, asking, tokens, attend.dropout.p if layer.training else 0.0)
    states = mixer.LayerNorm(mixer.dropout(mixer.dense(mixed.flatten(1))) + asking_states)
    inner = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(states))
    return output.LayerNorm(output.dropout(output.dense(inner)) + states)


class PackedBert:
    """The vectors of a DPREncoder, as `pooler_output` of its padded forward."""

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self.layer = bert_layer

    def compile(self) -> None:
        """Fuses what lies between matrix products; one graph serves all layers and any number of tokens."""
        self.layer = torch.compile(bert_layer, dynamic=True)

    def vectors(self, ids: Tensor, tokens: Packing) -> Tensor:
        """[R, dimension] of packed ids [tokens] with special tokens."""
        embeddings = self.encoder.bert_model.embeddings
        states = (
            embeddings.word_embeddings(ids)
            + embeddings.token_type_embeddings.weight[0]
            + F.embedding(tokens.positions, embeddings.position_embeddings.weight)
        )
        states = embeddings.dropout(embeddings.LayerNorm(states))
        *layers, last = self.encoder.bert_model.encoder.layer
        for layer in layers:
            states = self.layer(layer, states, states, tokens, tokens)
        row = torch.arange(tokens.rows + 1, device=ids.device)
        first = Packing(row[:-1], torch.zeros_like(row[:-1]), row.int(), tokens.rows, 1)
        pooled = bert_layer(last, states[tokens.offsets[:-1].long()], states, first, tokens)
        return self.encoder.encode_proj(pooled) if self.encoder.projection_dim > 0 else pooled
