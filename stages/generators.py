"""Generators: sequence-to-sequence language models behind one small interface.

Training needs `encode` and `logits`; decoding needs `encode`, `start`, `step`, `advance`, `reorder`, `fork`;
whoever assembles contexts needs the token layout. What differs between model families (what the decoder
starts from, which special tokens frame a context, how a cache is kept) stays behind these methods.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import BoolTensor, LongTensor, Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, EncoderDecoderCache, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

FAMILIES = ("bart", "t5", "mt5", "longt5")  # umt5: its cache and its forward disagree in transformers 5.17


@dataclass
class Contexts:
    """R encoded contexts: `states` [R, L, H] and `mask` [R, L], 1 at real tokens."""

    states: Tensor
    mask: Tensor

    def repeat(self, times: int) -> "Contexts":
        """Every row `times` times, copies side by side."""
        return Contexts(self.states.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0))

    def select(self, rows: LongTensor) -> "Contexts":
        """The given rows in the given order; a row may come more than once."""
        return Contexts(self.states[rows], self.mask[rows])


@dataclass
class DecoderState:
    """Where R hypotheses stand: their contexts and, once the prefix was fed, the cached keys and values."""

    contexts: Contexts
    cache: EncoderDecoderCache | None = None


@dataclass
class Generator:
    """A transformers sequence-to-sequence model (`.model`, where all weights are) and its tokenizer."""

    model: Any
    tokenizer: Any
    # What the decoder starts from, the same in training, scoring and generating.
    decoder_prefix: list[int]
    eos_token_id: int
    pad_token_id: int
    # Special tokens before and after the tokens of a context.
    context_prefix: list[int]
    context_suffix: list[int]
    # Positions of the longest context or answer that the model can take; None is no limit.
    max_positions: int | None

    def passage_tokens(self, titles: list[str], texts: list[str]) -> list[list[int]]:
        """Token ids of "title / text" (see the function of this name)."""
        return passage_tokens(self.tokenizer, titles, texts)

    def question_tokens(self, questions: list[str]) -> list[list[int]]:
        """Token ids of " // question" without special tokens: they follow the passage's."""
        return self._tokens([f" // {question}" for question in questions])

    def answer_tokens(self, answers: list[str], max_answer_tokens: int) -> tuple[LongTensor, BoolTensor]:
        """Targets [B, T] and their mask [B, T], True at an answer and its EOS; T <= max_answer_tokens.

        A long answer loses its end, never its EOS.
        """
        assert answers and max_answer_tokens >= 1
        rows = [ids[: max_answer_tokens - 1] + [self.eos_token_id] for ids in self._tokens(answers)]
        targets = torch.full((len(rows), max(map(len, rows))), self.pad_token_id)
        mask = torch.zeros_like(targets, dtype=torch.bool)
        for i, row in enumerate(rows):
            targets[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return targets, mask

    def decode(self, token_ids: list[int]) -> str:
        """The text of one answer, without special tokens and surrounding blanks."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Contexts:
        """Encode contexts [R, L]; `attention_mask` [R, L] is 0 at padding."""
        encoder = self.model.get_encoder()
        states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return Contexts(states, attention_mask)

    def logits(self, contexts: Contexts, targets: Tensor) -> Tensor:
        """Teacher-forced logits [R, T, V] in the model's dtype; position t predicts `targets[:, t]`.

        The decoder reads prefix + targets[:, :-1] without a mask: it is causal, so padding on the right of a
        target changes no real position. Gradients flow to the weights and to `contexts.states`.
        """
        logits = self._forward(contexts, self.decoder_inputs(targets), use_cache=False).logits
        return logits[:, len(self.decoder_prefix) - 1 :]

    def decoder_inputs(self, targets: Tensor) -> Tensor:
        """What the decoder reads to predict `targets` [R, T]: the prefix, then the targets without their last."""
        return torch.cat([self._prefix(len(targets), targets.device), targets[:, :-1]], dim=1)

    def start(self, contexts: Contexts) -> DecoderState:
        """A state before the prefix."""
        return DecoderState(contexts)

    def step(self, state: DecoderState, tokens: Tensor | None = None) -> Tensor:
        """Feed `tokens` [R], or nothing but the prefix on the first call; log p of the next, fp32 [R, V]."""
        assert (tokens is None) == (state.cache is None), "only the first step feeds the prefix"
        mask = state.contexts.mask
        fed = self._prefix(len(mask), mask.device) if tokens is None else tokens[:, None]
        return self.advance(state, fed)[:, -1].float().log_softmax(-1)

    def advance(self, state: DecoderState, tokens: Tensor) -> Tensor:
        """Feed `tokens` [R, n]; the logits [R, n, V] after each of them. The state moves n tokens on."""
        output = self._forward(state.contexts, tokens, past_key_values=state.cache, use_cache=True)
        state.cache = output.past_key_values
        return output.logits

    def reorder(self, state: DecoderState, rows: LongTensor) -> None:
        """Row r goes on from the hypothesis of row `rows[r]`, which must stand on the same context.

        So the context's own keys and values, by far the larger part, need not move.
        """
        state.cache.self_attention_cache.batch_select_indices(rows)

    def fork(self, state: DecoderState, rows: LongTensor) -> DecoderState:
        """A new state of the given rows, also repeated ones; the old state stays as it is.

        Keys and values of the contexts are copied, not computed again.
        """

        def select(cache):
            # batch_select_indices replaces tensors, it writes into none: shallow copies of layers are enough.
            cache = copy.copy(cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            cache.batch_select_indices(rows)
            return cache

        own, contexts = state.cache.self_attention_cache, state.cache.cross_attention_cache
        return DecoderState(state.contexts.select(rows), EncoderDecoderCache(select(own), select(contexts)))

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: lengths are cut by the caller, the tokenizer need not warn about them.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _prefix(self, rows: int, device: torch.device) -> Tensor:
        return torch.tensor([self.decoder_prefix], device=device).expand(rows, -1)

    def _forward(self, contexts: Contexts, tokens: Tensor, **cache):
        # The whole model, not its decoder and its head: scalings and biases of a family stay the library's.
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=contexts.states),
            attention_mask=contexts.mask,
            decoder_input_ids=tokens,
            **cache,
        )


def load_generator(path_or_name: str, dtype: torch.dtype = torch.float32) -> Generator:
    """Load a model and its tokenizer from a folder or a hub name, in eval mode.

    `dtype` is explicit, or a checkpoint stored in half precision would be computed in half precision.
    ValueError, in one line, for an unsupported model and for missing weights or tokenizer.
    """
    config = _from_pretrained(AutoConfig, path_or_name)
    _check_family(config)
    tokenizer = load_tokenizer(path_or_name)
    model = _from_pretrained(AutoModelForSeq2SeqLM, path_or_name, config=config, dtype=dtype, use_safetensors=True)
    return generator_from(model, tokenizer)


def load_tokenizer(path_or_name: str) -> PreTrainedTokenizerBase:
    """A generator's tokenizer alone, for tokenizing passages ahead of training. ValueError where there is none."""
    tokenizer = _from_pretrained(AutoTokenizer, path_or_name)
    # transformers 5 makes up a tokenizer of special tokens where there is no vocabulary, without a word.
    folder, files = Path(path_or_name), sorted(set(tokenizer.vocab_files_names.values()))
    if folder.is_dir() and files and not any((folder / file).is_file() for file in files):
        raise ValueError(f"models.generator: {path_or_name} has no tokenizer: none of {', '.join(files)}")
    return tokenizer


def passage_tokens(tokenizer: PreTrainedTokenizerBase, titles: list[str], texts: list[str]) -> list[list[int]]:
    """Token ids of "title / text" without special tokens, the first part of transformers' RAG layout."""
    joined = [f"{title} / {text}" for title, text in zip(titles, texts, strict=True)]
    # verbose=False: lengths are cut by the caller, the tokenizer need not warn about them.
    return tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"] if joined else []


def generator_from(model, tokenizer) -> Generator:
    """Wrap a loaded model. ValueError for an unsupported family and for another model's tokenizer."""
    config = model.config
    _check_family(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected, found = getattr(config, name, None), getattr(tokenizer, name)
        needed = name != "bos_token_id" or config.model_type == "bart"
        if needed and (expected is None or expected != found):
            raise ValueError(f"models.generator: {name} is {expected} in the model, {found} in its tokenizer")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"models.generator: {len(tokenizer)} tokens in the tokenizer, {config.vocab_size} in the model"
        )
    eos, pad = config.eos_token_id, config.pad_token_id
    if config.model_type == "bart":
        # transformers' RAG trains BART from <s> and generates from </s>: here it is <s> everywhere.
        bos = config.bos_token_id
        return Generator(model, tokenizer, [bos], eos, pad, [bos], [eos], config.max_position_embeddings)
    start = getattr(config, "decoder_start_token_id", None)
    return Generator(model, tokenizer, [pad if start is None else start], eos, pad, [], [eos], None)


def _check_family(config) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"models.generator: {config.name_or_path or 'the model'} is of type {config.model_type}; "
            f"supported are {', '.join(FAMILIES)}"
        )


def _from_pretrained(auto_class, path_or_name: str, **options):
    try:
        return auto_class.from_pretrained(path_or_name, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"models.generator: {path_or_name} cannot be loaded: {reason}") from error
