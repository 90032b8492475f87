"""Which part of a model a parameter names: a plain folder or hub name is the part itself; what an earlier training left, a
transformers RAG checkpoint and a model of MLflow hold several, of which each `models.*` takes its own."""

import json
from pathlib import Path

import yaml

from stages.storage.manifest import MANIFEST
from stages.storage.outside_files import describe, describe_model, find, split_revision

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PARTS = ("question_encoder", "context_encoder", "generator", "reranker")
RAG_TOKENIZERS = {"question_encoder": "question_encoder_tokenizer", "generator": "generator_tokenizer"}
RAG_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
CONTEXT_ENCODER = (
    "name the encoder that its index was made by: of a run of this pipeline copy it there (cp -rL "
    "data/retriever/context_encoder {name}/), of facebook/rag-* it is facebook/dpr-ctx_encoder-single-nq-base"
)
OTHERWISE = {"context_encoder": CONTEXT_ENCODER, "reranker": "name another or set models.reranker to null"}


def part_of(name: str, part: str) -> str:
    """What `models.<part>`: `name` means, by the name that `find` takes.

    A RAG checkpoint stays whole: it is taken apart when it is loaded. Raises ValueError where the part is not there.
    """
    folder, inside = find(name), Path(name)
    if not folder.is_dir():
        return name
    if (folder / "MLmodel").is_file():
        within = _inside_mlflow(folder, name, part)
        folder, inside = folder / within, inside / within
    kind = model_type(folder)
    if kind not in (None, "rag"):
        return str(inside)
    held = [one for one in PARTS if (folder / one / "config.json").is_file()]
    if part in held:
        return str(inside / part)
    if kind == "rag":
        if part in RAG_TOKENIZERS:
            return str(inside)
        held += RAG_TOKENIZERS
    elif not held:
        return name
    what = OTHERWISE.get(part, "name another").format(name=inside)
    raise ValueError(f"models.{part}: {name} holds no {part} ({', '.join(sorted(held))}); {what}")


def part_files(name: str, part: str) -> list[str]:
    """Files and folders, by the names that `find` takes, that decide what the part is; one that is not here for a hub name."""
    inside = part_of(name, part)
    folder = find(inside)
    if not folder.is_dir() or model_type(folder) != "rag":
        return [inside]
    files = sorted({file.name for pattern in RAG_FILES for file in folder.glob(pattern)})
    return [str(Path(inside) / one) for one in [*files, RAG_TOKENIZERS[part]] if (folder / one).exists()]


def describe_part(name: str, part: str) -> dict:
    """As `describe_model` for the part alone."""
    key = f"models.{part}"
    if name.startswith("models:/"):
        raise ValueError(
            f"{key}: {name} is an address in MLflow; fetch it (mlflow artifacts download --artifact-uri {name} --dst-path "
            "my-model) and name the folder"
        )
    return describe(part_files(name, part), key) if find(name).is_dir() else describe_model(name, key)


def check_weights(inside: str, key: str) -> None:
    """Raises ValueError where a model has no weights in safetensors or damaged ones; `inside` is what `part_of` gave.

    A hub that cannot be asked now is no error: it tells when they are loaded.
    """
    folder = find(inside)
    if folder.is_dir():
        if not any(folder.rglob("config.json")):
            return  # a GGUF file, or no model, which is told by who reads it
        files = sorted(folder.rglob("*.safetensors"))
        for file in files:
            _check_safetensors(file, key)
        found = bool(files)
    else:
        found = folder.suffix == ".gguf" or _on_hub(inside)
    if not found:
        raise ValueError(
            f"{key}: {inside} has no weights in safetensors, others are not read (a pickle may run anything); transformers' "
            "save_pretrained writes them"
        )


def is_saved_part(folder: Path) -> bool:
    """Whether a training of this pipeline wrote it, with its tokenizer exactly as it was used."""
    return folder.name in PARTS and (folder.parent / MANIFEST).is_file()


def model_type(folder: Path) -> str | None:
    """What config.json says of a model in the hub's layout; None where it says nothing."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _on_hub(named: str) -> bool:
    """Whether the hub, or its cache, has weights in safetensors; taken for true where it cannot be asked."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    name, pinned = split_revision(named)
    try:
        if any(isinstance(try_to_load_from_cache(name, one, **pinned), str) for one in WEIGHTS):
            return True
        return any(file.endswith(".safetensors") for file in HfApi().list_repo_files(name, **pinned))
    except Exception:
        return True


def _check_safetensors(file: Path, key: str) -> None:
    """Its header against its size: cut short it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"{key}: {file} is damaged ({reason}); copy it again") from None


def typed_parts(config, dtype):
    """A RAG checkpoint's configuration by which both of its models get this type: `from_pretrained(dtype=...)` alone leaves
    them in that of their own configurations, fp16 where they once came from such files."""
    config.question_encoder.dtype = config.generator.dtype = dtype
    return config


def _inside_mlflow(folder: Path, name: str, part: str) -> Path:
    """Where the weights lie in a model that a training has registered."""
    try:
        described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
        within = Path(described["flavors"]["python_function"]["data"]) / "model"
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        within = None
    if within is None or not (folder / within).is_dir():
        raise ValueError(f"models.{part}: {name} is a model of MLflow, but none that this pipeline has registered")
    return within
