"""Three kills of the real pipeline; `make chaos` makes twenty."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_kills_change_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "stages.chaos", "--kills", "3", "--seed", "5"], cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "chaos: 3/3 identical"


def test_a_difference_is_found():
    from stages.chaos import __main__ as chaos

    assert chaos.differing({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert chaos.differing({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b", "c"]
