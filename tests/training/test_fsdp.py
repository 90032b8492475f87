"""FSDP2 over gloo, two real processes that hold half of the models each: the same updates, curves and checkpoints."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from stages.compute import ranks
from stages.machine.signals import Interrupted
from stages.storage.checkpoints import load_weights, own_weights
from stages.training import fsdp
from tests.compute.test_ranks import (
    BIN,
    CHECKPOINT,
    FOREVER,
    SIX_STEPS,
    THREE_STEPS,
    alone,
    assert_same_curve,
    done,
    start,
    until,
)
from tests.tiny_rag import tiny_rag

# Without clipping, so that a wrong gradient is not scaled away.
UNCLIPPED = THREE_STEPS | {"max_grad_norm": 1e9}


@pytest.fixture
def asked_for(monkeypatch):
    """What `accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2` sets."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return monkeypatch


def test_accelerates_configuration_is_taken_over(asked_for):
    asked_for.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BartEncoderLayer, BartDecoderLayer")
    asked_for.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert fsdp.asked() == fsdp.Sharding(("BartEncoderLayer", "BartDecoderLayer"), False)
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"  # accelerate itself leaves the model alone
    ranks.refuse_other_schemes()


def test_without_it_or_with_one_process_nothing_is_sharded(asked_for):
    asked_for.setenv("WORLD_SIZE", "1")
    assert fsdp.asked() is None
    asked_for.setenv("WORLD_SIZE", "2")
    asked_for.setenv("ACCELERATE_USE_FSDP", "false")
    assert fsdp.asked() is None
    rag = tiny_rag()
    assert not fsdp.is_sharded(rag) and fsdp.missing_passes(rag, 3) == 0
    fsdp.make_whole(rag)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("FSDP_VERSION", "1", "give --fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "train.gradient_checkpointing"),
        ("FSDP_IGNORED_MODULES", "lm_head", "launch without it"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_what_is_not_honoured_is_refused_in_one_line(asked_for, variable, value, told):
    asked_for.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable}.*{told}") as caught:
        fsdp.asked()
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_sharded_are_refused_in_one_line():
    rag, cpu = tiny_rag(), torch.device("cpu")
    with pytest.raises(ValueError, match="precision: fp16 does not work with FSDP"):
        fsdp.shard(rag, fsdp.Sharding(), cpu, "fp16")
    with pytest.raises(ValueError, match="FSDP_TRANSFORMER_CLS_TO_WRAP: the models have no layers of class LlamaLayer"):
        fsdp.shard(rag, fsdp.Sharding(("BartEncoderLayer", "LlamaLayer")), cpu, "no")
    rag.generator_model.model.decoder.layerdrop = 0.1
    with pytest.raises(ValueError, match="layerdrop"):
        fsdp.shard(rag, fsdp.Sharding(), cpu, "no")


def test_out_of_memory_is_no_users_mistake_without_sharding():
    with pytest.raises(torch.OutOfMemoryError), fsdp.memory_errors(tiny_rag()):
        raise torch.OutOfMemoryError("says the test")


def test_tied_weights_come_back_into_a_model_that_has_others():
    rag, other = tiny_rag(seed=0), tiny_rag(seed=1)
    load_weights(other, own_weights(rag))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in rag.state_dict().items())
    assert other.generator_model.lm_head.weight is other.generator_model.get_input_embeddings().weight


def sharded(crew, folder, **settings):
    crew.do("train", folder, fsdp=True, **settings)
    return folder


def assert_equal(whole, found):
    weights, other = (load_file(folder / "weights-0.safetensors") for folder in (whole, found))
    assert weights.keys() == other.keys()
    for name, value in weights.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    # torch's norm of a large tensor on a CPU is right to four digits; of halves it is another one.
    assert_same_curve(whole, found, norm_to=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("generator", "questions"), [("bart", 8), ("bart", 3), ("t5", 1), ("llama", 8), ("llama", 3)])
def test_two_ranks_hold_half_each_and_make_the_update_of_one_process(crew, tmp_path, generator, questions):
    """Of 3 questions the second rank goes through one pass for nothing, of 1 through all."""
    cut = {} if questions == 8 else {"batch_size": 1, "gradient_accumulation_steps": questions}
    found = sharded(crew, tmp_path / "ranks", generator=generator, **UNCLIPPED, **cut)
    for rank in (0, 1):
        assert json.loads((found / f"share-{rank}.json").read_text()) == pytest.approx(0.5, abs=0.01)
    assert_equal(alone(tmp_path / "alone", generator=generator, **UNCLIPPED, **cut), found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"questions": 3, "batch_size": 1, "gradient_accumulation_steps": 3},
        {"generator": "gpt2", "gradient_checkpointing": True},
        {"generator": "llama", "lora": True},
        {"shards": True, "batch_size": 3},
        {"max_grad_norm": 0.5},
    ],
    ids=["three questions", "gradient checkpointing", "lora", "sharded search", "clipped"],
)
def test_so_it_is_with(crew, tmp_path, settings):
    found = sharded(crew, tmp_path / "ranks", **UNCLIPPED | settings)
    whole = alone(tmp_path / "alone", **UNCLIPPED | settings | {"shards": False})
    assert_equal(whole, found)


