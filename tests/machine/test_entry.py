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


OURS = """
import json

def raised(): raise ValueError("a user's mistake")

def raised_after_another():
    try:
        int("x")
    except ValueError:
        raise ValueError("a user's mistake") from None

def raised_within():
    with open(__file__) as file:
        if file:
            raise ValueError(
                f"a user's {'mistake'}"
            )

def number(): int("4,2")

def cleaned_up():
    with open(__file__):
        int("4,2")

def library(): json.loads("{")

def passed_on():
    try:
        int("4,2")
    except ValueError:
        raise

def uneven(): dict(zip([1], [], strict=True))
"""


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A file of the folder that counts as ours."""
    file = tmp_path / "ours.py"
    file.write_text(OURS)
    monkeypatch.setattr(entry, "CODE", tmp_path.resolve())
    names = {"__file__": str(file)}
    exec(compile(OURS, str(file), "exec"), names)
    return names


@pytest.mark.parametrize("name", ["raised", "raised_after_another", "raised_within"])
def test_what_our_code_raises_is_a_users_mistake(ours, name):
    with pytest.raises(SystemExit, match="^error: a user's mistake$"):
        entry.run(ours[name])


@pytest.mark.parametrize("name", ["number", "cleaned_up", "library", "passed_on", "uneven"])
def test_what_a_builtin_or_a_library_raises_under_our_code_is_none(ours, name):
    with pytest.raises(ValueError):
        entry.run(ours[name])
