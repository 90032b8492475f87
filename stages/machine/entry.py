"""How an entry point runs: a user's mistake in one line, a signal's exit code, the repository it belongs to."""

import dis
import os
import signal
import sys
import time
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
    """Runs an entry point; a user's mistake (a ValueError that our own code raises) ends it with one line.

    Anything else keeps its traceback: it is ours or a library's to explain. A signal ends it with exit code 128 plus the
    signal's number, as a shell would report it.
    """
    if "DVC_STAGE" in os.environ or launching.has_watching_parent():
        end_with_parent()
    try:
        main()
    except ValueError as error:
        if not raised_by_us(error):
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


def raised_by_us(error: Exception) -> bool:
    """Whether a `raise` in our code made this error, rather than a library or a builtin that it called, as in int("4,2").

    A builtin leaves no frame of its own, so that ours is the last one; but there it was calling, not raising.
    """
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    ours = CODE in Path(code.co_filename).resolve().parents
    return ours and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
