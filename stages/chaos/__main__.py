"""Kills the pipeline at random points and holds what comes out against a run that nobody disturbed (not a stage).

    python -m stages.chaos                          # 20 kills; the last line reads `chaos: N/M identical`
    python -m stages.chaos --kills 3 --seed 7       # fewer, others
    python -m stages.chaos --checkpoint-cost        # what a checkpoint costs, for the tiny model and for BART-large

Works in temporary copies of the checkout, on a tiny configuration with one thread: the bits of sums depend on the
number of threads. Compared are the hashes of all outputs, the metrics that are not timings, and MLflow: one run, no
point missing, none twice.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages.machine.entry import run

SMALL = {
    "data.sample.passages": 60, "data.sample.train_questions": 120, "data.sample.validation_questions": 8,
    "data.sample.test_questions": 8, "retriever.steps": 4, "retriever.batch_size": 8, "retriever.n_docs": 2,
    "retriever.hybrid_depth": 25,
    "train.max_steps": 12, "train.batch_size": 2, "train.warmup_steps": 1, "train.logging_steps": 2,
    "train.eval_steps": 3, "train.save_steps": 4, "evaluate.num_beams": 2, "evaluate.batch_size": 4,
    "tracking.system_metrics_seconds": 0, "runtime.threads": 1, "runtime.device": "cpu",
}  # fmt: skip
STAGES = (
    "prepare", "tokens", "positives", "retriever", "lexical", "encode", "index", "reranker", "train", "evaluate", "report",
)  # fmt: skip
OUTS = {
    "prepare": ["data/prepared"], "tokens": ["data/tokens"], "positives": ["data/positives"],
    "retriever": ["data/retriever", "metrics/retriever.json"],
    "lexical": ["data/lexical", "metrics/lexical.json"], "encode": ["data/vectors", "metrics/encode.json"],
    "index": ["data/index", "metrics/index.json"], "reranker": ["data/reranker", "metrics/reranker.json"],
    "train": ["data/model", "metrics/train.json", "data/curves", ".checkpoints", ".tracking", "mlflow.db"],
    "evaluate": ["data/predictions", "metrics/eval.json"], "report": ["data/report"],
}  # fmt: skip
# Parts of the names of numbers that differ from run to run.
TIMINGS = ("second", "search_ms", "host_wait", "mfu", "gpu_")
# Where in a stage: somewhere in its time, while a checkpoint is half written, while DVC takes the outputs.
PLANS = [
    *[("train", "time")] * 6, *[("train", "checkpoint")] * 3, *[("train", "commit")] * 2, ("prepare", "time"),
    ("prepare", "commit"), *[("retriever", "time")] * 2, *[("encode", "time")] * 2, ("index", "commit"),
    ("evaluate", "time"), ("evaluate", "commit"),
]  # fmt: skip
HALF_WRITTEN = ".checkpoints/*/*-*.unfinished"
SIGNALS = ("KILL", "KILL", "KILL", "KILL dvc", "TERM", "INT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--checkpoint-cost", action="store_true", help="measure that instead")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the large checkpoint: weights and optimizer")
    arguments = parser.parse_args()
    if arguments.checkpoint_cost:
        from stages.chaos.checkpoint_cost import report

        return print(report(arguments.gigabytes))
    draw = random.Random(arguments.seed)
    rounds, rest = divmod(arguments.kills, len(PLANS))
    plans = [plan for _ in range(rounds) for plan in draw.sample(PLANS, len(PLANS))] + draw.sample(PLANS, rest)
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        whole = copy_of_checkout(Path(place) / "whole")
        seconds = timed_run(whole)
        expected = results(whole)
        print(f"{len(expected)} things to compare", flush=True)
        same = 0
        for number, (stage, where) in enumerate(plans, start=1):
            folder = Path(place) / "killed"
            how, delay = draw.choice(SIGNALS), draw.random() * seconds[stage]
            hit = None
            while hit is None:  # over before its time came: earlier, then
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(whole, folder, symlinks=True)
                forget(folder, stage)
                hit, delay = killed_run(folder, stage, where, how, delay), delay / 2
            attempts = 1
            while (again := dvc(folder)).returncode and attempts < 4:
                print(again.stdout[-1500:] + again.stderr[-1500:], file=sys.stderr)
                unlock = [sys.executable, "-m", "stages.chaos.unlock"]  # DVC itself was killed inside one of its files
                mended = subprocess.run(unlock, cwd=folder, env=environment(), capture_output=True, text=True).stdout
                hit += f"  ({mended.split(':')[0]}: make unlock)" if mended else ""
                attempts += 1
            wrong = differing(expected, results(folder)) if again.returncode == 0 else ["does not end any more"]
            same += not wrong
            verdict = "identical" if not wrong else "DIFFERS: " + ", ".join(wrong)
            print(f"{number:3}  SIG{how:8}  {stage:9}  {hit}  repeated {attempts} x  {verdict}", flush=True)
    print(f"chaos: {same}/{len(plans)} identical")
    if same < len(plans):
        sys.exit(1)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    who = {f"GIT_{role}_{what}": "chaos@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | who | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}


def copy_of_checkout(folder: Path) -> Path:
    """What git knows or would take, with the tiny parameters, as a repository of its own."""
    import yaml

    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if not name.startswith(("tests/", "metrics/")) and name != "dvc.lock" and Path(name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    for key, value in SMALL.items():
        *sections, last = key.split(".")
        section = params
        for part in sections:
            section = section[part]
        section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "tiny"]):
        subprocess.run(["git", *command], cwd=folder, env=environment(), check=True)
    return folder


def dvc(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["dvc", "repro"], cwd=folder, env=environment(), capture_output=True, text=True)


def start(folder: Path, log: Path) -> subprocess.Popen:
    with open(log, "w", encoding="utf-8") as output:  # a file, because a pipe that nobody reads stops the stage
        return subprocess.Popen(
            ["dvc", "repro"], cwd=folder, env=environment() | {"PYTHONUNBUFFERED": "1"}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def timed_run(folder: Path) -> dict[str, float]:
    """The undisturbed run; seconds of each stage, DVC's own work included."""
    log = folder.with_suffix(".log")
    process, started = start(folder, log), {}
    while process.poll() is None:
        for stage in STAGES:
            if stage not in started and running(log, stage):
                started[stage] = time.monotonic()
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"error: the undisturbed run failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    order = list(started)
    ends = [started[stage] for stage in order[1:]] + [time.monotonic()]
    seconds = {stage: end - started[stage] for stage, end in zip(order, ends, strict=True)}
    print("undisturbed: " + ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items()), flush=True)
    return seconds


