"""Generators: language models that read a context and write an answer, behind one small interface.

Two families: sequence-to-sequence models (seq2seq.py) and decoder-only ones (causal.py). Training needs `encode` and
`logits`, whoever assembles contexts needs the token layout. What differs between the families (what special tokens frame a
context, where the answer begins) stays behind these methods; `Generator` lists them. How a family writes an answer token
by token is evaluation's (evaluation/states.py).
"""

import copy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import BoolTensor, LongTensor, Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from stages.generation import seq2seq
from stages.generation.causal import CHAT_FLAG, causal_from
from stages.generation.seq2seq import seq2seq_from
from stages.generation.tokenizer import from_pretrained, load_tokenizer, source_of
from stages.storage.model_folders import typed_parts

AUTO_CLASSES = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}
# Whatever kernels are installed: packed weights cannot be trained.
UNPACK = {"quantization_config": GgufConfig(dequantize=True)}


class Generator(Protocol):
    """What training and decoding ask of a generator. R rows, contexts of L tokens, answers of T, V words."""

    model: Any  # the transformers model, where all weights are
    tokenizer: Any
    eos_token_id: int
    pad_token_id: int
    # Tokens before and after the tokens of a context's passage and question.
    context_prefix: list[int]
    context_suffix: list[int]
    max_positions: int | None  # None is no limit
    past_modules: bool  # whether parts may be run past the whole model's forward pass

    def question_tokens(self, questions: list[str]) -> list[list[int]]:
        """Token ids of questions as they follow a passage, without special tokens."""

    def answer_tokens(self, answers: list[str], max_answer_tokens: int) -> tuple[LongTensor, BoolTensor]:
        """Targets [B, T], each with its EOS, and their mask."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of one answer, without special tokens and surrounding blanks."""

    def positions_needed(self, context_tokens: int, answer_tokens: int, together: int = 1) -> int:
        """Positions that the model must have for contexts and answers of these lengths, `together` passages read at once."""

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Contexts [R, L], padded on the right; `attention_mask` is 0 at padding."""

    def logits(self, contexts: Any, targets: Tensor) -> Tensor:
        """Teacher-forced logits [R, T, V] with gradient; position t predicts `targets[:, t]`."""

    def states(self, contexts: Any, targets: Tensor) -> Tensor:
        """The decoder's states [R, T, H] at the positions that predict `targets`."""

    def logits_behind(self, states: Tensor) -> Tensor:
        """Logits [N, V] of the decoder's states [N, H]: `logits` where all at once would be too many."""


def load_generator(
    path_or_name: str, chat_template: bool = False, loading: dict | None = None, weights: bool = True
) -> Generator:
    """Load a model and its tokenizer from a folder, a hub name or a GGUF file, in eval mode.

    In fp32, or as `loading` says (lora.py): the type is explicit, or a checkpoint stored in half precision would be
    computed in half precision. `chat_template` makes a decoder-only model read contexts as a user's message. Without
    `weights` the model is made of its configuration alone, on the meta device. ValueError, in one line, for an unsupported
    model and for missing weights or tokenizer.
    """
    loading = loading or {"dtype": torch.float32}
    source, gguf = source_of(path_or_name)
    config = from_pretrained(AutoConfig, source, path_or_name, **gguf)
    is_rag = config.model_type == "rag"
    of_model = config.generator if is_rag else config
    auto_class = AUTO_CLASSES[_family(of_model, path_or_name)]
    tokenizer = load_tokenizer(path_or_name, config if gguf else None)
    if not weights:
        with torch.device("meta"):
            model = auto_class.from_config(of_model)
    elif is_rag:
        if "quantization_config" in loading:
            raise ValueError(f"models.lora.base: {path_or_name} is a RAG checkpoint, read in fp32 or bf16; use bf16")
        # Here and not above: it imports `datasets`, a second that others need not wait for.
        from transformers import RagSequenceForGeneration

        config = typed_parts(config, loading["dtype"])
        whole = from_pretrained(
            RagSequenceForGeneration, source, path_or_name, config=config, use_safetensors=True, **loading
        )
        model = whole.rag.generator
    elif gguf:
        if "quantization_config" in loading:
            raise ValueError(
                f"models.lora.base: {path_or_name} is a GGUF file, which is read in fp32 or bf16; use bf16"
            )
        # With its configuration, or it would be read from all of the file's fields once more, a second or two.
        model = _unpacked(from_pretrained(auto_class, source, path_or_name, config=config, **loading, **gguf, **UNPACK))
    else:
        model = from_pretrained(auto_class, source, path_or_name, config=config, use_safetensors=True, **loading)
    if getattr(config, CHAT_FLAG, False) and not chat_template:
        print(
            f"models.chat_template: false, but {path_or_name} was trained to read contexts in its chat template; true goes on so"
        )
    return generator_from(model.eval(), tokenizer, chat_template)


def load_saved_generator(folder: Path, dtype: torch.dtype = torch.float32) -> Generator:
    """What training saved, in eval mode: weights, prompt and tokenizer exactly as they were."""
    name = str(folder)
    auto_class = AUTO_CLASSES[_family(from_pretrained(AutoConfig, name, name), name)]
    model = from_pretrained(auto_class, name, name, dtype=dtype, use_safetensors=True)
    # AutoTokenizer prefers a model type's own rules to those of the file, where the two differ.
    as_saved = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    return generator_from(model.eval(), from_pretrained(as_saved, name, name))


def generator_from(model, tokenizer, chat_template: bool | None = None) -> Generator:
    """Wrap a loaded model. ValueError for an unsupported family and for another model's tokenizer.

    `chat_template` None: as the model's configuration says, which a saved checkpoint's does.
    """
    family = _family(model.config, model.config.name_or_path or "the model")
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise ValueError(f"models.generator: {len(tokenizer)} tokens in the tokenizer, {vocabulary} in the model")
    if family == "causal":
        chat_template = getattr(model.config, CHAT_FLAG, False) if chat_template is None else chat_template
        return causal_from(model, tokenizer, chat_template)
    if chat_template:
        raise ValueError(f"models.chat_template: true, but {model.config.model_type} is no decoder-only model")
    return seq2seq_from(model, tokenizer)


def _family(config, name: str) -> str:
    """ "seq2seq" or "causal"; ValueError for what is neither."""
    kind = config.model_type
    if kind in seq2seq.FAMILIES:
        return "seq2seq"
    # BERT and its like can be masked from the left, but are no language models.
    bidirectional = config.is_encoder_decoder or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or bidirectional:
        known = ", ".join(seq2seq.FAMILIES)
        raise ValueError(
            f"models.generator: {name} is of type {kind}; supported are {known} and decoder-only models (Llama, GPT-2, ...)"
        )
    return "causal"


def _unpacked(model):
    """The same weights in a plain model: what comes from GGUF refuses to be trained and saved."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)
