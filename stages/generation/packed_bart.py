"""BART without padding: contexts and answers run through its layers packed (packing.py).

The modules and weights are the library's (transformers.models.bart.modeling_bart); only the way from layer to layer is
written here, because theirs goes over padded rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.generation.vocabulary import token_log_probs
from stages.packed.cuda_graphs import CudaGraphs
from stages.packed.packing import PackedAnswers, Packing, attention


def _attend(
    module: nn.Module, asking_states: Tensor, asked_states: Tensor, asking, asked, causal=False, key_bias=None
) -> Tensor:  # fmt: skip
    query, key, value = (
        project(states).unflatten(-1, (module.num_heads, -1))
        for project, states in (
            (module.q_proj, asking_states),
            (module.k_proj, asked_states),
            (module.v_proj, asked_states),
        )
    )
    dropout = module.dropout if module.training else 0.0
    mixed = attention(query, key, value, asking, asked, dropout, causal, key_bias=key_bias)
    return module.out_proj(mixed.flatten(1))


def _feed_forward(layer: nn.Module, states: Tensor) -> Tensor:
    inner = layer.activation_fn(layer.fc1(states))
    return layer.fc2(F.dropout(inner, layer.activation_dropout, layer.training))


def encoder_layer(layer: nn.Module, states: Tensor, tokens: Packing) -> Tensor:
    """One layer of BartEncoder over packed states [tokens, H]."""
    mixed = _attend(layer.self_attn, states, states, tokens, tokens)
    states = layer.self_attn_layer_norm(states + F.dropout(mixed, layer.dropout, layer.training))
    inner = _feed_forward(layer, states)
    return layer.final_layer_norm(states + F.dropout(inner, layer.dropout, layer.training))


def decoder_layer(
    layer: nn.Module,
    states: Tensor,
    contexts: Tensor,
    answers: Packing,
    tokens: Packing,
    key_bias: Tensor | None = None,
) -> Tensor:
    """One layer of BartDecoder over packed answers [answer tokens, H], each row reading the context of its number.

    `key_bias` [context tokens] is added to the logits of the attention to them.
    """
    mixed = _attend(layer.self_attn, states, states, answers, answers, causal=True)
    states = layer.self_attn_layer_norm(states + F.dropout(mixed, layer.dropout, layer.training))
    mixed = _attend(layer.encoder_attn, states, contexts, answers, tokens, key_bias=key_bias)
    states = layer.encoder_attn_layer_norm(states + F.dropout(mixed, layer.dropout, layer.training))
    inner = _feed_forward(layer, states)
    return layer.final_layer_norm(states + F.dropout(inner, layer.dropout, layer.training))


class PackedBart:
    """The likelihood of answers under contexts by a BartForConditionalGeneration, without padding anywhere.

    `prefix` is the one token that its decoder starts from.
    """

    def __init__(self, model: nn.Module, prefix: int):
        self.model, self.prefix = model, prefix
        self.encoder_layer, self.decoder_layer = encoder_layer, decoder_layer
        self.graphs: CudaGraphs | None = None

    def compile(self) -> None:
        """Fuses what lies between matrix products. One graph serves all layers of a kind and any number of tokens."""
        self.encoder_layer = torch.compile(encoder_layer, dynamic=True)
        self.decoder_layer = torch.compile(decoder_layer, dynamic=True)

    @staticmethod
    def fits(config) -> bool:
        """Whether a model of this configuration can be packed: BART without LayerDrop."""
        return config.model_type == "bart" and not config.encoder_layerdrop and not config.decoder_layerdrop

    def token_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, target_mask: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """log p(target) [R, T] in fp32 under contexts [R, L], zero where `target_mask` [R, T] is false.

        Only real answer positions reach the decoder and the vocabulary.
        """
        return self.score(self.pack(input_ids, attention_mask, targets, target_mask), label_smoothing)

    def pack(
        self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, target_mask: Tensor, together: int = 1,
        alone: bool = False, log_prior: Tensor | None = None,
    ) -> PackedAnswers:  # fmt: skip
        """What `score` reads. The host waits for the device here, and nowhere else.

        Read `together`, each answer has that many contexts side by side, of which those without a real token are left out;
        it attends to them as `log_prior` [R] weighs them.
        """
        tokens, answers = Packing.of(attention_mask), Packing.of(target_mask)
        read = F.pad(targets[:, :-1], (1, 0), value=self.prefix)
        return PackedAnswers(
            tokens.pack(input_ids), tokens, answers.pack(read), answers.pack(targets), answers, together, alone,
            log_prior,
        )  # fmt: skip

    def score(self, packed: PackedAnswers, label_smoothing: float = 0.0) -> Tensor:
        """`token_log_probs` of what was packed before; [R, T, 1 + K] where `log_probs` gives columns."""
        run = self.graphs or self.log_probs
        return packed.answers.unpack(run(packed, label_smoothing))

    def log_probs(self, packed: PackedAnswers, label_smoothing: float) -> Tensor:
        """log p [answers] of each answer token, in fp32.

        Of K contexts that are read together the decoder attends to all real tokens (Izacard & Grave 2021), with a `log_prior` to
        each by its context's probability times as much (rag/together.py). With `packed.alone`
        log p under each of them by itself, without label smoothing and without gradient, stands beside it: [answers, 1 + K].
        """
        contexts = self.contexts(packed.ids, packed.tokens)
        read, targets, answers = packed.read, packed.targets, packed.answers
        asked = packed.tokens.joined(packed.together) if packed.together > 1 else packed.tokens
        key_bias = None if packed.log_prior is None else packed.log_prior[packed.tokens.row()]
        joint = self._answered(read, targets, answers, contexts, asked, label_smoothing, key_bias)
        if not packed.alone:
            return joint
        # After the joint pass: autocast keeps the copies of weights that the first one casts, with gradient or without.
        with torch.no_grad():
            copies, of, places = answers.repeated(packed.together)
            each = self._answered(read[of], targets[of], copies, contexts, packed.tokens)
        return torch.cat([joint[:, None], each[places]], 1)

    def _answered(
        self, read: Tensor, targets: Tensor, answers: Packing, contexts: Tensor, tokens: Packing,
        label_smoothing: float = 0.0, key_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        states = self._embed(self.model.model.decoder, read, answers)
        for layer in self.model.model.decoder.layers:
            states = self._through(self.decoder_layer, layer, states, contexts, answers, tokens, key_bias)
        head, bias = self.model.lm_head, self.model.final_logits_bias[0]
        return token_log_probs(head, bias, states, targets, label_smoothing)

    def contexts(self, ids: Tensor, tokens: Packing) -> Tensor:
        """The encoder's states [tokens, H] of packed contexts."""
        states = self._embed(self.model.model.encoder, ids, tokens)
        for layer in self.model.model.encoder.layers:
            states = self._through(self.encoder_layer, layer, states, tokens)
        return states

    def _through(self, run: Callable, layer: nn.Module, *inputs) -> Tensor:
        if self.model.model.encoder.gradient_checkpointing and self.model.training:
            return checkpoint(run, layer, *inputs, use_reentrant=False)
        return run(layer, *inputs)

    @staticmethod
    def _embed(stack: nn.Module, ids: Tensor, packing: Packing) -> Tensor:
        position = F.embedding(packing.positions + stack.embed_positions.offset, stack.embed_positions.weight)
        states = stack.layernorm_embedding(stack.embed_tokens(ids) + position)
        return F.dropout(states, stack.dropout, stack.training)
