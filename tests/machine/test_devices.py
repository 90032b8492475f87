"""A sensible machine: the device that was asked for, and the free cores."""

import os

import pytest

from stages.machine import devices
from stages.params import Runtime


def test_a_gpu_that_is_not_there_is_named():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="runtime.device: cuda"):
        devices.prepare_torch(Runtime(device="cuda", threads=1, processes=1, cuda_graphs=True))
    assert (
        devices.prepare_torch(Runtime(device="auto", threads=1, processes=1, cuda_graphs=True)).type == "cpu"
        and torch.get_num_threads() == 1
    )


def test_free_cores_are_at_least_one_and_bounded(monkeypatch):
    assert 1 <= devices.free_cores() <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert devices.free_cores() == 1
