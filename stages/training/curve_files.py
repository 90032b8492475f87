"""A training's curves as files that DVC draws, also while it runs: one file a metric, as DVCLive lays them.

Not DVCLive itself: it appends, and a training that goes on from a checkpoint takes some steps again. Its columns would be
`step` and the metric's name; of files with the same columns DVC's legend is short.
"""

import csv
import re
import shutil
from pathlib import Path

from stages.storage import manifest

OF_A_RANK = re.compile(r"_rank_\d+$")


class CurveFiles:
    """`folder`/NAME.tsv for each metric that was ever logged: columns `step` and `value`, a row a logged step.

    A metric has rows at its own steps alone, because a table of all of them has empty cells, which DVC draws as 0. What
    single ranks measured is left out.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.begun = False

    def follow(self, history: list[dict]) -> None:
        """Brings the files up to a history that has grown by one point; the first call writes all of it."""
        if self.begun:
            self._append(history[-1:], self.folder)
        else:
            self.write(history)

    def write(self, history: list[dict]) -> None:
        """Writes the files anew; what lies in the folder is replaced when they are whole."""
        unfinished = self.folder.with_name(f"{self.folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self._append(history, unfinished)
        manifest.put_in_place(unfinished, self.folder)
        self.begun = True

    @staticmethod
    def _append(points: list[dict], folder: Path) -> None:
        for name in dict.fromkeys(name for point in points for name in point):
            if name == "step" or OF_A_RANK.search(name):
                continue
            rows = [(point["step"], point[name]) for point in points if name in point]
            file = folder / f"{name}.tsv"
            rows = rows if file.exists() else [("step", "value"), *rows]
            with open(file, "a", newline="", encoding="utf-8") as stream:
                csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(rows)
