"""Where hypotheses stand while an answer is written: one state for each family of generators, one way to use them all."""

from typing import Any, Protocol

from torch import LongTensor, Tensor

from stages.evaluation.bart_decoder import BartState
from stages.evaluation.causal_state import CausalState
from stages.evaluation.llama_decoder import LlamaState
from stages.evaluation.seq2seq_state import Seq2SeqState
from stages.generation.causal import Causal
from stages.generation.generator import Generator


class State(Protocol):
    """R hypotheses, each on a context that was read once. V words."""

    shares_contexts: bool  # whether `fork` leaves the contexts where they are, however many rows it makes

    def first(self) -> Tensor:
        """log p of the answer's first token, fp32 [R, V]; called once, before `advance`."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Feed `tokens` [R, n]; the logits [R, n, V] after each of them. The state moves n tokens on."""

    def reorder(self, rows: LongTensor) -> None:
        """Row r goes on from the hypothesis of row `rows[r]`, which must stand on the same context."""

    def fork(self, rows: LongTensor) -> "State":
        """A new state of the given rows, also repeated ones; the old state stays as it is."""


def start(generator: Generator, contexts: Any) -> State:
    """A state before the answer's first token, on what `generator.encode` made of the contexts."""
    if isinstance(generator, Causal):
        if LlamaState.fits(generator.model):
            return LlamaState.of(generator, contexts)
        return CausalState.of(generator, contexts)
    if generator.model.config.model_type == "bart":
        return BartState(generator.model, contexts, generator.decoder_prefix)
    return Seq2SeqState(generator, contexts)
