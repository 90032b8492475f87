"""Stage 0: what params.yaml names outside the pipeline (own data, model folders), as sizes and hashes.

    python -m stages.inputs                         # writes data/inputs, in well under a second

DVC runs it every time. The other stages depend on what it writes: a changed file reruns what reads it, nothing else does.
"""

from pathlib import Path

from stages.machine.entry import run
from stages.machine.stage_params import outputs
from stages.params import Data, load_params
from stages.storage.outside_files import describe, find, refuse_outputs

INPUTS = Path("data/inputs")


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

    INPUTS.mkdir(parents=True, exist_ok=True)
    for name, entries in found.items():
        write_json(INPUTS / f"{name}.json", entries)


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
