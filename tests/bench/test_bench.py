"""The benchmarks run, small, and report what they ran: numbers that hang together, none of them a time that must be met."""

import json
import subprocess
import sys
from pathlib import Path

import faiss
import pytest
import torch

from stages.bench import faiss_engines, measuring, scaling, scaling_curve
from stages.bench.__main__ import parser
from stages.bench.profiling import covered
from stages.rag.together import joint_contexts

CPU = torch.device("cpu")
SMALL = ["--shapes", "tiny", "--passages", "300", "--device", "cpu", "--batch", "2x2", "--steps", "1", "--runs", "2",
         "--n-docs", "2"]  # fmt: skip


def options(*arguments):
    return parser().parse_args([arguments[0], *SMALL, *arguments[1:]])


@pytest.mark.slow
def test_training_beside_transformers():
    found = measuring.bench_train(options("train", "--against", "transformers"), CPU)
    ours, theirs = found["ours"]["seconds_per_step"], found["transformers"]["seconds_per_step"]
    assert 0 < ours["best"] <= ours["median"] <= ours["worst"]
    assert found["times_as_fast"] == theirs["median"] / ours["median"]
    # Random weights know nothing: 8,192 words, about six tokens an answer.
    assert 30 < found["ours"]["train_loss_per_sequence"] < 90
    assert "mfu" not in found["ours"]  # of a CPU nobody knows what it could do


def test_the_old_recipe_trains_one_question_a_pass():
    found = measuring.bench_train(options("train", "--recipe", "old"), CPU)
    assert found["recipe"] == "old" and found["ours"]["questions_per_second"] > 0


def test_passages_read_together_train_and_have_no_counterpart():
    found = measuring.bench_train(options("train", "--reading", "together", "--n-docs", "3"), CPU)
    assert (found["reading"], found["n_docs"]) == ("together", 3)
    assert 30 < found["ours"]["train_loss_per_sequence"] < 90
    for more, says in ((("--against", "transformers"), "read each passage"), (("--recipe", "old"), "old recipe")):
        with pytest.raises(ValueError, match=says):
            measuring.bench_train(options("train", "--reading", "together", *more), CPU)


def test_passages_read_in_parallel_train_by_a_decoder_only_generator_alone():
    arguments = ("train", "--reading", "parallel")
    found = measuring.bench_train(options(*arguments, "--shapes", "tiny-llama", "--n-docs", "7"), CPU)
    assert (found["reading"], found["n_docs"]) == ("parallel", 7)
    assert 30 < found["ours"]["train_loss_per_sequence"] < 90
    with pytest.raises(ValueError, match="reading: parallel is of decoder-only generators"):
        measuring.bench_train(options(*arguments), CPU)


@pytest.mark.parametrize("shapes", ["tiny", "tiny-llama"])
def test_passages_that_the_prior_weighs_train(shapes):
    found = measuring.bench_train(options("train", "--reading", "weighted", "--shapes", shapes, "--n-docs", "3"), CPU)
    assert found["reading"] == "weighted" and 30 < found["ours"]["train_loss_per_sequence"] < 90


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


@pytest.mark.parametrize(
    ("shapes", "reading"),
    [
        *((shapes, way) for shapes in ("tiny", "tiny-llama") for way in ("each", "together")),
        *((shapes, "weighted") for shapes in ("tiny", "tiny-llama")),
        ("tiny-llama", "parallel"),
    ],
)
def test_decoding_with_either_family_and_way_of_reading(shapes, reading, monkeypatch):
    ways = []

    def joined(*given, **options):
        ways.append(shapes)
        return joint_contexts(*given, **options)

    monkeypatch.setattr(measuring, "joint_contexts", joined)
    arguments = (
        "--shapes",
        shapes,
        "--reading",
        reading,
        "--questions",
        "2",
        "--num-beams",
        "2",
        "--answer-tokens",
        "3",
    )
    assert measuring.bench_decode(options("decode", *arguments), CPU)["questions_per_second"] > 0
    assert bool(ways) == (reading != "each")


@pytest.mark.slow
def test_the_real_stages_at_two_sizes(tmp_path):
    out = tmp_path / "scale.json"
    arguments = ["scale", "--passages", "300", "600", "--device", "cpu", "--threads", "1", "--out", str(out)]
    bench(*arguments)
    found = json.loads(out.read_text(encoding="utf-8"))["by_passages"]
    assert list(found) == ["300", "600"]
    assert all(one["index_seconds"] > 0 and 0 < one["index_peak_gib"] < 8 for one in found.values())


@pytest.mark.slow
def test_a_profile_names_the_costliest_operators(tmp_path):
    file = tmp_path / "profile.txt"
    measuring.bench_train(options("train", "--batch", "1x1", "--runs", "1", "--profile", str(file)), CPU)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("3 steps") and int(lines[1].split()[0]) > 100
    assert any(line.split()[:1] == ["aten::mm"] for line in lines)
    assert covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4


def test_faiss_without_a_gpu_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--engine faiss-gpu: faiss .* finds no GPU here"):
        measuring.bench_search(options("search", "--engine", "faiss-gpu"), CPU)


