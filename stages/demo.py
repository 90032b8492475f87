"""A page to ask the trained model, on this machine alone: the answer, its probability, where it came from.

    python -m stages.demo                           # prints the address; Ctrl-C ends it
    python -m stages.demo --port 7870

Needs the outputs of `dvc repro`. The page needs no network and no script.
"""

import argparse
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.params import load_params

QUESTIONS, PREDICTIONS = Path("data/prepared/test.arrow"), Path("data/predictions/predictions.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    arguments = parser.parse_args()
    params = load_params()
    device = prepare_torch(params.runtime)
    from stages.corpus.arrow import read_rows
    from stages.evaluation.asking import Asker
    from stages.reporting.ask_page import AskPage, serve
    from stages.reporting.experiment import read_predictions

    asker = Asker(params, device)
    tested = read_predictions(PREDICTIONS) if PREDICTIONS.is_file() else []
    page = AskPage(asker.ask, read_rows(QUESTIONS), tested, f"{params.train.recipe}, {asker.passages:,} passages")
    serve(page, arguments.port)


if __name__ == "__main__":
    run(main)
