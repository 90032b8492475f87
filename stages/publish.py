"""Writes the trained model as a folder in the hub's layout, with a model card, and pushes it where a hub is meant.

    python -m stages.publish ./my-model             # a folder, which must not exist yet
    python -m stages.publish owner/name             # a repository on the hub; log in first: hf auth login
    python -m stages.publish owner/name --private --weights-only

The weights lie at the top, where transformers looks for them; `retrieval/` holds the index and the passages, so that
stages/evaluation/pyfunc.py answers from the folder alone. Scores go into the card where DVC finds them up to date.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stages.machine.entry import root_folder, run
from stages.params import PARAMS_FILE, load_params

MODEL, METRICS = Path("data/model"), Path("metrics")
HUB_NAME = r"[\w.-]+/[\w.-]+"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", help="a folder (./name, /path or any path that is no owner/name) or a hub name")
    parser.add_argument("--weights-only", action="store_true", help="without index and passages")
    parser.add_argument("--private", action="store_true", help="make the hub's repository private")
    arguments = parser.parse_args()
    if not is_hub_name(arguments.target):
        folder = Path(arguments.target).expanduser()
        if folder.exists():
            raise ValueError(f"{folder}: is there already and is not overwritten; name another folder or remove it")
        write(folder, folder.name, arguments.weights_only)
        print(
            f"{folder}: {sum(1 for file in folder.rglob('*') if file.is_file())} files; README.md is the model's card"
        )
        return
    (root_folder() / ".tracking").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root_folder() / ".tracking", prefix="publish-") as work:
        folder = Path(work) / arguments.target.split("/")[1]
        write(folder, arguments.target, arguments.weights_only)
        push(folder, arguments.target, arguments.private)


def is_hub_name(target: str) -> bool:
    """Whether owner/name means a repository: not where such a path, or the folder that would hold it, is there."""
    return bool(re.fullmatch(HUB_NAME, target)) and target[0] != "." and not Path(target).parent.is_dir()


def write(folder: Path, name: str, weights_only: bool) -> None:
    """Writes weights, card and, unless `weights_only`, what answering needs; whole or not at all.

    Raises ValueError where that would be another training's than the weights are.
    """
    from stages.rag.parts import parts
    from stages.storage import manifest
    from stages.verdicts.card import model_card

    if not (MODEL / "run.json").is_file():
        raise ValueError(f"{MODEL}: no trained model; run `dvc repro` (or python -m stages.train) first")
    manifest.check(MODEL, None, "run `dvc repro --force train`")
    trained = json.loads((MODEL / "run.json").read_text(encoding="utf-8"))
    measured = scores(up_to_date())
    if "train" not in measured and not weights_only:
        raise ValueError(
            f"{MODEL}: DVC does not find `train` up to date, so that data/ and params.yaml may be others than it was trained "
            "with; run `dvc repro` first, or publish with --weights-only"
        )
    card = model_card(name, trained, measured, loader_of(MODEL), whole=not weights_only)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(MODEL, unfinished)
        if not weights_only:
            needed = parts(MODEL, load_params()) | {PARAMS_FILE.name: PARAMS_FILE}
            for place, source in needed.items():
                target = unfinished / "retrieval" / place
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(f"{folder}: cannot be written: {error.strerror or error}") from None


def loader_of(model: Path) -> tuple[str, str]:
    """How the weights are laid out, `rag` (transformers' RAG) or `parts`, and the class of transformers that loads them."""
    layout = "parts" if (model / "generator").is_dir() else "rag"
    config = model / "generator" / "config.json" if layout == "parts" else model / "config.json"
    return layout, json.loads(config.read_text(encoding="utf-8"))["architectures"][0]


def up_to_date() -> set[str]:
    """Which of the stages train and evaluate DVC finds unchanged since they ran; none where there is no repository."""
    command = [sys.executable, "-m", "dvc", "status", "--json", "train", "evaluate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return set()
    return {"train", "evaluate"} - {name.split(":")[-1] for name in json.loads(done.stdout)}


def scores(stages: set[str]) -> dict[str, dict]:
    """The metrics of the named stages; those of the others may be another model's, and are left out with a line."""
    found = {}
    for stage, file in (("train", METRICS / "train.json"), ("evaluate", METRICS / "eval.json")):
        if stage in stages and file.is_file():
            found[stage] = json.loads(file.read_text(encoding="utf-8"))
        else:
            print(f"{file} is left out of the card: DVC does not find {stage} up to date (`dvc repro` runs it)")
    return found


def push(folder: Path, name: str, private: bool) -> None:
    """Uploads the folder to the hub. Raises ValueError in one line where that fails."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Published by stages.publish")
    except (OSError, ValueError) as error:  # HfHubHTTPError and httpx's errors are of these
        reason = " ".join(str(error).split())[:250]
        raise ValueError(
            f"{name}: not pushed to the hub ({reason}); log in with `hf auth login`, or publish to a folder: "
            f"python -m stages.publish ./{folder.name}"
        ) from None
    print(f"https://huggingface.co/{name}")


if __name__ == "__main__":
    run(main)
