"""Several ranks over gloo, each a real process: the same updates, curves and files as one process, and never a hang."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stages.compute import ranks
from stages.compute.exact_search import ExactSearch
from stages.machine import launching
from stages.machine.signals import Interrupted
from stages.training import trainer
from stages.training.recipes import check_ranks
from tests import ranked
from tests.search.test_passage_vectors import SHARD, encode
from tests.tiny_rag import NEW, OLD

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Nine questions in steps of 8, over the epochs' ends.
THREE_STEPS = {"max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 0.5}
CURVE = ("step", "questions_seen", "train_loss_per_sequence", "train_loss_per_token", "val_loss_per_sequence",
         "val_loss_per_token", "gradient_norm", "prior_entropy", "learning_rate", "gold_nll")  # fmt: skip
SIX_STEPS = {"max_steps": 6, "save_steps": 4, "logging_steps": 3, "eval_steps": 2, "learning_rate": 1e-3}


def start(work, folder, processes, launcher=("-m",), **settings):
    folder.mkdir(exist_ok=True)
    outside = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "DVC_STAGE", "TORCHELASTIC_RUN_ID"}
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable] if launcher == ("-m",) else []
    return subprocess.Popen(
        [*program, *launcher, "tests.ranked", work, str(folder), str(processes), json.dumps(settings)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(process, code=0):
    output, errors = process.communicate()
    assert process.returncode == code, output[-2000:] + errors[-4000:]
    return output, errors


@contextmanager
def one_thread():
    """As many as every rank of these tests has: other numbers of threads add up in other orders."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def alone(folder, **settings):
    """The same training in this process."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as undone, one_thread():
        # Put back after ranked.train has set its own.
        undone.setattr(trainer, "make_optimizer", trainer.make_optimizer)
        ranked.keep(folder, ranked.train(folder, **settings))
    return folder


def assert_same(one, other, number_of_ranks=1):
    weights = load_file(one / "weights-0.safetensors")
    for number in range(number_of_ranks):
        found = load_file(other / f"weights-{number}.safetensors")
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert_same_curve(one, other)


def assert_same_curve(one, other, norm_to=1e-5):
    histories = [
        [
            {name: value for name, value in point.items() if name in CURVE}
            for point in json.loads((folder / "history.json").read_text())
        ]
        for folder in (one, other)
    ]
    assert [point.keys() for point in histories[0]] == [point.keys() for point in histories[1]]
    for expected, found in zip(*histories, strict=True):
        norm, expected_norm = found.pop("gradient_norm", 0), expected.pop("gradient_norm", 0)
        assert norm == pytest.approx(expected_norm, rel=norm_to)
        assert found == pytest.approx(expected, rel=1e-5)


def test_without_a_launcher_there_is_one_rank_and_no_group():
    assert (ranks.world(), ranks.rank(), ranks.is_main()) == (1, 0, True)
    assert ranks.share([3, 1, 2]) == [3, 1, 2] and ranks.least([4, 5]) == [4, 5] and ranks.most(7) == 7
    values = {"a": torch.tensor(1.5), "b": 2}
    assert ranks.summed(values) is values
    ranks.wait()
    assert not launching.launch(1, "auto") and not launching.launch(0, "cpu")


def test_the_old_recipe_is_refused_on_several_ranks():
    check_ranks(OLD, 1)
    check_ranks(NEW, 8)
    for switch, old in (("accumulation", "within_batch"), ("batching", "one_at_a_time")):
        with pytest.raises(ValueError, match=f"{switch}: {old}.*in place of 2"):
            check_ranks(NEW.model_copy(update={switch: old}), 2)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_shards_the_model_in_another_way_or_another_stage_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{variable} is set.*not supported"):
        ranks.refuse_other_schemes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "batch_size", "questions"), [(2, 4, 8), (4, 2, 8), (2, 1, 1)])
def test_however_many_ranks_share_an_update_it_is_the_same(crew, tmp_path, number, batch_size, questions):
    """Also where a rank has no question."""
    cut = {"batch_size": batch_size, "gradient_accumulation_steps": questions // batch_size}
    if number == 2:
        crew.do("train", tmp_path / "ranks", **THREE_STEPS, **cut)
    else:
        done(start("train", tmp_path / "ranks", number, **THREE_STEPS, **cut))
    whole = alone(tmp_path / "alone", **THREE_STEPS, batch_size=questions, gradient_accumulation_steps=1)
    assert_same(whole, tmp_path / "ranks", number)
    first, *_, last = (load_file(tmp_path / "ranks" / f"weights-{rank}.safetensors") for rank in range(number))
    assert all(torch.equal(value, last[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("rounded", [False, True])
def test_a_sharded_search_finds_what_one_index_finds(tmp_path, rounded):
    """Of fp32 vectors that all hold, and of bf16 vectors of which each has its own part."""
    done(start("search", tmp_path, 3, rounded=rounded))
    for rank in (1, 2):
        found = load_file(tmp_path / f"rows-{rank}.safetensors")
        assert len(found) == 2 * rank
        for name, rows in found.items():
            passages, turn = map(int, name.split("-"))
            vectors, questions = ranked.problem(passages)
            vectors = vectors.bfloat16() if rounded else vectors
            expected = ExactSearch(vectors, torch.device("cpu")).search(questions[: 3 * rank + turn], 5)
            assert torch.equal(rows, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "batch_size", "passes"), [("train", 1, 3), ("train", 1, 1), ("oom", 3, 2)])
def test_training_on_a_sharded_search_is_the_same(crew, tmp_path, work, batch_size, passes):
    """With unequally many forward passes, with none, and where a rank begins anew."""
    cut = {"batch_size": batch_size, "gradient_accumulation_steps": passes}
    crew.do(work, tmp_path / "ranks", shards=True, **THREE_STEPS | cut)
    assert_same(alone(tmp_path / "alone", **THREE_STEPS | cut), tmp_path / "ranks", 2)


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_halves_all_and_the_update_stays(crew, tmp_path):
    output = crew.do("oom", tmp_path / "ranks", **THREE_STEPS)
    assert output.count("out of memory at step 1") == 2 and "4 questions a forward pass: 2 from here on" in output
    assert_same(alone(tmp_path / "alone", **THREE_STEPS), tmp_path / "ranks", 2)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"validating": True}, {"shards": True}, {"shards": True, "validating": True}])
def test_a_rank_without_room_for_a_single_question_ends_all_with_the_same_line(tmp_path, settings):
    """Also rank 0, which has room: it would wait for the other, that one for rank 0 to say what is wrong."""
    _, errors = done(start("oom", tmp_path, 2, room=0, **settings, **THREE_STEPS), 1)
    assert errors.count("error: out of memory with a single question; lower lengths.context_tokens") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_by_all(crew, tmp_path):
    crew.do("nan", tmp_path / "ranks", **THREE_STEPS)
    history = json.loads((tmp_path / "ranks/history.json").read_text())
    assert history[-1]["skipped_steps"] == 1
    first, second = (load_file(tmp_path / "ranks" / f"weights-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) and value.isfinite().all() for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("sgd", [True, False], ids=["sgd", "adamw"])
def test_stopped_by_a_signal_to_one_of_two_ranks_and_resumed_on_one(tmp_path, sgd):
    output, errors = done(start("train", tmp_path / "moved", 2, sgd=sgd, stop_at=2, **SIX_STEPS), 128 + signal.SIGTERM)
    assert errors.count("interrupted at step 2 of 6; the same command goes on from there") == 1
    alone(tmp_path / "moved", sgd=sgd, **SIX_STEPS)
    whole = alone(tmp_path / "whole", sgd=sgd, **SIX_STEPS)
    if sgd:
        assert_same(whole, tmp_path / "moved")
    # Adam makes steps of rounding noise where a gradient is zero by symmetry (the keys' biases): weights without effect.
    assert_same_curve(whole, tmp_path / "moved")


@pytest.mark.slow
def test_stopped_on_one_and_resumed_on_two_ranks(crew, tmp_path):
    with pytest.raises(Interrupted):
        alone(tmp_path / "moved", stop_at=2, **SIX_STEPS)
    output = crew.do("train", tmp_path / "moved", **SIX_STEPS)
    assert output.count("resumed at step 2 of 6") == 1
    assert_same(alone(tmp_path / "whole", **SIX_STEPS), tmp_path / "moved", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        (BIN / "torchrun", "--nproc-per-node=2", "-m"),
        (
            BIN / "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
            "-m",
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(tmp_path, launcher):
    done(start("train", tmp_path / "ranks", 1, tuple(map(str, launcher)), **THREE_STEPS))
    assert_same(alone(tmp_path / "alone", **THREE_STEPS), tmp_path / "ranks", 2)


@pytest.mark.slow
def test_two_ranks_encode_the_same_bytes_and_one_goes_on_from_their_lists(crew, tmp_path):
    with one_thread():
        whole = encode(tmp_path / "whole").read_bytes()
    folder = tmp_path / "ranks"
    crew.do("encode", folder)
    assert (folder / "vectors/vectors.npy").read_bytes() == whole
    lists = [json.loads((folder / name).read_text()) for name in ("shards.json", "shards-1.json")]
    assert [sorted(map(int, one)) for one in lists] == [[0, 2 * SHARD, 4 * SHARD], [SHARD, 3 * SHARD]]
    del lists[1][str(SHARD)]
    (folder / "shards-1.json").write_text(json.dumps(lists[1]))
    size = SHARD * 256 * 4
    start_of_shard = len(whole) - 5 * size + size
    (folder / "vectors/vectors.npy").write_bytes(whole[:start_of_shard] + bytes(size) + whole[start_of_shard + size :])
    with one_thread():
        assert encode(folder).read_bytes() == whole
    assert list(folder.glob("shards-*")) == [] and len(json.loads((folder / "shards.json").read_text())) == 5


def until(process, folder, name):
    """Waits for a file or folder of that name (a pattern); returns the ranks' processes."""
    while not list(folder.glob(name)) and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    return psutil.Process(process.pid).children()