def test_engines_are_compared_by_rows_and_scores(monkeypatch):
    """With copies on the CPU in place of those on a GPU: the same figures, from the same results."""
    monkeypatch.setattr(faiss_engines, "check_faiss_gpu", lambda device: None)
    monkeypatch.setattr(faiss_engines, "on_gpu", lambda index, device: faiss.clone_index(index))
    monkeypatch.setattr(faiss_engines, "FACTORIES", ("Flat", "IVF8,Flat"))
    monkeypatch.setattr(faiss_engines, "NPROBE", 2)
    found = measuring.bench_search(options("search", "--engine", "faiss-gpu"), CPU)["by_index"]
    assert list(found) == ["Flat", "IVF8,Flat"]
    assert all(one[name]["same_as_cpu"] == 1 for one in found.values() for name in ("cpu", "moved", "built_there"))
    assert all(one["among_exact"] == 1 for one in found["Flat"].values())
    assert all(0 < one["among_exact"] < 1 for one in found["IVF8,Flat"].values())


def test_rows_that_score_the_same_are_the_same_result():
    vectors, questions = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.5, 0]]), torch.tensor([[1.0, 0]])
    expected = torch.tensor([[0, 1, 3]])
    assert faiss_engines.same_rows(torch.tensor([[1, 0, 3]]), expected, questions, vectors) == 1
    assert faiss_engines.same_rows(torch.tensor([[1, 0, 2]]), expected, questions, vectors) == pytest.approx(2 / 3)
    assert faiss_engines.same_rows(torch.tensor([[1, 0, -1]]), expected, questions, vectors) == pytest.approx(2 / 3)
    assert faiss_engines.overlap(torch.tensor([[3, 2, 1]]), torch.tensor([[0, 1, 3]])) == pytest.approx(2 / 3)
    assert faiss_engines.overlap(torch.tensor([[3, -1]]), torch.tensor([[3, -1]])) == 1


def test_random_vectors_are_the_same_whoever_holds_them(monkeypatch):
    monkeypatch.setattr(scaling, "ROWS_A_BLOCK", 8)
    whole = scaling.random_vectors(range(0, 30), 4, CPU)
    assert len(whole.unique(dim=0)) == 30
    for rows in (range(0, 15), range(15, 30), range(7, 9), range(8, 16)):
        assert torch.equal(scaling.random_vectors(rows, 4, CPU), whole[rows.start : rows.stop])


SCALING = ["--shapes", "tiny", "--passages", "80", "--device", "cpu", "--threads", "1", "--n-docs", "2", "--steps", "1",
           "--runs", "1", "--training-steps", "3", "--search-passages", "500", "--batch-tokens", "2048"]  # fmt: skip


@pytest.mark.slow
def test_scaling_over_two_processes(tmp_path):
    out, plot = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    arguments = ["scaling", *SCALING, "--processes", "1", "2", "--batches", "4", "8"]
    bench(*arguments, "--out", str(out), "--plot", str(plot))
    found = json.loads(out.read_text(encoding="utf-8"))
    one, two = found["by_processes"]["1"], found["by_processes"]["2"]
    assert (one["processes"], two["processes"]) == (1, 2)
    for batch in ("4", "8"):
        for size in (one, two):
            figures = size["training"]["by_batch"][batch]
            assert figures["questions_per_second"] == pytest.approx(int(batch) / figures["seconds_per_step"]["median"])
        assert one["training"]["by_batch"][batch]["communication_share"] == 0
        figures = two["training"]["by_batch"][batch]
        waited = max(0, two["training"]["communication"]["seconds_waited"]["median"])
        assert figures["communication_share"] == pytest.approx(waited / figures["seconds_per_step"]["median"])
    sums = [size["training"]["communication"] for size in (one, two)]
    assert sums[0]["gradient_gib"] == sums[1]["gradient_gib"] > 0 and sums[0]["seconds_per_sum"]["worst"] == 0
    assert sums[1]["seconds_per_sum"]["best"] > 0
    # Without dropout the same update, however many share it.
    losses = [size["training"]["validation_loss"] for size in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0]["after"] < losses[0]["before"]
    assert found["same_rows_found"] and set(found["speed_up"]) == {
        "training_4", "training_8", "encoding", "search_500"
    }  # fmt: skip
    assert all(part["1"] == 1 and part["2"] > 0 for part in found["speed_up"].values())
    ratio = two["encoding"]["passages_per_second"] / one["encoding"]["passages_per_second"]
    assert found["speed_up"]["encoding"]["2"] == pytest.approx(ratio)
    assert "<svg" in plot.read_text(encoding="utf-8") and not Path(".checkpoints/scaling").exists()


@pytest.mark.slow
def test_a_size_that_fails_ends_the_call_with_its_message():
    done = bench("scaling", *SCALING, "--processes", "2", "3", "--batches", "1", "2", code=1)
    told = [line for line in done.stderr.splitlines() if "--batches" in line]
    assert told == ["error: --batches: at least 2 (processes), and a multiple of that; not 1 2"]


def test_only_a_curve_can_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        scaling_curve.earlier(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no scaling curve"):
        scaling_curve.earlier(tmp_path / "other.json")
    with pytest.raises(ValueError, match="at least 1"):
        scaling_curve.sizes(options("scaling", "--processes", "0", "2"))
    assert scaling_curve.sizes(options("scaling")) == [1]


def bench(*arguments, code=0):
    done = subprocess.run([sys.executable, "-m", "stages.bench", *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    return done
