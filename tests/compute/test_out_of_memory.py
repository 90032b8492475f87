"""Memory that runs out changes how a step is cut up, never what comes of it."""

import pytest
import torch
from torch import nn

from stages.compute import out_of_memory
from stages.evaluation.answering import answer, retrieve
from stages.generation.marginalization import log_prior
from stages.settings.runs import Evaluate
from stages.training.validation import validation_loss
from tests.tiny_rag import ANSWERS, QUESTIONS, tiny_rag
from tests.training.test_trainer import run, sgd  # noqa: F401

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes")


class Scarce(nn.Module):
    """Fits `most` rows: with more, a forward pass with gradient fails, or the backward pass half-way through.

    `validating` passes fail without gradient too.
    """

    def __init__(self, inner: nn.Module, most: int, error: Exception, backward=False, validating=False):
        super().__init__()
        self.inner, self.most, self.error, self.backward = inner, most, error, backward
        self.validating = validating

    def forward(self, input_ids, *rest, **named):
        with_gradient = torch.is_grad_enabled()
        fails = len(input_ids) > self.most and (with_gradient or self.validating)
        if fails and not self.backward:
            raise self.error
        output = self.inner(input_ids, *rest, **named)
        if fails:
            output.pooler_output.register_hook(self._fail)
        return output

    def _fail(self, _gradient):
        raise self.error

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def scarce_rag(most, error, **how):
    rag = tiny_rag()
    rag.question_encoder = Scarce(rag.question_encoder, most, error, **how)
    return rag


def halved_and_small(run, curve):
    """A training by `run` that runs out of memory with more than two questions, and one that takes two from the start: of equal
    weights, and of equal values of the `curve`."""
    steps = {"max_steps": 2, "eval_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0}
    halved = run(rag=scarce_rag(2, CUDA), batch_size=8, gradient_accumulation_steps=1, **steps)
    small = run(batch_size=2, gradient_accumulation_steps=4, **steps)
    assert_same_but_for_the_wrapper(halved, small)
    assert halved.progress.halvings == ["step 1: 8 -> 4", "step 1: 4 -> 2"]
    found, expected = (trainer.progress.history[-1][curve] for trainer in (halved, small))
    assert found == pytest.approx(expected, rel=1e-4)


def assert_same_but_for_the_wrapper(one, other):
    mine = {name.replace("question_encoder.inner.", "question_encoder."): v for name, v in one.rag.state_dict().items()}
    for name, value in other.rag.state_dict().items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


STEPS = {"max_steps": 2, "eval_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0}


@pytest.mark.parametrize("error", [CUDA, HOST, MemoryError()], ids=["cuda", "host", "python"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_halved_equals_small_from_the_start(sgd, error, backward):  # noqa: F811
    rag = scarce_rag(2, error, backward=backward)
    halved = run(rag=rag, batch_size=8, gradient_accumulation_steps=1, **STEPS)
    small = run(batch_size=2, gradient_accumulation_steps=4, **STEPS)
    assert_same_but_for_the_wrapper(halved, small)
    assert halved.progress.micro_batch == 2 and halved.progress.halvings == ["step 1: 8 -> 4", "step 1: 4 -> 2"]
    for one, other in zip(halved.progress.history[1:], small.progress.history[1:], strict=True):
        for name in ("train_loss_per_sequence", "gradient_norm", "questions_seen"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert halved.progress.history[-1]["micro_batch"] == 2


def test_a_late_failure_redoes_the_step_and_no_other(sgd):  # noqa: F811
    """The generator's second pass of the first step fails once: what the first had added must not count twice."""
    rag, passes = tiny_rag(), []
    score = rag.packed.score

    def failing(packed, label_smoothing):
        passes.append(torch.is_grad_enabled())
        if passes[-1] and sum(passes) == 2:
            raise CUDA
        return score(packed, label_smoothing)

    rag.packed.score = failing
    halved = run(rag=rag, batch_size=4, gradient_accumulation_steps=2, **STEPS)
    whole = run(batch_size=4, gradient_accumulation_steps=2, **STEPS)
    assert_same_but_for_the_wrapper(halved, whole)
    assert halved.progress.halvings == ["step 1: 4 -> 2"]
    for name in ("questions_seen", "train_loss_per_sequence"):
        assert halved.progress.history[1][name] == pytest.approx(whole.progress.history[1][name], rel=1e-5)


def test_the_halved_size_outlives_a_kill(tmp_path):
    def kill(point):
        if point["step"] == 3:
            raise KeyboardInterrupt

    rag = scarce_rag(4, CUDA)
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, on_point=kill, rag=rag, batch_size=8, gradient_accumulation_steps=1, max_steps=4)
    again = scarce_rag(4, CUDA)
    trainer = run(folder=tmp_path, rag=again, batch_size=8, gradient_accumulation_steps=1, max_steps=4)
    assert trainer.progress.micro_batch == 4 and len(trainer.progress.halvings) == 1


@pytest.mark.parametrize("validating", [False, True])
def test_one_question_that_does_not_fit_names_the_remedies(validating):
    with pytest.raises(ValueError, match="single question; lower lengths.context_tokens or retriever.n_docs"):
        run(rag=scarce_rag(0, CUDA, validating=validating))


def test_switched_off_the_error_is_the_original():
    rag = scarce_rag(2, CUDA)
    with pytest.raises(torch.OutOfMemoryError):
        run(rag=rag, halve_on_oom=False, batch_size=4, eval_steps=99)


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        run(rag=scarce_rag(2, RuntimeError("shapes do not match")))


def test_validation_and_decoding_in_halves_give_the_same(capsys):
    plain, scarce = tiny_rag().eval(), scarce_rag(2, HOST, validating=True).eval()
    examples = plain.examples(QUESTIONS, ANSWERS)
    assert validation_loss(scarce, examples, "sequence") == pytest.approx(validation_loss(plain, examples, "sequence"))
    found, again = retrieve(plain, examples, 3, 8), retrieve(scarce, examples, 3, 8)
    assert torch.equal(found.rows, again.rows)
    settings = Evaluate(
        split="test",
        num_samples=None,
        decoding="thorough",
        num_beams=2,
        batch_size=8,
        precision="fp32",
        further_depths=[],
    )
    prior = log_prior(found.scores)
    expected = [one.text for one in answer(plain, examples, found.rows, prior, settings, "sequence", "")]
    encode, sizes = plain.generator.encode, []

    def scarce_encode(input_ids, mask):
        sizes.append(len(input_ids))
        if len(input_ids) > 6:
            raise CUDA
        return encode(input_ids, mask)

    plain.generator.encode = scarce_encode
    assert [one.text for one in answer(plain, examples, found.rows, prior, settings, "sequence", "")] == expected
    assert "out of memory with 4 questions at once: 2 from here on" in capsys.readouterr().err
    assert sizes == [24, 12, 6, 6, 6, 6, 3]


def test_split_keeps_rows_and_order():
    assert out_of_memory.split([[1, 2, 3], [4, 5]], 2) == [[1, 2], [3], [4, 5]]
    assert out_of_memory.split([[1, 2, 3]], None) == [[1, 2, 3]]
    assert [out_of_memory.halved(size) for size in (8, 3, 2, 1)] == [4, 2, 1, 0]