# A checkpoint is written beside the steps: that steps are made does not say that there is one.
CHECKPOINT = "checkpoints/step-????????"
FOREVER = {"max_steps": 10**6, "eval_steps": 10**6, "save_steps": 10**6}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_job_at_once_and_it_goes_on_afterwards(tmp_path, killed):
    process = start("train", tmp_path / "ranks", 2, **FOREVER | {"save_steps": 1})
    children = until(process, tmp_path / "ranks", CHECKPOINT)
    victim = next(child for child in children if child.environ()["RANK"] == str(killed))
    victim.kill()
    _, errors = done(process, 128 + signal.SIGKILL)
    assert f"error: rank {killed} of 2 was ended by SIGKILL" in errors.splitlines()[-1]
    assert not any(child.is_running() for child in children)
    step = max(int(name.name[5:]) for name in (tmp_path / "ranks").glob(CHECKPOINT))
    output, _ = done(start("train", tmp_path / "ranks", 2, **FOREVER | {"max_steps": step + 1}))
    assert f"resumed at step {step} of {step + 1}" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_command_ends_all_ranks(tmp_path, number):
    process = start("train", tmp_path / "ranks", 2, **FOREVER)
    children = until(process, tmp_path / "ranks", "running")
    process.send_signal(number)
    _, errors = done(process, -number if number == signal.SIGKILL else 128 + number)
    psutil.wait_procs(children)
    assert list((tmp_path / "ranks/checkpoints").glob("step-*"))
    assert number == signal.SIGKILL or errors.splitlines()[-1].startswith("interrupted at step ")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_users_mistake_is_one_line(tmp_path, rank):
    _, errors = done(start("mistake", tmp_path, 2, rank=rank), 1)
    told = [line for line in errors.splitlines() if "nowhere.yaml" in line]
    assert told == [
        f"error{' on rank 1' if rank else ''}: nowhere.yaml: not found; run from the folder that holds params.yaml"
    ]


def test_a_port_and_an_environment_for_each_rank(monkeypatch):
    started = []
    monkeypatch.setattr(launching.subprocess, "Popen", lambda command, **rest: started.append((command, rest)))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "stages.train"}))
    launching._start(3)
    assert [rest["env"]["RANK"] for _, rest in started] == ["0", "1", "2"]
    assert {rest["env"]["MASTER_ADDR"] for _, rest in started} == {"127.0.0.1"}
    assert all(command[1:3] == ["-m", "stages.train"] and rest["start_new_session"] for command, rest in started)
