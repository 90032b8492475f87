"""Stage 0: what params.yaml names outside the pipeline (own data, model folders), as sizes and hashes.

    python -m stages.inputs                         # writes data/inputs, in well under a second; new models take some more

Models that cannot be used and lengths that they cannot take are refused here (stages/fitting), before anything is computed.

DVC runs it every time. The other stages depend on what it writes: a changed file reruns what reads it, nothing else does.
"""

import hashlib
import json
from importlib import metadata
from pathlib import Path

from stages.machine.entry import root_folder, run
from stages.machine.stage_params import outputs
from stages.params import Params, load_params
from stages.settings.data import Data
from stages.storage.outside_files import describe, find, refuse_outputs

INPUTS, FITTED = Path("data/inputs"), Path(".checkpoints")


def main() -> None:
    params = load_params()
    from stages.storage.manifest import write_json
    from stages.storage.model_folders import PARTS, describe_part

    data, import_path = files_of(params.data), params.index.import_path
    models = {part: name for part in PARTS if (name := getattr(params.models, part))}
    named = data | {f"models.{part}": name for part, name in models.items()}
    for key, name in (named | ({"index.import_path": import_path} if import_path else {})).items():
        refuse_outputs(name, key, outputs())
    parts = {part: describe_part(name, part) for part, name in models.items()}
    found = {
        "data": {key: describe(name, key) for key, name in data.items()},
        "encoders": {part: parts[part] for part in ("question_encoder", "context_encoder")},
        "generator": {"generator": parts["generator"]},
        "reranker": {"reranker": parts["reranker"]} if "reranker" in parts else {},
        "index": {"import_path": describe(import_path, "index.import_path")} if import_path else {},
    }

    check_once(params, parts | found["index"])
    INPUTS.mkdir(parents=True, exist_ok=True)
    for name, entries in found.items():
        write_json(INPUTS / f"{name}.json", entries)


def check_once(params: Params, parts: dict[str, dict]) -> None:
    """Raises ValueError for models, lengths and parameters that do not go together; what fitted is not looked at again.

    `parts`: sizes and hashes of the models and of the index's file. It takes some seconds, this stage runs every time.
    """
    from stages.storage.manifest import write_json

    asked = [
        parts, params.models.model_dump(), params.lengths.model_dump(), params.index.model_dump(),
        params.recipe.model_dump(), params.retriever.n_docs, params.train.index_refresh_steps, params.evaluate.precision,
        params.runtime.device, params.runtime.processes,
        [metadata.version(name) for name in ("transformers", "torch", "peft")],
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    known = root_folder() / FITTED / f"fitted-{name}.json"
    if known.is_file():
        return
    from stages.fitting.models import check

    check(params)
    write_json(known, asked)


def files_of(data: Data) -> dict[str, str | list[str]]:
    """The paths that the chosen source reads, by the parameter that names them."""
    if data.source == "files":
        sections = {"files": data.files, "qrels": data.qrels}
        return {
            f"data.{section}.{split}": names
            for section, splits in sections.items()
            for split, names in splits.model_dump().items()
            if names
        }
    if data.source == "nq":
        named = {"data.nq.questions": data.nq.questions, "data.nq.passages": data.nq.passages}
        return {key: name for key, name in named.items() if find(name).is_dir()}  # else a hub name with its revision
    return {}


if __name__ == "__main__":
    run(main)
