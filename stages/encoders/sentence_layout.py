"""The sentence-transformers layout of an encoder's folder: how states become a vector, beside the model itself.

modules.json names the modules, 1_Pooling/config.json the pooling, sentence_bert_config.json the length,
config_sentence_transformers.json the texts put before questions and passages. Read from a folder or from the hub.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from stages.storage.outside_files import split_revision

MODULES, PROMPTS, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
PREFIX = "sentence_transformers.models."


@dataclass
class SentenceLayout:
    """What such a folder says beside the model."""

    pooling: str | None = None  # cls or mean; None: nothing is said
    normalize: bool = False
    max_tokens: int | None = None
    subfolder: str = ""  # where the transformers model is
    query_prefix: str = ""
    passage_prefix: str = ""


def read_layout(path_or_name: str, key: str) -> SentenceLayout:
    """The layout of a model; an empty one for a plain transformers folder.

    `key` is the parameter that named it. OSError where there is no such model, ValueError for modules other than a
    transformer, pooling and normalisation.
    """
    layout = SentenceLayout()
    prompts = (_json(path_or_name, PROMPTS, key) or {}).get("prompts") or {}
    layout.query_prefix = prompts.get("query") or ""
    layout.passage_prefix = prompts.get("document") or prompts.get("passage") or ""
    for module in _json(path_or_name, MODULES, key) or []:
        kind, folder = module["type"].rpartition(".")[2], module["path"]
        if kind == "Transformer":
            layout.subfolder = folder
            layout.max_tokens = (_json(path_or_name, _under(folder, LENGTH), key) or {}).get("max_seq_length")
        elif kind == "Pooling":
            layout.pooling = _pooling(_json(path_or_name, _under(folder, "config.json"), key) or {}, path_or_name, key)
        elif kind == "Normalize":
            layout.normalize = True
        else:
            raise ValueError(
                f"{key}: '{path_or_name}' has a {kind} module; supported are a transformer, pooling and normalisation"
            )
    return layout


def write_layout(folder: Path, layout: SentenceLayout, dimension: int) -> None:
    """Makes a saved transformers model a sentence-transformers folder; with pooling None (DPR) only what `read_layout`
    needs."""
    modules = [("", "Transformer")]
    if layout.pooling:
        modules.append(("1_Pooling", "Pooling"))
        modes = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens")}
        modes["pooling_mode_cls_token" if layout.pooling == "cls" else "pooling_mode_mean_tokens"] = True
        (folder / "1_Pooling").mkdir(exist_ok=True)
        _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dimension, **modes})
    if layout.normalize:
        modules.append(("2_Normalize", "Normalize"))
    rows = [{"idx": i, "name": str(i), "path": path, "type": PREFIX + kind} for i, (path, kind) in enumerate(modules)]
    _write(folder / MODULES, rows)
    if layout.max_tokens:
        _write(folder / LENGTH, {"max_seq_length": layout.max_tokens, "do_lower_case": False})
    prompts = {"query": layout.query_prefix, "document": layout.passage_prefix}
    _write(folder / PROMPTS, {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "dot"})


def _pooling(config: dict, path_or_name: str, key: str) -> str:
    # Older files have a switch for each mode, newer ones a name.
    modes = [
        name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on
    ]
    named = config.get("pooling_mode")
    modes = modes or ([named] if isinstance(named, str) else list(named or []))
    known = {"cls_token": "cls", "mean_tokens": "mean", "cls": "cls", "mean": "mean"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(
            f"{key}: '{path_or_name}' pools by {' and '.join(modes) or 'nothing'}; supported are cls and mean"
        )
    return known[modes[0]]


def _under(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _json(path_or_name: str, name: str, key: str):
    """The content of one of the model's files, None where it has no such file."""
    # A hub that cannot be reached is an error: without these files the same model would give other vectors.
    source, pinned = split_revision(path_or_name)
    found = cached_file(source, name, **pinned, _raise_exceptions_for_missing_entries=False)
    try:
        return json.loads(Path(found).read_text(encoding="utf-8")) if found else None
    except ValueError as error:
        raise ValueError(f"{key}: {found} is damaged ({error})") from None


def _write(file: Path, content) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
