"""What a report reads of an experiment: the files of the workspace, or those of a commit or DVC experiment."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

PREDICTIONS, SCORES, TRAINING = "data/predictions/predictions.jsonl", "metrics/eval.json", "metrics/train.json"
CURVES, PARAMS = "data/curves", "params.yaml"
DRAWN = (
    "train_loss_per_sequence", "val_loss_per_sequence", "prior_entropy", "distinct_passages", "gpu_utilization", "gpu_memory",
)  # fmt: skip
NO_RESULT = ("recipes", "runtime", "signs", "tracking")
NEEDED = {"id", "question", "answers", "prediction", "kind", "em", "f1", "log_prob", "gold_known", "passages"}


@dataclass
class Experiment:
    """`rows`: those of the predictions file; `curves`: {metric: [(step, value), ...]}, without what was never logged;
    `settings`: {"train.max_steps": "60", ...}, of the recipes the one that was used."""

    name: str
    rows: list[dict]
    scores: dict[str, float]
    training: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]
    settings: dict[str, str]

    @property
    def answered(self) -> bool:
        """Whether the questions have answers; without them retrieval alone was measured."""
        return not self.rows or self.rows[0]["em"] is not None

    @property
    def n_docs(self) -> int:
        """Most passages that an answer was read from."""
        return max((len(row["passages"]) for row in self.rows), default=0)

    @property
    def history(self) -> list[dict]:
        """The curves as points, in the order of their steps."""
        points: dict[int, dict] = {}
        for name, curve in self.curves.items():
            for step, value in curve:
                points.setdefault(step, {"step": step})[name] = value
        return [points[step] for step in sorted(points)]


def of_workspace(name: str, settings: dict) -> Experiment:
    """The files of this folder, made under `settings`, sections of params.yaml. Raises ValueError where one is missing."""

    def read(path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(
                f"{path}: not found; run `dvc repro` first, or `dvc checkout` after a killed experiment"
            ) from None

    return _load(name, read, lambda path: Path(path).is_file(), settings)


def of_revision(name: str) -> Experiment:
    """A DVC experiment, branch or commit; its outputs come from DVC's cache. Raises ValueError where they are not there."""
    from dvc.api import DVCFileSystem
    from dvc.scm import SCMError

    try:
        files = DVCFileSystem(rev=name)
        files.repo  # noqa: B018 - opens it at that revision, which `exists` would answer with False
    except SCMError:  # RevError among them
        raise ValueError(f"there is no experiment, branch or commit '{name}'; `dvc exp list` names them") from None

    def read(path: str) -> str:
        try:
            with files.open(path, "r", encoding="utf-8") as stream:
                return stream.read()
        except FileNotFoundError:
            raise ValueError(
                f"{name}: {path} is neither in git nor in DVC's cache; `dvc exp apply {name}` and `dvc repro` make it again"
            ) from None

    return _load(name, read, files.exists, yaml.safe_load(read(PARAMS)))


def _load(name: str, read: Callable[[str], str], exists: Callable[[str], bool], settings: dict) -> Experiment:
    rows = _rows(read(PREDICTIONS), f"{name}: {PREDICTIONS}")
    paths = {metric: f"{CURVES}/{metric}.tsv" for metric in DRAWN}
    curves = {metric: _curve(read(path)) for metric, path in paths.items() if exists(path)}
    return Experiment(name, rows, json.loads(read(SCORES)), json.loads(read(TRAINING)), curves, flat_settings(settings))


def read_predictions(file: Path) -> list[dict]:
    """The rows of a predictions file; raises ValueError where an older version wrote it."""
    return _rows(file.read_text(encoding="utf-8"), str(file))


def _rows(text: str, where: str) -> list[dict]:
    rows = [json.loads(line) for line in text.split("\n") if line]  # no splitlines: JSON leaves U+2028 as it is
    if rows and (missing := NEEDED - rows[0].keys()):
        raise ValueError(
            f"{where} has no {', '.join(sorted(missing))}: an older version wrote it; run `dvc repro` again"
        )
    return rows


def _curve(text: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(text.splitlines(), delimiter="\t")]


def flat_settings(settings: dict) -> dict[str, str]:
    """Dotted names, what changes no result left out, the recipe in use as `recipe.SWITCH`."""
    recipes = settings.get("recipes", {})
    kept = {name: value for name, value in settings.items() if name not in NO_RESULT}
    return _flat(kept | {"recipe": recipes.get(settings["train"]["recipe"], {})})


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": str(value)}
    return flat
