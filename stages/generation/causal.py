"""Decoder-only generators: Llama, SmolLM2, Qwen, GPT-2 and other models of AutoModelForCausalLM.

The context is a prompt and the answer its continuation: `title / text`, `Question: ...`, `Answer:` on a line each, then
" answer" and EOS. Where several passages are read together they stand in one prompt in the order of the prior, an empty
line between them, and positions count through; read in parallel, as blocks.py says. Prompt tokens are read, never scored.
The interface is described in generator.py.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import BoolTensor, LongTensor, Tensor

from stages.generation.blocks import Blocks
from stages.generation.tokenizer import decoded, padded_targets, token_rows
from stages.generation.vocabulary import logits_behind

SEPARATOR, QUESTION, CUE = "\n\n", "\nQuestion: ", "\nAnswer:"
CHAT_FLAG = "rag_chat_template"  # in the model's config.json, so that a checkpoint knows how it was prompted


@dataclass
class Prompts:
    """R contexts as they are read: `ids` and `mask` [R, L], padded on the right; with `blocks` no passage sees another."""

    ids: Tensor
    mask: Tensor
    blocks: Blocks | None = None

    def repeat(self, times: int) -> "Prompts":
        """Every row `times` times, copies side by side."""
        return Prompts(
            self.ids.repeat_interleave(times, 0),
            self.mask.repeat_interleave(times, 0),
            self.blocks and self.blocks.repeat(times),
        )

    def select(self, rows: LongTensor) -> "Prompts":
        """The given rows in the given order; a row may come more than once."""
        return Prompts(self.ids[rows], self.mask[rows], self.blocks and self.blocks.select(rows))


@dataclass
class Causal:
    """A transformers decoder-only model (`.model`, where all weights are) and its tokenizer."""

    model: Any
    tokenizer: Any
    eos_token_id: int
    pad_token_id: int
    context_prefix: list[int]
    context_suffix: list[int]
    chat_template: bool
    # Positions of prompt and answer together; None is no limit.
    max_positions: int | None
    # Whether parts may be run past the whole model's forward pass, which FSDP does not allow.
    past_modules: bool = True
    passage_separator: list[int] = field(default_factory=list)

    def question_tokens(self, questions: list[str]) -> list[list[int]]:
        """Token ids of the question's line without special tokens: they follow the passage's."""
        return token_rows(self.tokenizer, [QUESTION + question for question in questions])

    def answer_tokens(self, answers: list[str], max_answer_tokens: int) -> tuple[LongTensor, BoolTensor]:
        """Targets and their mask (see `padded_targets`)."""
        # After "Answer:" comes a blank, as in running text; a chat's turn starts without one.
        texts = answers if self.chat_template else [f" {answer}" if answer else "" for answer in answers]
        rows = token_rows(self.tokenizer, texts)
        return padded_targets(rows, self.eos_token_id, self.pad_token_id, max_answer_tokens)

    def decode(self, token_ids: list[int]) -> str:
        """The text of one answer."""
        return decoded(self.tokenizer, token_ids)

    def positions_needed(self, context_tokens: int, answer_tokens: int, together: int = 1) -> int:
        """Positions that the model must have for contexts and answers of these lengths, `together` passages in one."""
        return together * context_tokens + answer_tokens

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Prompts:
        """The contexts [R, L], not read yet: training reads them together with the answers, decoding in `start`."""
        return Prompts(input_ids, attention_mask)

    def logits(self, contexts: Prompts, targets: Tensor) -> Tensor:
        """Teacher-forced logits [R, T, V] in the model's dtype; position t predicts `targets[:, t]`.

        One pass over prompts and answers. An answer follows its prompt directly and padding stands on the right, where
        a causal model sees it from no real position: no mask is needed, but for blocks. Only positions that predict an
        answer token reach the vocabulary.
        """
        fed, predicting = self._fed(contexts, targets)
        return self.forward(predicting, **fed, use_cache=False).logits

    def states(self, contexts: Prompts, targets: Tensor) -> Tensor:
        """The decoder's states [R, T, H] at the positions that predict `targets`; `logits_behind` makes logits of them."""
        fed, predicting = self._fed(contexts, targets)
        states = self.model.get_decoder()(**fed, use_cache=False).last_hidden_state
        return states.gather(1, predicting[..., None].expand(-1, -1, states.shape[-1]))

    def logits_behind(self, states: Tensor) -> Tensor:
        """Logits [N, V] of states [N, H]."""
        unused = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        return logits_behind(self.model, states, input_ids=unused)

    def _fed(self, contexts: Prompts, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts with their answers [R, L + T - 1], as the model takes them, and the places [R, T] that predict the answers."""
        lengths = contexts.mask.sum(1, keepdim=True)
        fed = targets.shape[1] - 1  # the last token is predicted, not read
        ids = torch.nn.functional.pad(contexts.ids, (0, fed), value=self.pad_token_id)
        place = torch.arange(ids.shape[1], device=ids.device) - lengths
        if fed:
            answers = targets.gather(1, place.clamp(0, fed - 1))
            ids = torch.where((place >= 0) & (place < fed), answers, ids)
        given = {"input_ids": ids}
        if contexts.blocks:
            blocks = contexts.blocks.longer(fed)
            # Padding may stand behind the last position that the model has.
            positions = blocks.positions.masked_fill(place >= fed, 0)
            given |= {"attention_mask": blocks.mask(self.model.dtype), "position_ids": positions}
        return given, lengths - 1 + torch.arange(targets.shape[1], device=ids.device)

    def forward(self, predicting: Tensor | None, **inputs):
        """The whole model, so that a family's scalings and caps stay the library's, with a head that sees only the
        states at the positions `predicting` [R, n]; None: at all."""
        if predicting is None:
            return self.model(**inputs)

        def select(_, arguments):
            states, *others = arguments
            return states.gather(1, predicting[..., None].expand(-1, -1, states.shape[-1])), *others

        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            output = self.model(**inputs)
        finally:
            hook.remove()
        assert output.logits.shape[:2] == predicting.shape, "the head was not where it was looked for"
        return output


def causal_from(model, tokenizer, chat_template: bool = False) -> Causal:
    """Wrap a loaded model. ValueError for one whose cache cannot be shared by beams and for an unfit tokenizer."""
    config = model.config.get_text_config()
    if model._is_stateful:
        raise ValueError(
            f"models.generator: type {config.model_type} carries a recurrent state, which padding would change; "
            "give a model whose layers are all attention"
        )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise ValueError("models.generator: the tokenizer has no EOS token, so answers could not end")
    model.config.__dict__.pop(CHAT_FLAG, None)
    if chat_template:
        prefix, suffix = _chat_frame(tokenizer)
        setattr(model.config, CHAT_FLAG, True)
    else:
        [start] = tokenizer(["a"])["input_ids"]
        prefix = start[:1] if start[0] == tokenizer.bos_token_id else []
        [suffix] = token_rows(tokenizer, [CUE])
    # Padding is never attended to and never scored: any token will do.
    pad = eos if pad is None or pad >= model.get_input_embeddings().num_embeddings else pad
    limit = getattr(config, "max_position_embeddings", None)
    [separator] = token_rows(tokenizer, [SEPARATOR])
    return Causal(model, tokenizer, eos, pad, prefix, suffix, chat_template, limit, passage_separator=separator)


def _chat_frame(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer's chat template puts before and after a user's message, up to the answer's first token."""
    mark = "(the message)"
    try:
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, after = turn.split(mark)
    except (ValueError, TemplateError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"models.chat_template: the generator's tokenizer has no usable one ({reason})") from None
    # Not as text: special tokens begin and end a turn.
    return tuple(tokenizer([before, after], add_special_tokens=False, verbose=False)["input_ids"])
