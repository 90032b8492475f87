"""How an entry point runs: a user's mistake in one line, a signal's exit code, the repository it belongs to."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from stages.machine import launching
from stages.machine.signals import Interrupted, end_with_parent

CODE = Path(__file__).resolve().parents[1]
RANK_0_FIRST_SECONDS = 10


def root_folder() -> Path:
    """The real repository root: $DVC_ROOT where DVC runs us, in temp runs too, else the current folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; a user's mistake (a ValueError raised by our own code) ends it with one line.

    Anything else keeps its traceback: it is ours or a library's to explain. A signal ends it with exit code 128 plus the
    signal's number, as a shell would report it.
    """
    if "DVC_STAGE" in os.environ or launching.has_watching_parent():
        end_with_parent()
    try:
        main()
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if CODE not in raised_in.parents:
            raise
        if launching.rank():
            # A mistake is mostly every rank's: rank 0 tells it, and the launcher ends us meanwhile.
            time.sleep(RANK_0_FIRST_SECONDS)
            sys.exit(f"error on rank {launching.rank()}: {error}")
        sys.exit(f"error: {error}")
    except Interrupted as interrupted:
        if not launching.rank():
            print(interrupted.line, file=sys.stderr)
        sys.exit(128 + interrupted.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
