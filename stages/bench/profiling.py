"""Where the time of a training step goes: the costliest kernels, how many are launched, how much the device is busy."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from stages.training.throughput import synchronize

PROFILED_STEPS = 3
ROWS = 25
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # and their variants, by prefix


def profile_steps(train: Callable[[Callable[[dict], None]], None], device: torch.device) -> str:
    """A text of the steps PROFILED_STEPS + 1 to 2 x PROFILED_STEPS of `train`.

    `train` runs more steps than these and calls what it is given with a point {"step": ...} behind every
    PROFILED_STEPS of them. The profiler slows the host: seconds and the busy share are those under it, while the
    kernels' own times and their number are true.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    profiler = profile(activities=activities)
    times: list[float] = []

    def on_point(point: dict) -> None:
        if point["step"] == PROFILED_STEPS:
            synchronize(device)
            profiler.start()
            times.append(time.perf_counter())
        elif point["step"] == 2 * PROFILED_STEPS:
            synchronize(device)
            times.append(time.perf_counter())
            profiler.stop()

    train(on_point)
    return described(profiler, times[1] - times[0], on_gpu)


def described(profiler: profile, seconds: float, on_gpu: bool) -> str:
    """The figures of PROFILED_STEPS steps that took `seconds`, and the table of the costliest by their own time."""
    averages = profiler.key_averages()
    lines = [f"{PROFILED_STEPS} steps, {seconds / PROFILED_STEPS:.4f} s each under the profiler"]
    if on_gpu:
        launched = sum(row.count for row in averages if row.key.startswith(LAUNCHES)) / PROFILED_STEPS
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            # An annotation's span on the device is no work of its own.
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        lines.append(f"{launched:.0f} kernel launches a step")
        lines.append(f"device busy {covered(spans) / 1e6 / seconds:.1%} of the time")
    else:
        called = sum(row.count for row in averages if row.key.startswith("aten::")) / PROFILED_STEPS
        lines.append(f"{called:.0f} calls of operators a step")
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=70) + "\n"


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans: kernels of several streams run at the same time."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
