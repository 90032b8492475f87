"""Ending on request: a first signal asks a training to stop behind its step, a second one ends it at once.

A stage that DVC started also ends when DVC is gone: nobody would take its result, and the repeated command would start
a second process on the same files.
"""

import os
import signal
import sys
import threading
import time

from stages.machine import launching

ASKING = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.2


class Interrupted(KeyboardInterrupt):
    """A training ended because a signal asked for it; `number` is the signal's."""

    def __init__(self, number: int, line: str):
        super().__init__(line)
        self.number, self.line = number, line


class Interrupts:
    """While open, `asked()` is the number of the first SIGTERM or SIGINT, or None."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict = {}

    def asked(self) -> int | None:
        return self._number

    def __enter__(self) -> "Interrupts":
        # Python delivers signals to the main thread only; elsewhere there is nothing to handle.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._first) for number in ASKING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _first(self, number: int, _frame) -> None:
        self._number = number
        for asking in ASKING:
            # torchrun passes on what a terminal has sent to everyone already; it ends who takes too long by itself.
            signal.signal(asking, signal.SIG_IGN if launching.by_torchrun() else signal.SIG_DFL)
        if launching.rank():
            return
        # os.write, because print may be what the signal interrupted.
        os.write(2, f"\n{signal.Signals(number).name}: ends behind this step; a second one ends at once\n".encode())


def end_with_parent() -> None:
    """Sends this process SIGTERM as soon as its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        print("the process that started this stage is gone: it ends too", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
