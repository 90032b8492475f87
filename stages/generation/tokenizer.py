"""A generator's tokenizer, and text to token ids and back as every family of generators does it.

No model is needed here: passages are tokenized before any is loaded.
"""

import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import BoolTensor, LongTensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.corpus.text_tokens import text_rows
from stages.storage.model_folders import RAG_TOKENIZERS, is_saved_part, model_type
from stages.storage.outside_files import hint, split_revision


def load_tokenizer(path_or_name: str, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """A generator's tokenizer alone, for tokenizing passages ahead of training. ValueError where there is none.

    That of a GGUF file is the one beside it in its folder, where there is one, else its own; it need not read the model's
    `config` again.
    """
    source, gguf = source_of(path_or_name)
    if gguf and (Path(source) / "tokenizer.json").is_file():
        gguf = {}
    folder, auto_class, options = Path(source), AutoTokenizer, gguf | ({"config": config} if gguf and config else {})
    if is_saved_part(folder) and (folder / "tokenizer.json").is_file():
        # AutoTokenizer prefers a model type's own rules to those of the file, where the two differ.
        auto_class = PreTrainedTokenizerFast
    elif not gguf and (not folder.is_dir() or model_type(folder) == "rag"):
        config = from_pretrained(AutoConfig, source, path_or_name)
        if config.model_type == "rag":
            folder /= RAG_TOKENIZERS["generator"]
            options = {"subfolder": folder.name, "config": config.generator}
    tokenizer = from_pretrained(auto_class, source, path_or_name, **options)
    # transformers 5 makes up a tokenizer of special tokens where there is no vocabulary, without a word.
    files = sorted(set(tokenizer.vocab_files_names.values()))
    if not gguf and Path(source).is_dir() and files and not any((folder / file).is_file() for file in files):
        raise ValueError(f"models.generator: {path_or_name} has no tokenizer: none of {', '.join(files)}")
    return tokenizer


def source_of(path_or_name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: a folder or hub name and, for GGUF (also a folder of one such file), its file."""
    path = Path(path_or_name)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(f"models.generator: {path_or_name} holds {len(files)} GGUF files; name one of them")
        if files:
            return str(path), {"gguf_file": files[0].name}
    return path_or_name, {}


def from_pretrained(auto_class, source: str, named: str, **options):
    """From a folder, or from the hub, where `source` may be pinned: name@revision. ValueError in one line."""
    try:
        source, pinned = split_revision(source)
        return auto_class.from_pretrained(source, trust_remote_code=False, **pinned, **options)
    except (OSError, ValueError, ImportError, LookupError, struct.error, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        if reason.startswith("Couldn't instantiate the backend tokenizer"):
            reason = "it has no tokenizer"
        raise ValueError(f"models.generator: {named} cannot be loaded: {reason}{hint(named)}") from error


def token_rows(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without special tokens, also where it spells one."""
    return text_rows(tokenizer, texts, add_special_tokens=False)


def passage_tokens(tokenizer: PreTrainedTokenizerBase, titles: list[str], texts: list[str]) -> list[list[int]]:
    """Token ids of "title / text" without special tokens, the first part of transformers' RAG layout."""
    return token_rows(tokenizer, [f"{title} / {text}" for title, text in zip(titles, texts, strict=True)])


def padded_targets(
    answers: list[list[int]], eos: int, pad: int, max_answer_tokens: int
) -> tuple[LongTensor, BoolTensor]:
    """Targets [B, T] and their mask [B, T], True at an answer and its EOS; T <= max_answer_tokens.

    A long answer loses its end, never its EOS.
    """
    assert answers and max_answer_tokens >= 1
    rows = [ids[: max_answer_tokens - 1] + [eos] for ids in answers]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    targets = torch.full(mask.shape, pad)
    targets[mask] = torch.tensor([token for row in rows for token in row])
    return targets, mask


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of one answer, without special tokens and surrounding blanks."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
