"""What the real stages cost over synthetic passages: seconds and peak memory, each stage in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import yaml


def bench_scale(options: Namespace, device: torch.device) -> dict:
    """Seconds and peak memory of the real stages up to the index over synthetic passages.

    Seconds of the processors are told beside those of the clock: they hold beside other work too.
    """
    results = {}
    for count in options.passages:
        with tempfile.TemporaryDirectory() as folder:
            results[str(count)] = scale_of(Path(folder), count, options)
        print(f"{count} passages: {results[str(count)]}", file=sys.stderr)
    return {"by_passages": results}


def scale_of(folder: Path, count: int, options: Namespace) -> dict:
    root = Path(__file__).resolve().parents[2]
    folder.joinpath("data").mkdir()
    shutil.copytree(root / "data/tiny", folder / "data/tiny")
    random = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + letter) for letter in row) for row in random.integers(0, 26, (5000, 6))])
    with open(folder / "passages.jsonl", "w", encoding="utf-8") as file:
        for row in range(count):
            text = " ".join(words[random.integers(0, len(words), 60)])
            file.write(json.dumps({"id": str(row), "title": f"Passage {row}", "text": text}) + "\n")
    for split in ("train", "validation", "test"):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for row in range(64):
                question = {"question": f"What does {split} find in passage {row}?", "answers": [str(words[row])]}
                file.write(json.dumps(question) + "\n")
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    params["data"] |= {"source": "files"}
    params["data"]["files"] |= {name: f"{name}.jsonl" for name in ("passages", "train", "validation", "test")}
    params["retriever"]["steps"] = 0
    params["runtime"] |= {"device": options.device, "threads": options.threads}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    results = {"index_bytes_per_passage": 0.0}
    for stage in ("prepare", "tokens", "positives", "retriever", "encode", "index"):
        results |= resources_of(stage, folder, root, count)
    results["index_bytes_per_passage"] = (folder / "data/index/index.faiss").stat().st_size / count
    return results


def resources_of(stage: str, folder: Path, root: Path, count: int) -> dict:
    """Seconds of a stage in a process of its own, by the clock and of its processors, and its peak resident memory."""
    code = (
        "import resource, runpy, sys; sys.argv = [sys.argv[1]]; runpy.run_module(sys.argv[0], run_name='__main__');"
        "used = resource.getrusage(resource.RUSAGE_SELF);"
        "print('used', used.ru_maxrss, used.ru_utime + used.ru_stime)"
    )
    started = time.perf_counter()
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, f"stages.{stage}"], cwd=folder, env=os.environ | {"PYTHONPATH": paths}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ValueError(f"python -m stages.{stage} failed over {count} passages; its message is above")
    kilobytes, processor_seconds = map(float, done.stdout.rsplit("used ", 1)[1].split())
    return {
        f"{stage}_seconds": seconds,
        f"{stage}_processor_seconds": processor_seconds,
        f"{stage}_peak_gib": kilobytes / 2**20,
    }
