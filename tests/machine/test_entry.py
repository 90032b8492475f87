"""One line for a user's mistake, a traceback for ours."""

import pytest

from stages.machine import entry
from stages.params import load_params


def test_a_users_mistake_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: params.yaml: not found"):
        entry.run(load_params)


def test_any_other_error_keeps_its_traceback():
    def ours():
        raise ValueError("a bug in another file")

    with pytest.raises(ValueError, match="a bug"):
        entry.run(ours)
