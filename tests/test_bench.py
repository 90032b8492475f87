"""The benchmarks run, small, and report what they ran: numbers that hang together, none of them a time that must be met."""

import json
import subprocess
import sys

import pytest
import torch

from stages import measuring
from stages.bench import parser

CPU = torch.device("cpu")
SMALL = ["--shapes", "tiny", "--passages", "300", "--device", "cpu", "--batch", "2x2", "--steps", "1", "--runs", "2"]


def options(*arguments):
    return parser().parse_args([arguments[0], *SMALL, *arguments[1:]])


def test_training_beside_transformers():
    found = measuring.bench_train(options("train", "--against", "transformers"), CPU)
    ours, theirs = found["ours"]["seconds_per_step"], found["transformers"]["seconds_per_step"]
    assert 0 < ours["best"] <= ours["median"] <= ours["worst"]
    assert found["times_as_fast"] == theirs["median"] / ours["median"]
    # Random weights know nothing: 8,192 words, about six tokens an answer.
    assert 30 < found["ours"]["train_loss_per_sequence"] < 90 and 0 < found["ours"]["mfu"] < 1


def test_the_old_recipe_trains_one_question_a_pass():
    found = measuring.bench_train(options("train", "--recipe", "old"), CPU)
    assert found["recipe"] == "old" and found["ours"]["questions_per_second"] > 0


def test_decoder_only_generators_have_no_counterpart():
    with pytest.raises(ValueError, match="no decoder-only generator"):
        measuring.bench_train(
            options("train", "--shapes", "smollm2", "--batch", "1x1", "--against", "transformers"), CPU
        )


def test_encoding_and_searching():
    found = measuring.bench_index(options("index", "--batch-tokens", "1024"), CPU)
    assert found["passages"] == 300 and found["passages_per_second"] > 0
    found = measuring.bench_search(options("search"), CPU)
    assert found["questions"] == 2 and 0 < found["milliseconds"]["best"] <= found["milliseconds"]["worst"]


def test_decoding_beside_transformers():
    arguments = ("--questions", "4", "--num-beams", "2", "--answer-tokens", "4", "--against", "transformers")
    found = measuring.bench_decode(options("decode", *arguments), CPU)
    ratio = found["questions_per_second"] / found["transformers"]["questions_per_second"]
    assert found["times_as_fast"] == pytest.approx(ratio)


@pytest.mark.slow
def test_the_real_stages_at_two_sizes(tmp_path):
    out = tmp_path / "scale.json"
    arguments = ["scale", "--passages", "300", "600", "--device", "cpu", "--threads", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "stages.bench", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))["by_passages"]
    assert list(found) == ["300", "600"]
    assert all(one["index_seconds"] > 0 and 0 < one["index_peak_gib"] < 8 for one in found.values())
