"""A table of the DVC experiments of the last commit, as wide as a terminal: what differs, and what came out.

    python -m stages.runs
    python -m stages.runs --commits 3               # of the last three commits

`dvc exp show` has all columns; this is the handful that decides.
"""

import argparse
import os
import shutil
import sys
import textwrap

from stages.machine.entry import run

EVALUATED, TRAINED = "metrics/eval.json", "metrics/train.json"
COLUMNS = {
    "EM": (EVALUATED, "em", "{:.1f}"), "F1": (EVALUATED, "f1", "{:.1f}"), "recall@5": (EVALUATED, "recall_at_5", "{:.1f}"),
    "val loss": (TRAINED, "val_loss_per_sequence", "{:.2f}"), "seconds": (TRAINED, "training_seconds", "{:.0f}"),
}  # fmt: skip
NOT_RESULTS = ("runtime.", "tracking.", "signs.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commits", type=int, default=1, help="how many commits back")
    arguments = parser.parse_args()
    from dvc.api import exp_show
    from dvc.exceptions import DvcException

    try:
        rows = exp_show(num=arguments.commits)
    except DvcException as error:
        raise ValueError(f"DVC cannot list the experiments: {error}") from None
    width = min(100, shutil.get_terminal_size((100, 24)).columns) if sys.stdout.isatty() else 100
    try:
        print(table(rows, width), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: list[dict], width: int) -> str:
    """Rows as dvc.api.exp_show gives them: the workspace, then each commit with its experiments behind it."""
    base, lines = rows[0], []
    for place, row in enumerate(rows):
        if row["rev"] == "workspace":
            base = rows[place + 1] if place + 1 < len(rows) else row
        elif row["typ"] == "baseline":
            base = row
        state = row.get("State") if row.get("State") in ("Queued", "Running", "Failed") else ""
        recipe = str(value(row, "params.yaml", "train.recipe") or "")
        cells = [number(value(row, file, key), form) for file, key, form in COLUMNS.values()]
        lines.append((row["Experiment"] or row["rev"], recipe, cells, state, ", ".join(differences(row, base))))
    recipes = min(12, max(6, *(len(line[1]) for line in lines)))
    results = "".join(f"  {column:>{cell_width(column)}}" for column in COLUMNS)
    names = max(10, min(max(len(line[0]) for line in lines), width - recipes - len(results) - 28))
    head = f"{'experiment':{names}}  {'recipe':{recipes}}{results}"
    room = max(20, width - len(head) - 2)
    made = [f"{head}  what differs"]
    for name, recipe, cells, state, what in lines:
        numbers = "".join(f"  {cell:>{cell_width(column)}}" for column, cell in zip(COLUMNS, cells, strict=True))
        start = f"{short(name, names):{names}}  {short(recipe, recipes):{recipes}}{numbers}"
        both = " ".join(filter(None, [state, what]))
        fits = len(both) <= room
        made.append(f"{start}  {both if fits else state}".rstrip())
        if not fits:
            made += textwrap.wrap(what, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(made)


def cell_width(column: str) -> int:
    return max(5, len(column))


def value(row: dict, file: str, name: str):
    """A cell of DVC's table, which puts the file before a name that several files have."""
    return row.get(f"{file}:{name}", row.get(name))


def differences(row: dict, base: dict) -> list[str]:
    """`name=value` of the parameters that are not the commit's."""
    names = dict.fromkeys(key.removeprefix("params.yaml:") for key in row if is_parameter(key))
    values = {name: (value(row, "params.yaml", name), value(base, "params.yaml", name)) for name in names}
    return [f"{name}={plain(mine)}" for name, (mine, others) in values.items() if mine != others]


def is_parameter(key: str) -> bool:
    name = key.removeprefix("params.yaml:")
    return (name == "seed" or "." in name) and "/" not in name and ":" not in name and not name.startswith(NOT_RESULTS)


def plain(value) -> str:
    """Numbers as params.yaml has them: DVC gives each as a float."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else "-"


def short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "~"


if __name__ == "__main__":
    run(main)
