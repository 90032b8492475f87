"""Gradients that are not finite: no weight moves, they are counted, too many end the training."""

import json

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from stages.training.progress import Progress
from stages.training.skipped_steps import Skips, step_unless
from stages.training.trainer import Trainer
from tests.tiny_rag import ANSWERS, NEW, QUESTIONS, SETTINGS, tiny_rag
from tests.training.test_trainer import run

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")


class Poisoned(nn.Module):
    """NaN in the question vectors of the named forward passes with gradient."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls, self.count = inner, calls, 0

    def forward(self, *arguments, **named):
        output = self.inner(*arguments, **named)
        if torch.is_grad_enabled():
            self.count += 1
            if self.count in self.calls:
                output.pooler_output = output.pooler_output * float("nan")
        return output


def poisoned_rag(calls):
    rag = tiny_rag()
    rag.question_encoder = Poisoned(rag.question_encoder, calls)
    return rag


ONE_PASS = {"batch_size": 8, "gradient_accumulation_steps": 1, "eval_steps": 9}


def test_a_skipped_step_moves_nothing_and_is_counted():
    trainer = run(rag=poisoned_rag({1}), max_steps=2, **ONE_PASS)
    assert trainer.progress.skipped_steps == 1 and trainer.progress.step == 2
    assert [point.get("skipped_steps") for point in trainer.progress.history] == [None, 1, 1]
    assert all(torch.isfinite(value).all() for value in trainer.rag.state_dict().values())
    only = run(rag=poisoned_rag({1, 2}), max_steps=2, **ONE_PASS)
    start = poisoned_rag({}).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in only.rag.state_dict().items())


def test_steps_in_between_begin_the_count_again():
    trainer = run(rag=poisoned_rag({1, 2, 4, 5}), max_steps=6, **ONE_PASS)
    assert trainer.progress.skipped_steps == 4 and trainer.progress.skipped_in_a_row == 0


def test_too_many_in_a_row_stop_and_name_the_questions(tmp_path):
    rag, file = poisoned_rag(set(range(99))), tmp_path / "skipped.json"
    settings = SETTINGS.model_copy(update={"max_steps": 9, **ONE_PASS})
    skips = Skips(3, [f"question-{row}" for row in range(len(QUESTIONS))], file)
    trainer = Trainer(rag, NEW, settings, "no", 7, None, skips)
    examples = rag.examples(QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="in 3 steps in a row, 1 to 3 .*skipped.json"):
        trainer.run(examples, examples, lambda point: None)
    batches = json.loads(file.read_text())
    assert [batch["step"] for batch in batches] == [1, 2, 3]
    assert len(batches[0]["questions"]) == 8 and set(batches[1]["questions"]) < {f"question-{row}" for row in range(9)}


def test_overflows_of_the_loss_scaling_are_counted_apart():
    skips, progress = Skips(3), Progress()
    skips.overflow = True
    for step, bad in enumerate([True, True, False, True], start=1):
        skips.note(step, [0], torch.tensor(bad), progress)
    assert (progress.overflow_steps, progress.skipped_steps, progress.skipped_in_a_row) == (3, 0, 1)
    with pytest.raises(ValueError, match="3 steps in a row, 4 to 6"):
        for step in (5, 6):
            skips.note(step, [0], torch.tensor(True), progress)


@pytest.mark.parametrize("fused", [False, True], ids=["host decides", "kernel decides"])
def test_either_way_of_skipping_leaves_weights_moments_and_counts_alone(fused):
    class Wrapped:  # as accelerate's: the torch optimizer inside, and step()
        def __init__(self, optimizer):
            self.optimizer, self.step = optimizer, optimizer.step

    def train(flags):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5))
        optimizer = AdamW([weight], lr=0.1, weight_decay=0.1, fused=fused)
        for number, bad in enumerate(flags):
            weight.grad = torch.full((5,), float("nan") if bad else float(number % 2 + 1))
            step_unless(torch.tensor(bad), Wrapped(optimizer), scaled=False)
        return weight.detach(), optimizer.state[weight]

    kept, state = train([False, True, False, True])
    # The same finite gradients, 1 and 1, without the steps between.
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.1, fused=fused)
    for _ in range(2):
        weight.grad = torch.full((5,), 1.0)
        optimizer.step()
    assert torch.equal(kept, weight.detach()) and float(state["step"]) == 2
    assert torch.equal(state["exp_avg_sq"], optimizer.state[weight]["exp_avg_sq"])
