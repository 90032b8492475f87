"""Training on passages read in parallel: it learns, a kill costs nothing, and the answers are of what was trained."""

import pytest
import torch

from stages.evaluation.answering import answer, retrieve
from stages.generation import marginalization
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.storage.checkpoints import Checkpoints
from stages.training.trainer import Trainer
from stages.training.validation import validation_loss
from tests.compute.test_ranks import alone
from tests.evaluation.test_answering import SETTINGS as ASKING
from tests.rag.test_parallel import batch_of, rag_of
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS, TOGETHER
from tests.training.test_fsdp import UNCLIPPED, assert_equal, sharded
from tests.training.test_trainer import SGD_STEP, assert_same_weights, killed_and_resumed, sgd, untimed  # noqa: F401

PARALLEL = NEW.model_copy(update=TOGETHER | {"reading": "parallel"})


WEIGHTED = NEW.model_copy(update={"reading": "weighted", "retriever_gradient": "exact"})


def run(rag=None, folder=None, on_point=lambda point: None, recipe=PARALLEL, **settings):
    rag = rag or rag_of()
    trainer = Trainer(
        rag, recipe, SETTINGS.model_copy(update=settings), "no", 7, Checkpoints(folder, 2) if folder else None
    )
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer.run(examples, examples, on_point)
    return trainer


@pytest.mark.parametrize("recipe", [PARALLEL, WEIGHTED], ids=["parallel", "weighted"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (1, 8)])
def test_however_a_step_is_cut_up_the_update_is_the_same(sgd, recipe, batch_size, accumulation):  # noqa: F811
    common = {"recipe": recipe, "max_grad_norm": 1e9} | SGD_STEP
    whole = run(batch_size=8, gradient_accumulation_steps=1, **common)
    parts = run(batch_size=batch_size, gradient_accumulation_steps=accumulation, **common)
    assert_same_weights(whole, parts, 1e-6)


@pytest.mark.parametrize("killed_at", [1, 5])
def test_killed_and_resumed_equals_never_killed(tmp_path, killed_at):
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 3}
    whole, resumed = killed_and_resumed(run, tmp_path, killed_at, **settings)
    assert untimed(resumed) == untimed(whole) and "retriever_loss" in untimed(whole)[-1]


def test_it_learns_is_saved_and_answers_with_the_probability_that_it_was_trained_by(tmp_path):
    rag = rag_of()
    steps = {"max_steps": 40, "learning_rate": 2e-2, "eval_steps": 40, "logging_steps": 40}
    trainer = run(rag, batch_size=9, gradient_accumulation_steps=1, **steps)
    losses = [point["val_loss_per_sequence"] for point in trainer.progress.history if "val_loss_per_sequence" in point]
    assert losses[-1] < 0.5 * losses[0]
    examples = rag.examples(QUESTIONS, ANSWERS)
    assert validation_loss(rag, examples, "sequence", reading="parallel")["val_loss_per_sequence"] == losses[-1]
    save_rag(rag, tmp_path / "model", "sequence", "parallel")
    parts = load_rag_parts(tmp_path / "model")
    again = open_rag(*parts, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"), reading="parallel")
    found = retrieve(again, examples, 3, 4)
    prior = marginalization.log_prior(found.scores)
    for i, given in enumerate(answer(again, examples, found.rows, prior, ASKING, "sequence", "", reading="parallel")):
        targets = torch.tensor([[*given.token_ids, again.generator.eos_token_id]])
        batch = batch_of(again, [i])._replace(targets=targets, target_mask=torch.ones_like(targets).bool())
        with torch.no_grad():
            nll = again(batch, marginal="sequence", reading="parallel", retriever_gradient="none").nll.item()
        assert given.log_prob >= -nll - 1e-3  # more where candidates that read alike are one answer


@pytest.mark.slow
def test_with_fsdp_too_where_prompts_are_padded(crew, tmp_path):
    settings = {"recipe": TOGETHER | {"reading": "parallel"}, "generator": "llama", **UNCLIPPED}
    assert_equal(alone(tmp_path / "alone", **settings), sharded(crew, tmp_path / "ranks", **settings))
