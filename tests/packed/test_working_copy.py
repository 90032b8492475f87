"""Training with a working copy of the generator's weights: in fp32 the same numbers, in bf16 nothing small gets lost."""

import pytest
import torch
from accelerate.state import AcceleratorState

from stages.rag.folder import load_rag_parts, save_rag
from stages.storage.checkpoints import Checkpoints
from stages.training.trainer import Trainer
from tests.generation.test_packed_bart import distance
from tests.packed.test_cuda_graphs import EVERYTHING, FAMILIES, loss_and_gradients, on_cuda, on_gpu
from tests.rag.test_families import rag_of
from tests.tiny_rag import ANSWERS, NEW, QUESTIONS, SETTINGS, tiny_rag


@pytest.fixture
def other_precision():
    """accelerate keeps a process's first precision."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def copied(dtype, family="bart"):
    rag = rag_of(family)
    rag.work_in(dtype)
    assert rag.working and rag.packed.model is rag.working.model is not rag.generator_model
    return rag


def trained(rag, folder=None, precision="no", on_point=lambda point: None, recipe=NEW, **settings):
    checkpoints = Checkpoints(folder, 2) if folder else None
    trainer = Trainer(rag, recipe, SETTINGS.model_copy(update=settings), precision, 7, checkpoints)
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer.run(examples, examples, on_point)
    return trainer


@FAMILIES
def test_in_fp32_loss_and_gradients_are_the_models_own(family):
    expected, gradients = loss_and_gradients(rag_of(family), label_smoothing=0.1)
    found, of_copy = loss_and_gradients(copied(torch.float, family), label_smoothing=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == of_copy.keys() and distance(of_copy, gradients) < 1e-6


@FAMILIES
def test_in_fp32_a_training_is_the_one_without_it(family):
    settings = {"max_steps": 4, "batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    plain, copy = trained(rag_of(family), **settings), trained(copied(torch.float, family), **settings)
    losses = [[point["val_loss_per_sequence"] for point in one.progress.history if "val_loss_per_sequence" in point]
              for one in (plain, copy)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) > 1
    for own, other in zip(plain.rag.parameters(), copy.rag.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-5)


@FAMILIES
def test_bf16_gradients_are_added_up_in_fp32(family):
    """A bf16 sum of 300 equal numbers would stop growing at 256 of them."""
    rag = copied(torch.bfloat16, family)
    _, once = loss_and_gradients(rag, [0])
    rag.zero_grad()
    examples = rag.examples(QUESTIONS, ANSWERS)
    for _ in range(300):
        rag(rag.batch(examples, [0]), marginal="sequence").nll.sum().backward()
    for name, parameter in rag.generator_model.named_parameters():
        assert parameter.grad.dtype == torch.float
        torch.testing.assert_close(parameter.grad, 300 * once[f"generator_model.{name}"], rtol=1e-4, atol=1e-6)
    assert all(computed.grad is None for computed in rag.working.copies)


def test_a_gradient_that_no_memory_was_left_for_is_not_counted_again(monkeypatch):
    """zero_grad sees the model's own parameters alone, before an update begins anew in smaller passes."""
    _, expected = loss_and_gradients(copied(torch.bfloat16))
    rag = copied(torch.bfloat16)
    loss = rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), [0, 1]), marginal="sequence").nll.sum()

    def no_memory(tensor, *_, **__):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "to", no_memory)
        loss.backward()
    rag.zero_grad()
    _, found = loss_and_gradients(rag)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_bf16_stays_close_to_fp32():
    expected, gradients = loss_and_gradients(tiny_rag())
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = loss_and_gradients(tiny_rag())
        found, of_copy = loss_and_gradients(copied(torch.bfloat16))
    assert (found - expected).abs().max() < 2 * (cast - expected).abs().max() + 0.02
    # Residual stream and norms are rounded, too: more noise than under autocast (0.006), as in any model in bf16.
    assert distance(of_copy, gradients) < 0.06


def test_steps_too_small_for_bf16_are_taken_and_kept(tmp_path, other_precision):
    before = [parameter.detach().clone() for parameter in copied(torch.bfloat16).generator_model.parameters()]
    rag = copied(torch.bfloat16)
    settings = {"max_steps": 4, "learning_rate": 1e-7, "save_steps": 2, "eval_steps": 2}
    trained(rag, tmp_path / "kept", "bf16", recipe=NEW.model_copy(update={"checkpoints": "last"}), **settings)
    moved = [(own - old).abs().max() for own, old in zip(rag.generator_model.parameters(), before, strict=True)]
    assert max(moved) > 1e-8 and all(own.dtype == torch.float for own in rag.parameters())
    for own, computed in zip(rag.working.own, rag.working.copies, strict=True):
        assert torch.equal(own.bfloat16(), computed)
    weights, _ = Checkpoints(tmp_path / "kept", 2).finished()
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float}
    (tmp_path / "model").mkdir()
    save_rag(rag, tmp_path / "model", "sequence")
    _, generator = load_rag_parts(tmp_path / "model")
    for own, saved in zip(rag.generator_model.parameters(), generator.model.parameters(), strict=True):
        assert torch.equal(own, saved)


def test_a_resumed_training_goes_on_with_the_same_weights(tmp_path, other_precision):
    settings = {"max_steps": 6, "save_steps": 2, "eval_steps": 3}
    whole = trained(copied(torch.bfloat16), precision="bf16", **settings)

    class Killed(Exception):
        pass

    def kill(point):
        if point["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        trained(copied(torch.bfloat16), tmp_path, "bf16", kill, logging_steps=1, **settings)
    resumed = trained(copied(torch.bfloat16), tmp_path, "bf16", logging_steps=1, **settings)
    assert resumed.progress.step == 6
    best = [point["val_loss_per_sequence"] for point in resumed.progress.history if "val_loss_per_sequence" in point]
    assert best == [
        point["val_loss_per_sequence"] for point in whole.progress.history if "val_loss_per_sequence" in point
    ]


def test_validation_and_dropout_follow_the_models_mode():
    rag = copied(torch.bfloat16)
    for mode in (True, False):
        rag.train(mode)
        assert {module.training for module in rag.working.model.modules()} == {mode}


def test_frozen_weights_get_no_copy():
    rag = tiny_rag()
    next(rag.generator_model.parameters()).requires_grad_(False)
    rag.work_in(torch.bfloat16)
    assert rag.working is None and rag.packed.model is rag.generator_model


@on_gpu
@FAMILIES
def test_replays_add_to_the_gradients_of_the_models_own_weights(family):
    plain, graphs = on_cuda(family, False), on_cuda(family, False)
    for rag in (plain, graphs):
        rag.work_in(torch.bfloat16)
    graphs.record_graphs()
    for _ in range(2):
        expected, gradients = loss_and_gradients(plain, EVERYTHING)
        found, own = loss_and_gradients(graphs, EVERYTHING)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert gradients.keys() == own.keys() and distance(own, gradients) < 0.05
    assert not graphs.packed.graphs.failed


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_reading_together_goes_by_the_copy(dtype):
    options = {"reading": "together", "retriever_gradient": "emdr2"}
    expected, gradients = loss_and_gradients(tiny_rag(), **options)
    rag = copied(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, of_copy = loss_and_gradients(rag, **options)
    loose = dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02 if loose else 1e-5, atol=0.02 if loose else 1e-5)
    assert gradients.keys() == of_copy.keys() and distance(of_copy, gradients) < (0.06 if loose else 1e-6)
    assert all(gradient.dtype == torch.float for gradient in of_copy.values())
