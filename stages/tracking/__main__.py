"""Sends what MLflow has not taken yet of a training's journal.

    python -m stages.tracking .tracking/train-0123456789abcdef.jsonl

May be run any number of times: no record is sent twice.
"""

import argparse
import sys
import time
from pathlib import Path

# First: mlflow reads from the environment what this sets.
from stages.tracking.mlflow_store import tracking_uri as _  # isort: skip  # noqa: F401
from stages.tracking.journal import Journal, say
from stages.tracking.mlflow_run import MlflowRun
from stages.tracking.sending import Sender, reason

FOLDER = ".tracking"  # in which the stages keep their journals, at the repository's root


def main(arguments: list[str] | None = None) -> int:
    """Sends what is unsent of a journal. Exit code 0: MLflow has everything; 1: it has not."""
    parser = argparse.ArgumentParser(prog="python -m stages.tracking", description=main.__doc__)
    parser.add_argument("journal", type=Path, help="the file that the training's last line named")
    path = parser.parse_args(arguments).journal
    if not path.is_file():
        say(f"there is no journal {path}")
        return 1
    journal = Journal(path)
    if not journal.lock(timeout=1):
        say(f"a running process is sending {path} already")
        return 1
    root = path.resolve().parents[1] if path.resolve().parent.name == FOLDER else None
    sender = Sender(journal, MlflowRun(journal.state, journal.snapshots, strict=True, root=root))
    try:
        for pause in (0.5, 1.5, 0):
            try:
                while sender.send_next():
                    pass
            except Exception as error:
                trouble = reason(error)
                time.sleep(pause)
            else:
                say(f"{sender.sent} records sent ({sender.refused} refused); nothing is left in {path}")
                return 0
        say(f"{journal.unsent()} records stay in {path}: {trouble}")
        return 1
    finally:
        journal.release()


if __name__ == "__main__":
    sys.exit(main())
