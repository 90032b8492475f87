"""Signals to real processes. What must end does: where it does not, pytest's own limit ends the test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import time
from stages.machine.signals import Interrupted, Interrupts
from stages.machine.entry import run
def main():
    with Interrupts() as interrupts:
        print("ready", flush=True)
        for _ in range({steps}):
            time.sleep(0.05)
            if interrupts.asked():
                raise Interrupted(interrupts.asked(), "interrupted at step 3 of 9")
{after}
run(main)
"""


def process(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_behind_the_step_with_one_line_and_its_exit_code(number):
    started = process(WORK.format(steps=10**5, after=""))
    assert started.stdout.readline() == "ready\n"
    started.send_signal(number)
    _, errors = started.communicate()
    assert started.returncode == 128 + number
    assert errors.splitlines()[-1] == "interrupted at step 3 of 9" and "Traceback" not in errors


def test_a_second_signal_ends_at_once():
    started = process(WORK.format(steps=0, after="        time.sleep(3600)"))
    assert started.stdout.readline() == "ready\n"
    started.send_signal(signal.SIGTERM)
    # Two signals at once are one to the kernel: the second is sent when the first has been heard.
    while "a second one ends at once" not in started.stderr.readline():
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    started.communicate()
    assert started.returncode == -signal.SIGTERM


def test_a_stage_that_dvc_started_ends_when_dvc_is_killed(tmp_path):
    stage = (
        "import time; from stages.machine.entry import run; run(lambda: (print('up', flush=True), time.sleep(3600)))"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stage!r}])"
    started = process(parent, DVC_STAGE="train")
    assert started.stdout.readline() == "up\n"
    started.kill()
    # Both ends of the pipes close once the stage is gone too.
    _, errors = started.communicate()
    assert "the process that started this stage is gone" in errors