@pytest.mark.slow
def test_bf16_weights_travel_in_bf16_and_the_curve_stays_close(tmp_path):
    found = tmp_path / "ranks"
    done(start("train", found, 2, fsdp=True, precision="bf16", **UNCLIPPED))
    whole = tmp_path / "plain"
    done(start("train", whole, 2, precision="bf16", **UNCLIPPED))
    losses = [
        json.loads((folder / "history.json").read_text())[-1]["val_loss_per_sequence"] for folder in (whole, found)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert all(value.dtype != torch.bfloat16 for value in load_file(found / "weights-0.safetensors").values())


@pytest.mark.slow
@pytest.mark.parametrize(("second", "sgd"), [("one process", False), ("two plain ranks", True)])
def test_stopped_with_parts_and_resumed_without(crew, tmp_path, sgd, second):
    folder = tmp_path / "moved"
    _, errors = done(start("train", folder, 2, fsdp=True, sgd=sgd, stop_at=2, **SIX_STEPS), 128 + signal.SIGTERM)
    assert errors.count("interrupted at step 2 of 6; the same command goes on from there") == 1
    if second == "one process":
        alone(folder, sgd=sgd, **SIX_STEPS)
    else:
        assert "resumed at step 2 of 6" in crew.do("train", folder, sgd=sgd, **SIX_STEPS)
    resumed(alone(tmp_path / "whole", sgd=sgd, **SIX_STEPS), folder, sgd)


@pytest.mark.slow
@pytest.mark.parametrize("sgd", [True, False], ids=["sgd", "adamw"])
def test_stopped_on_one_process_and_resumed_with_parts_and_again_once_finished(crew, tmp_path, sgd):
    folder = tmp_path / "moved"
    with pytest.raises(Interrupted):
        alone(folder, sgd=sgd, stop_at=2, **SIX_STEPS)
    output = crew.do("train", folder, fsdp=True, sgd=sgd, **SIX_STEPS)
    assert output.count("resumed at step 2 of 6") == 1
    resumed(alone(tmp_path / "whole", sgd=sgd, **SIX_STEPS), folder, sgd)
    weights = (folder / "weights-0.safetensors").read_bytes()
    output = crew.do("train", folder, fsdp=True, sgd=sgd, **SIX_STEPS)
    assert "trained already, 6 steps" in output and (folder / "weights-0.safetensors").read_bytes() == weights


def resumed(whole, found, sgd):
    if sgd:
        assert_equal(whole, found)
    # Adam makes steps of rounding noise where a gradient is zero by symmetry (the keys' biases): weights without effect.
    assert_same_curve(whole, found, norm_to=1e-4)


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_by_all(crew, tmp_path):
    crew.do("nan", tmp_path, fsdp=True, **UNCLIPPED)
    assert json.loads((tmp_path / "history.json").read_text())[-1]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in load_file(tmp_path / "weights-0.safetensors").values())


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_ends_all_with_a_line_that_says_so(tmp_path):
    _, errors = done(start("oom", tmp_path, 2, fsdp=True, **UNCLIPPED), 1)
    assert "out of memory, and with FSDP no pass is halved; lower train.batch_size" in errors


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_it_goes_on_afterwards(tmp_path):
    process = start("train", tmp_path, 2, fsdp=True, **FOREVER | {"save_steps": 1})
    children = until(process, tmp_path, CHECKPOINT)
    next(child for child in children if child.environ()["RANK"] == "1").kill()
    _, errors = done(process, 128 + signal.SIGKILL)
    assert "error: rank 1 of 2 was ended by SIGKILL" in errors.splitlines()[-1]
    step = max(int(name.name[5:]) for name in tmp_path.glob(CHECKPOINT))
    output, _ = done(start("train", tmp_path, 2, fsdp=True, **FOREVER | {"max_steps": step + 1}))
    assert f"resumed at step {step} of {step + 1}" in output


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path):
    launcher = (BIN / "accelerate", "launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2", "--num_machines=1",
                "--mixed_precision=no", "-m")  # fmt: skip
    found = tmp_path / "ranks"
    done(start("train", found, 1, tuple(map(str, launcher)), fsdp="asked", **UNCLIPPED))
    assert json.loads((found / "share-1.json").read_text()) == pytest.approx(0.5, abs=0.01)
    assert_equal(alone(tmp_path / "alone", **UNCLIPPED), found)


def test_without_sharding_an_optimizers_moments_are_left_as_they_are():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": []}
    assert fsdp.parts_of_moments(state, optimizer)["state"][0]["exp_avg"] is state["state"][0]["exp_avg"]
