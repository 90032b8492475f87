"""The parameters that a stage may read: those that dvc.yaml declares for it, and no others.

dvc.yaml is the one source: what it declares reruns the stage, is all that the stage can read, and makes the fingerprint
by which a finished training is found again. A stage that reads what it does not declare fails at once, for everybody.
"""

import os
from pathlib import Path

import yaml
from pydantic import BaseModel

from stages.params import Params, load_params

PIPELINE = Path(__file__).resolve().parents[2] / "dvc.yaml"
# What changes no result: readable by every stage, never declared, in no fingerprint.
ALWAYS = ("runtime", "signs", "tracking")


def stage_params(stage: str) -> Params:
    """params.yaml, checked as a whole and cut to what the stage declares. Raises ValueError as `load_params` does.

    What is left out is an AttributeError to read.
    """
    params = load_params()
    return only(params, tree_of([*ALWAYS, "train.recipe", *declared(stage, params.train.recipe)]))


def declared(stage: str, recipe: str) -> list[str]:
    """The stage's keys in dvc.yaml, under the recipe of this name."""
    stages = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"]
    return [key.replace("${train.recipe}", recipe) for key in stages[stage]["params"]]


def outputs() -> list[str]:
    """Every path that a stage writes and DVC deletes before."""
    stages = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"].values()
    return [out for stage in stages for out in stage["outs"]]


def settings_of(params: Params) -> dict:
    """What a stage's result may depend on, for a fingerprint: all that it can read but ALWAYS."""
    return params.model_dump(mode="json", exclude=set(ALWAYS))


def settings_to_record(params: Params) -> dict:
    """What to note beside a training's result: all of params.yaml that decides it, data and warm-up too.

    Where DVC runs the stage: it has run those before it with the same file. By hand they may have run with another one,
    so that what the stage itself reads is all that is known.
    """
    settings = settings_of(params)
    if "DVC_STAGE" in os.environ:
        whole = load_params()
        unused = {"sample", "files", "nq"} - {whole.data.source}
        settings = settings_of(whole)
        settings["data"] = {name: value for name, value in settings["data"].items() if name not in unused}
        del settings["evaluate"]
    recipe = settings.pop("recipes")[params.train.recipe]
    return settings | {"recipe": recipe}


def tree_of(keys: list[str]) -> dict:
    """{"train": None, "index": {"nprobe": None}} of "train" and "index.nprobe"; None stands for all that is below."""
    tree: dict = {}
    for key in sorted(keys):
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
            if place is None:  # declared as a whole
                break
        else:
            place[last] = None
    return tree


def only(values, tree: dict | None):
    """The same sections without what the tree does not name."""
    if tree is None:
        return values
    if isinstance(values, dict):
        return {name: only(values[name], below) for name, below in tree.items()}
    assert isinstance(values, BaseModel) and tree.keys() <= values.__dict__.keys(), tree
    cut = values.model_copy()
    for name in type(values).model_fields:
        if name in tree:
            cut.__dict__[name] = only(cut.__dict__[name], tree[name])
        else:
            del cut.__dict__[name]
    return cut
