"""The table of experiments."""

from stages.runs import table

COMMON = {
    "train.recipe": "new",
    "train.max_steps": 60.0,
    "runtime.threads": 0.0,
    "seed": 13.0,
    "State": None,
    "em": 74.25,
}
ROWS = [
    {**COMMON, "Experiment": None, "rev": "workspace", "typ": "baseline", "f1": 75.8, "recall_at_5": 94.75,
     "val_loss_per_sequence": 3.5, "training_seconds": 135.2, "train.max_steps": 50.0},
    {**COMMON, "Experiment": None, "rev": "main", "typ": "baseline", "f1": 75.8},
    {**COMMON, "Experiment": "token", "rev": "1a2b3c4", "typ": "branch_base", "recipes.new.marginalization": "token",
     "runtime.threads": 2.0},
    {**COMMON, "Experiment": "a-very-long-name-of-an-experiment", "rev": "2", "typ": "branch_base", "State": "Queued",
     "em": None, "train.recipe": "old", "params.yaml:train.max_steps": 600.0, "train.learning_rate": 1e-05},
]  # fmt: skip


def test_the_table_says_what_differs_and_fits_its_width():
    lines = table(ROWS, 100).splitlines()
    assert max(map(len, lines)) <= 100
    workspace, token = lines[1], next(line for line in lines if line.startswith("token"))
    assert workspace.split() == ["workspace", "new", "74.2", "75.8", "94.8", "3.50", "135", "train.max_steps=50"]
    assert "runtime" not in "".join(lines) and "seed=" not in "".join(lines)
    queued = " ".join(" ".join(lines[lines.index(token) :]).split())
    assert "a-very-long-name-of-an~ old - - - - - Queued train" in queued
    for change in ("train.recipe=old", "train.max_steps=600", "train.learning_rate=1e-05"):
        assert change in queued
