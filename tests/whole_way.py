"""The whole pipeline in this process, from question and passage files to the report, with tiny parameters."""

import importlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import yaml

from stages.machine.entry import run
from tests.test_pipeline import merged

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    "inputs", "prepare", "tokens", "positives", "retriever", "lexical", "encode", "index", "reranker", "train", "evaluate",
    "report",
)  # fmt: skip
TINY = {
    "retriever": {"steps": 4, "batch_size": 4, "n_docs": 2, "hybrid_depth": 6},
    "train": {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "logging_steps": 2, "eval_steps": 2, "save_steps": 4},
    "evaluate": {"num_beams": 2},
    "tracking": {"system_metrics_seconds": 0},
    "runtime": {"threads": 1, "device": "cpu"},
}


def whole_way(rows: dict[str, list[dict]], **changes: dict) -> tuple[dict[str, float], list[dict]]:
    """Writes passages, train, validation and test rows into the current folder and runs every stage on them.

    Returns metrics/eval.json and the rows of the predictions.
    """
    for name, some in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    values = merged(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")), TINY)
    values = merged(values, {"data": {"source": "files", "files": {name: f"{name}.jsonl" for name in rows}}})
    Path("data").mkdir()
    Path("data/tiny").symlink_to(ROOT / "data/tiny")
    Path("params.yaml").write_text(yaml.safe_dump(merged(values, changes)), encoding="utf-8")
    for stage in STAGES:
        with patch.object(sys, "argv", [stage]):
            run(importlib.import_module(f"stages.{stage}").main)
    predictions = Path("data/predictions/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(Path("metrics/eval.json").read_text()), list(map(json.loads, predictions))
