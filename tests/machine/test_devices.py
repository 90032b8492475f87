"""A sensible machine: the device that was asked for, and the free cores."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.machine import devices
from stages.settings.runs import Runtime


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


def test_what_the_libraries_make_is_searched_for_garbage_no_more_and_all_else_is():
    program = "; ".join([
        "import gc; from stages.machine import devices; devices.import_libraries()",
        "import transformers; first = gc.get_freeze_count()",
        "devices.import_libraries()",  # a second time nothing is frozen
        "print(gc.isenabled(), first > 100_000, gc.get_freeze_count() <= first)",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


def test_numbers_too_small_for_fp32s_exponent_are_zero_on_every_thread():
    program = "; ".join([
        "from stages.machine import devices; from stages.settings.runs import Runtime",
        "devices.prepare_torch(Runtime(device='cpu', threads=4, processes=1, cuda_graphs=True))",
        "import torch; tiny = torch.tensor([1e-39] * (1 << 20))",
        "print(torch.get_num_threads(), int((tiny * 1.0).count_nonzero()), float(torch.tensor(2e-38) * 1.0) > 0)",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "0", "True"]


def test_free_cores_are_at_least_one_and_bounded(monkeypatch):
    assert 1 <= devices.free_cores() <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert devices.free_cores() == 1


@pytest.mark.parametrize(
    ("busy", "own", "others"),
    [
        ([95.0, 10.0], 0.9, [5.0, 10.0]),  # ours alone
        ([50.0, 48.0], 0.9, [0.0, 8.0]),  # ours, now on one core and now on the other
        ([100.0, 97.0], 1.0, [0.0, 97.0]),  # ours and another
        ([100.0, 100.0], 2.0, [0.0, 0.0]),  # our two threads
        ([3.0, 2.0], 0.0, [3.0, 2.0]),
    ],
)
def test_what_this_process_does_meanwhile_makes_no_core_busy(monkeypatch, busy, own, others):
    """`own`: seconds of computing in the one second watched."""
    monkeypatch.setattr("psutil.cpu_percent", lambda percpu: list(busy))
    load = devices.Load()
    monkeypatch.setattr(devices, "time", SimpleNamespace(
        sleep=lambda seconds: None, perf_counter=lambda: load.started + 1, process_time=lambda: load.own + own,
    ))  # fmt: skip
    assert load.of_others() == pytest.approx(others)
    monkeypatch.setattr(devices, "allowed_cores", lambda: [0, 1])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert devices.free_cores(load) == max(1, sum(share < 60 for share in others))


@pytest.mark.parametrize(("asked", "most"), [("1,4", 1), ("2, 1", 2), (" 1 ", 1), ("", None)])
def test_the_first_level_of_nesting_counts(monkeypatch, asked, most):
    monkeypatch.setattr(
        devices, "allowed_cores", lambda: list(range(64, 128))
    )  # of which nobody says that they are busy
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert devices.free_cores() == (most or 64)


@pytest.mark.parametrize("asked", ["four", "-1", "0", "1.5"])
def test_what_is_no_number_of_threads_is_one_line(monkeypatch, asked):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    with pytest.raises(ValueError, match=f"OMP_NUM_THREADS: {asked} is no number of threads"):
        devices.free_cores()


def test_without_affinity_all_cores_are_allowed(monkeypatch):
    """As on macOS; nothing but `allowed_cores` asks for it."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert devices.allowed_cores() == list(range(os.cpu_count() or 1)) and devices.free_cores() >= 1
    users = [
        file.name for file in Path("stages").rglob("*.py") if "sched_getaffinity" in file.read_text(encoding="utf-8")
    ]
    assert users == ["devices.py"]
