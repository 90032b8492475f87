"""A decoder-only generator that writes token by token: prompts are read once, answers follow them in the library's cache."""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from transformers import Cache

from stages.evaluation.library_cache import feed, left_in
from stages.generation.causal import Causal, Prompts


@dataclass
class CausalState:
    """Where R hypotheses stand. The cache's slots are `prompt` slots of prompts, padded on the left, then answers."""

    shares_contexts = False

    generator: Causal
    cache: Cache
    mask: Tensor  # [R, slots], 1 at real tokens
    positions: Tensor  # [R], of the next token
    prompt: int
    logits: Tensor  # [R, V] of the answer's first token
    bias: Tensor | None = None  # [R, prompt] added to the logits of what is written, where passages weigh

    @classmethod
    def of(cls, generator: Causal, contexts: Prompts) -> "CausalState":
        """Reads the prompts, once. They move to the right end of the cache's slots, so that answers follow directly."""
        length, width = contexts.mask.sum(1, keepdim=True), contexts.ids.shape[1]
        place = torch.arange(width, device=length.device) - (width - length)
        ids = contexts.ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, generator.pad_token_id)
        mask = (place >= 0).long()
        seen, positions, bias = mask, place.clamp(min=0), None
        if contexts.blocks:
            blocks = contexts.blocks.columns(positions)
            # Padding sees itself: attention over nothing may be NaN, and stays in the cache.
            itself = torch.eye(width, dtype=torch.bool, device=mask.device)
            seen = blocks.mask(generator.model.dtype, (blocks.seen() & (place >= 0)[:, None, None]) | itself)
            positions, bias = blocks.positions, blocks.bias
        last = torch.full_like(length, width - 1)
        output = generator.forward(
            last, input_ids=ids, attention_mask=seen, use_cache=True, **_placed(generator, positions)
        )
        return cls(generator, left_in(output), mask, positions[:, -1] + 1, width, output.logits[:, 0], bias)

    def first(self) -> Tensor:
        """log p of the answer's first token, fp32 [R, V]."""
        return self.logits.float().log_softmax(-1)

    def advance(self, tokens: Tensor) -> Tensor:
        """Feeds `tokens` [R, n]; the logits [R, n, V] after each of them."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        positions = self.positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        output = self.generator.forward(
            None, input_ids=tokens, attention_mask=self._seen(tokens.shape[1]), use_cache=True,
            **feed(self.generator.model, self.cache), **_placed(self.generator, positions),
        )  # fmt: skip
        self.cache, self.positions = left_in(output), self.positions + tokens.shape[1]
        return output.logits

    def reorder(self, rows: LongTensor) -> None:
        """Row r goes on from the hypothesis of row `rows[r]`, which must stand on the same context.

        So the prompts' keys and values, by far the larger part, need not move.
        """
        for layer in self.cache.layers:
            if layer.is_sliding:  # its first slots may be gone
                layer.batch_select_indices(rows)
            else:
                # In place: `fork` and the last token's `update` made tensors of this state's own.
                for kept in (layer.keys, layer.values):
                    kept[:, :, self.prompt :] = kept[rows, :, self.prompt :]

    def fork(self, rows: LongTensor) -> "CausalState":
        """A new state of the given rows, also repeated ones; the old state stays as it is.

        Keys and values of the prompts are copied, not computed again.
        """
        # batch_select_indices replaces tensors, it writes into none: shallow copies of layers are enough.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(rows)
        bias = None if self.bias is None else self.bias[rows]
        kept = self.mask[rows], self.positions[rows], self.prompt, self.logits[rows], bias
        return CausalState(self.generator, cache, *kept)

    def _seen(self, count: int) -> Tensor:
        """The mask of the last `count` slots' tokens: [R, slots], or added to the logits, [R, 1, count, slots]."""
        if self.bias is None:
            return self.mask
        slots, dtype = self.mask.shape[1], self.generator.model.dtype
        place = torch.arange(slots, device=self.mask.device)
        seen = self.mask.bool()[:, None, None] & (place <= place[-count:, None])
        added = torch.nn.functional.pad(self.bias, (0, slots - self.prompt))[:, None, None]
        return added.masked_fill(~seen, torch.finfo(dtype).min).to(dtype)


def _placed(generator: Causal, positions: Tensor) -> dict[str, Tensor]:
    # Models without the argument (ALiBi) take positions from the mask.
    known = inspect.signature(generator.model.forward).parameters
    return {"position_ids": positions} if "position_ids" in known else {}
