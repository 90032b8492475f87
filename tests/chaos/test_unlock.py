"""What a killed DVC leaves behind, against a real DVC in a repository of one stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.chaos import unlock


def without_outer_dvc(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DVC")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The repository whose copies the tests get: each call of DVC costs half a second."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        without_outer_dvc(patched)
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["dvc", "init", "-q"], check=True)
        Path("input").write_text("a stage without one is not in the run cache")
        Path("dvc.yaml").write_text(
            "stages:\n  a:\n    cmd: echo ran >> runs; echo 1 > x\n    deps: [input]\n    outs: [x]\n"
        )
        assert repro().returncode == 0
    return folder


@pytest.fixture
def repository(tmp_path, monkeypatch, made):
    without_outer_dvc(monkeypatch)
    folder = tmp_path / "repository"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def repro():
    return subprocess.run(["dvc", "repro"], capture_output=True, text=True)


def test_nothing_is_wrong_nothing_changes(repository, capsys):
    before = Path("dvc.lock").read_bytes(), Path(".dvc/tmp/rwlock").read_bytes()
    unlock.main()
    assert (Path("dvc.lock").read_bytes(), Path(".dvc/tmp/rwlock").read_bytes()) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("part", [0, 30])
def test_a_torn_dvc_lock_goes_aside_and_no_stage_runs_again(repository, part):
    Path("dvc.lock").write_bytes(Path("dvc.lock").read_bytes()[:part])
    assert "dvc.lock' validation failed" in repro().stderr
    unlock.main()
    assert Path(".dvc/tmp/dvc.lock.broken").exists()
    assert repro().returncode == 0 and Path("x").read_text() == "1\n"
    assert Path("runs").read_text() == "ran\n"


def test_a_torn_rwlock_is_removed(repository):
    Path(".dvc/tmp/rwlock").write_text('{"write": {"/x')
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("echo 1", "echo 2"))
    assert "RWLock-file" in repro().stderr
    unlock.main()
    assert repro().returncode == 0


def test_a_number_that_another_program_has_by_now_blocks_no_longer(repository):
    held = {"write": {str(repository / "x"): {"pid": 1, "cmd": "dvc repro"}}, "read": {}}
    Path(".dvc/tmp/rwlock").write_text(json.dumps(held))
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("echo 1", "echo 2"))
    assert "is busy" in repro().stderr
    unlock.main()
    assert repro().returncode == 0
