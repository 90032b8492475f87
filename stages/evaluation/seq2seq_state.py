"""A sequence-to-sequence generator that writes token by token, through the library's own cache (T5 and its like).

BART has a faster way (bart_decoder.py).
"""

import copy
from dataclasses import dataclass

from torch import LongTensor, Tensor
from transformers import EncoderDecoderCache

from stages.evaluation.library_cache import feed, left_in
from stages.generation.seq2seq import Contexts, Seq2Seq, forward


@dataclass
class Seq2SeqState:
    """Where R hypotheses stand: their contexts and, once the prefix was fed, the library's cache of keys and values."""

    shares_contexts = False

    generator: Seq2Seq
    contexts: Contexts
    cache: EncoderDecoderCache | None = None

    def first(self) -> Tensor:
        """Feeds the decoder's prefix; log p of the answer's first token, fp32 [R, V]."""
        mask = self.contexts.mask
        return self.advance(self.generator.prefix(len(mask), mask.device))[:, -1].float().log_softmax(-1)

    def advance(self, tokens: Tensor) -> Tensor:
        """Feeds `tokens` [R, n]; the logits [R, n, V] after each of them."""
        output = forward(
            self.generator.model, self.contexts, tokens, use_cache=True, **feed(self.generator.model, self.cache)
        )
        self.cache = left_in(output)
        return output.logits

    def reorder(self, rows: LongTensor) -> None:
        """Row r goes on from the hypothesis of row `rows[r]`, which must stand on the same context.

        So the context's own keys and values, by far the larger part, need not move.
        """
        self.cache.self_attention_cache.batch_select_indices(rows)

    def fork(self, rows: LongTensor) -> "Seq2SeqState":
        """A new state of the given rows, also repeated ones; the old state stays as it is.

        Keys and values of the contexts are copied, not computed again.
        """

        def select(cache):
            # batch_select_indices replaces tensors, it writes into none: shallow copies of layers are enough.
            cache = copy.copy(cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            cache.batch_select_indices(rows)
            return cache

        own, contexts = self.cache.self_attention_cache, self.cache.cross_attention_cache
        cache = EncoderDecoderCache(select(own), select(contexts))
        return Seq2SeqState(self.generator, self.contexts.select(rows), cache)
