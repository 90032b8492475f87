"""Whose model the reranker stage's folder holds, and the weights that it fitted, for those too who load no model."""

from pathlib import Path

from stages.storage import manifest

FACTS = "reranker.json"
REMEDY = "run `dvc repro --force reranker`"


def record(folder: Path, named: str | None, weights: dict[str, float] | None = None) -> None:
    """named: models.reranker; `weights` of the prior that suit the validation questions best, where they were fitted."""
    manifest.write_json(folder / FACTS, {"model": named, "weights": weights})


def check(folder: Path, named: str) -> None:
    """Raises ValueError where the stage ran for another model than `named`, or not at all, or a file is damaged."""
    found = manifest.checked_facts(folder, FACTS, None, "reranker")["model"]
    if found != named:
        raise ValueError(f"{folder}: made of {found}, but models.reranker is {named}; {REMEDY}")


def load_fitted(folder: Path) -> dict[str, float] | None:
    """The prior's weights that suit the validation questions best, as the stage fitted them; None where it had nothing to
    fit: dense retrieval without a reranker, or no validation question that names its passage.

    Raises ValueError where the stage has not run, or ran before it fitted any.
    """
    facts = manifest.checked_facts(folder, FACTS, (FACTS,), "reranker")
    if "weights" not in facts:
        raise ValueError(f"{folder / FACTS}: has no weights for retriever.learn_weights to start from; {REMEDY}")
    return facts["weights"]
