"""The scaling curve: one call of the benchmark a number of GPUs, put together, as speed-ups and as a plot.

Nothing heavy is imported before it is needed: this process only waits.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from stages.machine import launching

SIZES = (1, 2, 4, 8)


def sizes(options: Namespace) -> list[int]:
    """Numbers of processes to measure: those asked for, else one, two, four and eight as far as there are GPUs.

    Raises ValueError for a number below one.
    """
    if any(size < 1 for size in options.processes):
        raise ValueError("--processes: numbers of at least 1")
    if options.processes:
        return sorted(set(options.processes))
    gpus = launching.gpus() if options.device != "cpu" else 0
    return [size for size in SIZES if size <= max(1, gpus)]


def earlier(file: Path) -> dict:
    """What an earlier call wrote with --out. Raises ValueError where it is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--measured {file}: cannot be read ({error})") from None
    if "by_processes" not in found:
        raise ValueError(f"--measured {file}: holds no scaling curve; give what `bench scaling --out` wrote")
    return found


def check_can_draw() -> None:
    """Raises ValueError where matplotlib is missing: known before minutes of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is missing; measure with --out and draw elsewhere with --measured")


def curve(options: Namespace) -> Iterator[dict]:
    """The figures of all sizes so far, whenever another size is measured.

    Each is this very command with one number of processes. Ends with the exit code of one that fails, whose message is
    on stderr.
    """
    found: dict[str, dict] = {}
    for size in sizes(options):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "size.json"
            command = [
                sys.executable,
                "-m",
                "stages.bench",
                *sys.argv[1:],
                "--processes",
                str(size),
                "--out",
                str(file),
            ]
            done = subprocess.run(command, env=os.environ | {launching.STARTED_HERE: "1"}, stdout=sys.stderr)
            if done.returncode:
                sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
            one = json.loads(file.read_text(encoding="utf-8"))
        found[str(size)] = {name: one.pop(name) for name in ("processes", "training", "encoding", "search", "seconds")}
        yield one | {"by_processes": found, "speed_up": speed_ups(found), "same_rows_found": same_rows(found)}


def speed_ups(found: dict[str, dict]) -> dict[str, dict[str, float]]:
    """How many times as fast as one process each number of processes was, by part; empty without a figure of one."""
    if "1" not in found:
        return {}
    rates = {size: rates_of(one) for size, one in found.items()}
    return {
        part: {size: rates[size][part] / rate for size in found if part in rates[size]}
        for part, rate in rates["1"].items()
    }


def rates_of(one: dict) -> dict[str, float]:
    """What a size does a second, by part."""
    rates = {
        f"training_{batch}": figures["questions_per_second"] for batch, figures in one["training"]["by_batch"].items()
    }
    rates["encoding"] = one["encoding"]["passages_per_second"]
    for count, figures in one["search"].items():
        if figures["milliseconds"]:
            rates[f"search_{count}"] = 1000 / figures["milliseconds"]["median"]
    return rates


def same_rows(found: dict[str, dict]) -> bool:
    """Whether every size found the same rows, wherever it could search."""
    counts = {count for one in found.values() for count in one["search"]}
    rows = [
        {tuple(one["search"][count]["rows_of_one_question"] or ()) for one in found.values()} - {()} for count in counts
    ]
    return all(len(different) <= 1 for different in rows)


def draw(results: dict, path: Path) -> None:
    """Speed-up of training and encoding over the number of GPUs, beside the ideal."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    counts = [int(size) for size in results["by_processes"]]
    axes.plot(counts, counts, "--", color="#999999", label="ideal")
    for part, values in results["speed_up"].items():
        if not part.startswith("search"):
            kind, _, batch = part.partition("_")
            label = f"{kind}, {batch} questions a step" if batch else kind
            axes.plot([int(size) for size in values], list(values.values()), "o-", label=label)
    axes.set(xlabel="processes, one a GPU", ylabel="times as fast as one", xticks=counts)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "rag-recipes"}):  # the same figures, the same bytes
        figure.savefig(path, metadata={"Date": None})
