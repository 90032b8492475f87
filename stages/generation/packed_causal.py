"""Decoder-only models without padding: prompts with their answers side by side in one row (packing.py).

The library's own layers run over that row; only their attention is ours, through its registry of attention functions
(transformers.AttentionInterface), so that every family keeps its own layers and positions. The head's logits are made
in pieces (vocabulary.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from stages.generation.blocks import Blocks, PackedBlocks, causal_attention
from stages.generation.causal import Causal
from stages.generation.vocabulary import token_log_probs
from stages.packed.cuda_graphs import CudaGraphs
from stages.packed.packing import PackedAnswers, Packing

# Their layers hand what they do not know on to the attention function, and read nothing but positions besides. Their
# logits are what the head says: nothing scales or caps them behind it, as in Gemma 2, Cohere and Granite.
FAMILIES = (
    "gemma", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip
NAME = "packed"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    packing: Packing | PackedBlocks | None = None, scaling: float | None = None, dropout: float = 0.0, **others,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention [1, tokens, heads, d] inside the rows of `packing`; without one, torch's over padded rows."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    mixed = causal_attention(query, key, value, packing, dropout, scaling, others.get("sliding_window"))
    return mixed[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class PackedCausal:
    """The likelihood of answers under prompts by a decoder-only model, without padding anywhere."""

    def __init__(self, generator: Causal):
        self.model = generator.model
        self.model.set_attn_implementation(NAME)
        self.graphs: CudaGraphs | None = None

    def compile(self) -> None:
        """Fuses what lies between matrix products; one graph serves all layers and any number of tokens."""
        for layer in self.model.get_decoder().layers:
            layer.compile(dynamic=True)

    @staticmethod
    def fits(config) -> bool:
        """Whether a model of this configuration can be packed: one of FAMILIES that sees nothing behind a token."""
        capped = getattr(config, "final_logit_softcapping", None)
        return (
            config.model_type in FAMILIES and not capped and not getattr(config, "use_bidirectional_attention", False)
        )

    def token_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, target_mask: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """log p(target) [R, T] in fp32 under prompts [R, L], zero where `target_mask` [R, T] is false.

        Only positions that predict a real answer token reach the vocabulary.
        """
        return self.score(self.pack(input_ids, attention_mask, targets, target_mask), label_smoothing)

    def pack(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        target_mask: Tensor,
        blocks: Blocks | None = None,
    ) -> PackedAnswers:
        """What `score` reads. The host waits for the device here, and nowhere else.

        With `blocks` the prompts' passages do not see each other; CUDA graphs know nothing of that.
        """
        prompts, answers = attention_mask.sum(1, keepdim=True), target_mask.sum(1, keepdim=True)
        fed = targets.shape[1] - 1  # the last token is predicted, not read
        ids = F.pad(input_ids, (0, fed))
        place = torch.arange(ids.shape[1], device=ids.device) - prompts
        if fed:
            ids = torch.where(place < 0, ids, targets.gather(1, place.clamp(0, fed - 1)))
        real, scored = place < answers - 1, Packing.of(target_mask)
        tokens = PackedBlocks.of(blocks.longer(fed), real) if blocks else Packing.of(real)
        row = scored.row()
        predicting = tokens.offsets[row] + prompts[row, 0] - 1 + scored.positions
        return PackedAnswers(tokens.pack(ids), tokens, predicting, scored.pack(targets), scored)

    def score(self, packed: PackedAnswers, label_smoothing: float = 0.0) -> Tensor:
        """`token_log_probs` of what was packed before."""
        run = self.graphs or self.log_probs
        return packed.answers.unpack(run(packed, label_smoothing))

    def log_probs(self, packed: PackedAnswers, label_smoothing: float) -> Tensor:
        """log p [answers] of each answer token, in fp32."""
        states = self._states(packed.ids, packed.tokens)[packed.read]
        return token_log_probs(self.model.get_output_embeddings(), None, states, packed.targets, label_smoothing)

    def _states(self, ids: Tensor, tokens: Packing | PackedBlocks) -> Tensor:
        """The last layer's states [tokens, H], normalised, as the head reads them."""
        # A mask of four dimensions is handed on as it is; our attention needs none, and one over all tokens is huge.
        unused = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device)
        output = self.model.get_decoder()(
            input_ids=ids[None], position_ids=tokens.positions[None], attention_mask=unused, packing=tokens,
            use_cache=False,
        )  # fmt: skip
        return output.last_hidden_state[0]