def running(log: Path, stage: str) -> bool:
    return f"Running stage '{stage}'" in log.read_text(encoding="utf-8", errors="replace")


def forget(folder: Path, stage: str) -> None:
    """Puts a finished copy back to where `stage` has not run yet, so that only it and what follows runs."""
    import yaml

    lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))
    for later in STAGES[STAGES.index(stage) :]:
        lock["stages"].pop(later, None)
        for name in OUTS[later]:
            for path in folder.glob(f"{name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)
    shutil.rmtree(folder / "mlartifacts", ignore_errors=True)
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")


def killed_run(folder: Path, stage: str, where: str, how: str, delay: float) -> str | None:
    """Starts the pipeline and ends it in `stage`; returns what was going on then, None if it was over before."""
    log = folder.with_suffix(".log")
    process = start(folder, log)
    wait_for(lambda: running(log, stage), process)
    begun = time.monotonic()
    if where == "time":
        wait_for(lambda: time.monotonic() - begun > delay, process)
    elif where == "checkpoint":
        nth = 1 + int(delay * 1000) % 4  # not always the first one
        seen: set[str] = set()
        wait_for(lambda: len(seen.update(map(str, folder.glob(HALF_WRITTEN))) or seen) >= nth, process)
    else:
        wait_for(lambda: len(family(process.pid)) > 1, process)
        wait_for(lambda: len(family(process.pid)) == 1, process)
        time.sleep(delay % 0.2)
    half_written = [path.name for path in folder.glob(HALF_WRITTEN)]
    going_on = f"{where} {time.monotonic() - begun:5.1f} s" + (f", {half_written[0]}" if half_written else "")
    if process.poll() is not None:
        return None
    if how == "KILL dvc":  # the stage is left behind alone, and must see that
        process.kill()
    else:
        os.killpg(process.pid, getattr(signal, f"SIG{how}"))
    process.wait()
    return f"{going_on:40}"


def wait_for(condition, process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def family(process: int) -> list:
    import psutil

    try:
        parent = psutil.Process(process)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [None]


def is_timing(name: str) -> bool:
    return any(part in name for part in TIMINGS)


def results(folder: Path) -> dict[str, str]:
    """What must come out alike, by name: hashes of files, numbers as text."""
    found = {}
    for out in (
        "data/prepared",
        "data/tokens",
        "data/lexical",
        "data/retriever",
        "data/vectors",
        "data/index",
        "data/model",
        "data/predictions",
    ):
        for file in sorted((folder / out).rglob("*")):
            if file.is_file() and file.name != "run.json":
                content = file.read_bytes()
                if file.name == "manifest.json":
                    recorded = {name: facts for name, facts in json.loads(content).items() if name != "run.json"}
                    content = json.dumps(recorded, sort_keys=True).encode()
                found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    for file in sorted(folder.glob("metrics/*.json")):
        for name, value in json.loads(file.read_text(encoding="utf-8")).items():
            if not is_timing(name):
                found[f"{file.name} {name}"] = repr(value)
    for file in sorted((folder / "data/curves").glob("*.tsv")):
        if not is_timing(file.stem):
            found[f"curves {file.stem}"] = file.read_text(encoding="utf-8")
    return found | tracked(folder)


def tracked(folder: Path) -> dict[str, str]:
    store = sqlite3.connect(folder / "mlflow.db")
    found = {
        f"mlflow: run {number}": status for number, (status,) in enumerate(store.execute("select status from runs"))
    }
    points = store.execute("select key, step, value from metrics where key not like 'test_%' order by key, step")
    curves: dict[str, list] = {}
    for key, step, value in points:
        if not is_timing(key):
            curves.setdefault(f"mlflow: {key}", []).append((step, value))
    store.close()
    return found | {key: repr(points) for key, points in curves.items()}


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return names[:5] + ([f"and {len(names) - 5} more"] if len(names) > 5 else [])


if __name__ == "__main__":
    run(main)
