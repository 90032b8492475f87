"""Where nothing that ranks passages learns, a training question is searched for once, and nothing else changes."""

import pytest
import torch

from stages.machine.signals import Interrupted
from stages.rag.found_once import FoundOnce
from stages.storage.checkpoints import Checkpoints
from stages.training.trainer import Trainer
from tests.tiny_rag import ANSWERS, NEW, OLD, QUESTIONS, SETTINGS, reranked_rag, tiny_rag

FROZEN = NEW.model_copy(update={"retriever_gradient": "none"})
STEPS = {"max_steps": 7, "batch_size": 4, "gradient_accumulation_steps": 1}  # nine questions: three epochs and a part


def with_dropout(rag):
    """Of the question encoder: where it took part, two searches would find different passages."""
    for module in rag.question_encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return rag


def run(rag, recipe=FROZEN, folder=None, asked=lambda: None, **settings):
    searched = []
    find = rag.find

    def counted(batch, retriever_gradient="exact"):
        searched.append((rag.training, len(batch.targets)))
        return find(batch, retriever_gradient)

    rag.find = counted
    chosen = SETTINGS.model_copy(update=STEPS | settings)
    trainer = Trainer(rag, recipe, chosen, "no", 7, Checkpoints(folder, 2) if folder else None)
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer.run(examples, examples, lambda point: None, asked)
    return trainer, [count for training, count in searched if training]


def curve(trainer):
    names = ("train_loss_per_sequence", "gradient_norm", "val_loss_per_sequence", "prior_entropy")
    return [point[name] for point in trainer.progress.history for name in names if name in point]


@pytest.mark.parametrize(
    ("make", "recipe", "settings"),
    [
        (tiny_rag, FROZEN, {}),
        (reranked_rag, FROZEN, {}),
        (tiny_rag, FROZEN, {"batch_size": 2, "gradient_accumulation_steps": 2}),
        (tiny_rag, FROZEN.model_copy(update={"reading": "together"}), {}),
    ],
)
def test_it_is_the_same_training(monkeypatch, make, recipe, settings):
    once, searched = run(make(), recipe, **settings)
    monkeypatch.setattr(FoundOnce, "of_training", lambda *_: None)
    always, searched_always = run(make(), recipe, **settings)
    assert sum(searched_always) == once.progress.questions_seen == always.progress.questions_seen
    # A question that is drawn beside new ones is searched for with them.
    assert len(QUESTIONS) <= sum(searched) < 2 * len(QUESTIONS) < sum(searched_always)
    assert curve(once) == pytest.approx(curve(always), rel=1e-5)


@pytest.mark.parametrize("recipe", [NEW, OLD], ids=["it learns", "one at a time on purpose"])
def test_every_time_where_it_has_to_be(recipe):
    trainer, searched = run(tiny_rag(), recipe, max_steps=12)
    assert sum(searched) == trainer.progress.questions_seen > len(QUESTIONS)


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    torch.manual_seed(5)
    whole, _ = run(reranked_rag(), folder=tmp_path / "whole")
    stops = iter([None] * 3 + [15])
    torch.manual_seed(5)
    with pytest.raises(Interrupted, match="interrupted at step 4 of 7"):
        run(reranked_rag(), folder=tmp_path / "killed", asked=lambda: next(stops))
    again, searched = run(reranked_rag(), folder=tmp_path / "killed")
    assert searched == []  # what was found is part of the checkpoint
    expected, found = whole.rag.state_dict(), again.rag.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_who_does_not_learn_has_no_dropout():
    rag = with_dropout(tiny_rag(passages=9))
    rag.train()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), [0, 1, 2])
    frozen, again = (rag.find(batch, "none")[1] for _ in range(2))
    learning, other = (rag.find(batch, "exact")[1] for _ in range(2))
    assert torch.equal(frozen, again) and not torch.equal(learning, other)
    assert rag.question_encoder.training and learning.requires_grad and not frozen.requires_grad
    rag.eval()
    assert torch.equal(rag.find(batch, "exact")[1], frozen)
