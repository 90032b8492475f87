"""A stage in the tests' own process: one of its own takes four seconds of computing to import torch and transformers."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from stages.machine.entry import run


def run_stage(folder: Path, stage: str, *arguments: str, text: str = "") -> CompletedProcess:
    """As `python -m stages.STAGE` by hand in the folder, a command's too: its exit code and what it printed.

    `text` is its standard input.

    What no user's mistake explains is raised. The code is the checkout's, not a copy of it in the folder. The fingerprint of a
    training is another one than in a process of its own, because it holds all code that is loaded.
    """
    output, errors, code = io.StringIO(), io.StringIO(), 0
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    given = io.TextIOWrapper(io.BytesIO(text.encode()))
    with (
        contextlib.chdir(folder), patch.dict(os.environ, own, clear=True),
        patch.object(sys, "argv", [stage, *arguments]), patch.object(sys, "stdin", given),
        contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors),
    ):  # fmt: skip
        try:
            run(importlib.import_module(f"stages.{stage}").main)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return CompletedProcess(["python", "-m", f"stages.{stage}"], code, output.getvalue(), errors.getvalue())
