"""One line for a user's mistake, a traceback for ours, and a sensible machine."""

import os

import pytest

from stages import runtime
from stages.params import Runtime, load_params


def test_a_users_mistake_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: params.yaml: not found"):
        runtime.run(load_params)


def test_any_other_error_keeps_its_traceback():
    def ours():
        raise ValueError("a bug in another file")

    with pytest.raises(ValueError, match="a bug"):
        runtime.run(ours)


def test_a_gpu_that_is_not_there_is_named():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="runtime.device: cuda"):
        runtime.prepare_torch(Runtime(device="cuda", threads=1, processes=1, cuda_graphs=True))
    assert (
        runtime.prepare_torch(Runtime(device="auto", threads=1, processes=1, cuda_graphs=True)).type == "cpu"
        and torch.get_num_threads() == 1
    )


def test_free_cores_are_at_least_one_and_bounded(monkeypatch):
    assert 1 <= runtime.free_cores() <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert runtime.free_cores() == 1
