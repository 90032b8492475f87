"""Training with a reranker, weights that learn and drawn answers: kills cost nothing, each learns at its own rate."""

import pytest
import torch

from stages.corpus.epochs import epoch_shares
from stages.machine.signals import Interrupted
from stages.storage.checkpoints import Checkpoints
from stages.training import fsdp
from stages.training.optimizer import make_optimizer
from stages.training.trainer import Trainer
from tests.tiny_rag import ANSWERS, NEW, QUESTIONS, SETTINGS, reranked_rag, tiny_rag

SEVERAL = [[answer, f"about {answer}", f"{answer} or so"][: 1 + place % 3] for place, answer in enumerate(ANSWERS)]


def run(folder=None, asked=lambda: None, rag=None, **settings):
    rag = rag or reranked_rag(dropout=0.1)
    chosen = SETTINGS.model_copy(update={"answers": "drawn", "max_steps": 5, **settings})
    trainer = Trainer(rag, NEW, chosen, "no", 7, Checkpoints(folder, 2) if folder else None)
    trainer.run(rag.examples(QUESTIONS, SEVERAL), rag.examples(QUESTIONS, ANSWERS), lambda point: None, asked)
    return trainer


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    torch.manual_seed(5)
    whole = run(tmp_path / "whole")
    stops = iter([None, None, 15])
    torch.manual_seed(5)
    with pytest.raises(Interrupted, match="interrupted at step 3 of 5"):
        run(tmp_path / "killed", lambda: next(stops))
    again = run(tmp_path / "killed")
    expected, found = whole.rag.state_dict(), again.rag.state_dict()
    assert expected.keys() == found.keys() and "prior.log_factors" in found
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = reranked_rag().state_dict()
    for name in ("prior.log_factors", "cross_encoder.classifier.weight"):
        assert not torch.equal(start[name], found[name])
    point = again.progress.history[-1]
    assert point["temperature"] != 1.25 and point["cross_encoder_gradient_norm"] > 0


def test_each_part_learns_at_its_own_rate():
    rag = reranked_rag()
    rates = {"question_encoder_learning_rate": 1e-5, "reranker_learning_rate": 2e-5, "prior_learning_rate": 0.5}
    optimizer = make_optimizer(rag, SETTINGS.model_copy(update=rates))
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {found[id(p)] for p in rag.cross_encoder.parameters()} == {2e-5}
    assert {found[id(p)] for p in rag.question_encoder.parameters()} == {1e-5}
    assert found[id(rag.prior.log_factors)] == 0.5 and len(found) == len(list(rag.parameters()))
    [group] = [group for group in optimizer.param_groups if any(p is rag.prior.log_factors for p in group["params"])]
    assert group["weight_decay"] == 0
    shared = make_optimizer(rag, SETTINGS.model_copy(update={"question_encoder_learning_rate": 1e-5}))
    assert {group["lr"] for group in shared.param_groups} == {1e-3, 1e-5, 1e-2}


def test_answers_are_drawn_by_seed_and_epoch_alone_and_each_has_its_turn():
    rag = tiny_rag()
    examples = rag.examples(QUESTIONS, SEVERAL)
    rows = torch.arange(len(QUESTIONS))
    first = torch.tensor([0, *map(len, SEVERAL)]).cumsum(0)[:-1]
    assert torch.equal(examples.answers_of(rows), first)
    drawn = [examples.answers_of(rows, epoch_shares(len(rows), 7, epoch)) - first for epoch in range(40)]
    assert torch.equal(drawn[3], examples.answers_of(rows, epoch_shares(len(rows), 7, 3)) - first)
    assert not torch.equal(drawn[3], examples.answers_of(rows, epoch_shares(len(rows), 8, 3)) - first)
    for place, answers in enumerate(SEVERAL):
        assert {int(some[place]) for some in drawn} == set(range(len(answers)))
    shares = epoch_shares(len(rows), 7, 3)
    some, chosen = rag.batch(examples, [5, 2], shares), examples.answers_of(torch.tensor([5, 2]), shares)
    assert torch.equal(some.targets, examples.targets[chosen, : some.targets.shape[1]])


def test_first_answers_are_what_they_were():
    rag = tiny_rag()
    listed, alone = rag.examples(QUESTIONS, SEVERAL), rag.examples(QUESTIONS, ANSWERS)
    for found, expected in zip(rag.batch(listed, [4, 0, 8]), rag.batch(alone, [4, 0, 8]), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_fsdp_refuses_both_in_one_line():
    fsdp.check_retriever(None, False)
    with pytest.raises(ValueError, match="models.reranker: some/model does not train with FSDP"):
        fsdp.check_retriever("some/model", False)
    with pytest.raises(ValueError, match="retriever.learn_weights: true does not work with FSDP"):
        fsdp.check_retriever(None, True)
