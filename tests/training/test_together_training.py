"""Training on passages read together: equal updates however they are cut up, kills that cost nothing, what is logged."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from stages.generation.lora import add_lora
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.rag.together import read_together
from stages.settings.retrieval import Lora
from stages.storage.checkpoints import Checkpoints
from stages.training.curves import tracked_name
from stages.training.throughput import training_flop, weights_by_tokens
from stages.training.trainer import Trainer
from stages.training.validation import validation_loss
from tests.compute.test_out_of_memory import halved_and_small
from tests.compute.test_ranks import THREE_STEPS, alone, assert_same
from tests.rag.test_families import rag_of
from tests.rag.test_together import EVERYTHING, batch_of, forward, summed
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS, TOGETHER, tiny_rag
from tests.training.test_index_refresh import refreshing_rag
from tests.training.test_trainer import SGD_STEP, assert_same_weights, killed_and_resumed, sgd, untimed  # noqa: F401

BOTH = pytest.mark.parametrize("gradient", ["emdr2", "perplexity_distillation"])
WAYS = pytest.mark.parametrize("gradient", ["emdr2", "perplexity_distillation", "exact"])
WEIGHTED = {"reading": "weighted", "retriever_gradient": "exact"}


def recipe_of(gradient="emdr2"):
    """Exact is the gradient of a prior that has a part in the reading."""
    reading = "weighted" if gradient == "exact" else "together"
    return NEW.model_copy(update={"reading": reading, "retriever_gradient": gradient})


def run(gradient="emdr2", folder=None, on_point=lambda point: None, rag=None, **settings):
    rag = rag or tiny_rag()
    checkpoints = Checkpoints(folder, 2) if folder else None
    trainer = Trainer(rag, recipe_of(gradient), SETTINGS.model_copy(update=settings), "no", 7, checkpoints)
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer.run(examples, examples, on_point)
    return trainer


def moved(trainer, start):
    """The parts of the model whose weights are no longer those of `start`."""
    now = trainer.rag.state_dict()
    return {name.split(".")[0] for name, value in start.items() if not torch.equal(value, now[name])}


@WAYS
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (1, 8), (3, 3)])
def test_however_a_step_is_cut_up_the_update_is_the_same(sgd, gradient, batch_size, accumulation):  # noqa: F811
    count = batch_size * accumulation
    whole = run(gradient, batch_size=count, gradient_accumulation_steps=1, max_grad_norm=1e9, **SGD_STEP)
    cut = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    parts = run(gradient, max_grad_norm=1e9, **cut, **SGD_STEP)
    assert_same_weights(whole, parts, 1e-6)
    assert moved(whole, tiny_rag().state_dict()) == {"question_encoder", "generator_model"}
    for one, other in zip(whole.progress.history[1:], parts.progress.history[1:], strict=True):
        assert ("retriever_loss" in one) == (gradient != "exact")
        for name in {"train_loss_per_sequence", "retriever_loss", "gradient_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_halved_equals_small_from_the_start(sgd):  # noqa: F811
    halved_and_small(run, "retriever_loss")


@pytest.mark.parametrize("killed_at", [1, 5])
def test_killed_and_resumed_equals_never_killed(tmp_path, killed_at):
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 3}
    whole, resumed = killed_and_resumed(run, tmp_path, killed_at, **settings)
    assert untimed(resumed) == untimed(whole) and "retriever_loss" in untimed(whole)[-1]


@pytest.mark.parametrize("gradient", ["emdr2", "exact"])
def test_gradient_checkpointing_changes_nothing_but_memory(sgd, gradient):  # noqa: F811
    for family in ("bart", "t5"):
        plain, recomputed = (
            run(gradient, rag=rag_of(family), gradient_checkpointing=on, **SGD_STEP) for on in (False, True)
        )
        assert_same_weights(plain, recomputed, 1e-6)


def test_under_lora_the_adapters_and_the_question_encoder_learn():
    rag = tiny_rag()
    add_lora(rag.generator_model, Lora(rank=2, alpha=4, dropout=0.0, target_modules=None, base="fp32"))
    before = {name: value.clone() for name, value in rag.state_dict().items()}
    trainer = run(rag=rag)
    changed = [name for name, value in rag.state_dict().items() if not torch.equal(value, before[name])]
    assert any("lora_" in name for name in changed) and moved(trainer, before) == {
        "question_encoder",
        "generator_model",
    }
    assert all("lora_" in name for name in changed if name.startswith("generator_model"))


@BOTH
def test_a_context_encoder_that_trains_learns_from_the_retrievers_loss(gradient):
    rag = refreshing_rag()
    forward(rag, gradient=gradient).nll.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in rag.context_encoder.parameters())
    forward(rag, gradient=gradient).retriever_loss.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in rag.context_encoder.parameters())


def test_without_a_retriever_loss_the_retriever_stays_and_no_curve_is_drawn():
    rag = tiny_rag()
    before = {name: value.clone() for name, value in rag.state_dict().items()}
    trainer = run("none", rag=rag, weight_decay=0.0)
    assert moved(trainer, before) == {"generator_model"}
    assert not any("retriever_loss" in point for point in trainer.progress.history)
    each = Trainer(tiny_rag(), NEW, SETTINGS, "no", 7, None)
    examples = each.rag.examples(QUESTIONS, ANSWERS)
    each.run(examples, examples, lambda point: None)
    assert not any("retriever_loss" in point for point in each.progress.history)
    assert tracked_name("retriever_loss") == "loss/retriever"


@torch.no_grad()
def test_the_losses_in_the_curves_are_the_joint_readings():
    rag = tiny_rag()
    examples = rag.examples(QUESTIONS, ANSWERS)
    output = forward(rag)
    expected = output.nll.mean().item()
    found = validation_loss(rag, examples, "sequence", 4, "together")
    assert found["val_loss_per_sequence"] == pytest.approx(expected, rel=1e-5)
    with torch.enable_grad():
        for_retriever = forward(rag).retriever_loss.mean().item()
        first = run(max_steps=1, warmup_steps=0, batch_size=9, gradient_accumulation_steps=1).progress.history
    assert first[0]["val_loss_per_sequence"] == pytest.approx(expected, rel=1e-5)
    assert first[1]["train_loss_per_sequence"] == pytest.approx(expected, rel=1e-5)
    assert first[1]["retriever_loss"] == pytest.approx(for_retriever, rel=1e-5)
    assert 0 < first[1]["prior_entropy"] < 1


def test_a_pass_without_gradient_is_a_third_of_the_work():
    rag = tiny_rag()
    sizes = weights_by_tokens(rag.question_encoder, rag.generator_model)
    outputs = forward(rag), forward(rag, gradient="none")
    work = [training_flop(sizes, 0, 0, 10 * output.scored_under) for output in outputs]
    assert work[0] - work[1] == pytest.approx(2 * sizes["answer"] * 10 * 3)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_it_learns_and_transformers_own_class_loads_what_it_leaves(family, tmp_path):
    """The same joint likelihood by AutoModelForSeq2SeqLM, and by ours again; the RAG layout is not written."""
    rag = rag_of(family)
    steps = {"max_steps": 60, "learning_rate": 2e-2, "eval_steps": 60, "logging_steps": 10}
    trainer = run(rag=rag, batch_size=9, gradient_accumulation_steps=1, **steps)
    losses = [point["val_loss_per_sequence"] for point in trainer.progress.history if "val_loss_per_sequence" in point]
    assert losses[-1] < 0.5 * losses[0]
    logged = [point["retriever_loss"] for point in trainer.progress.history if "retriever_loss" in point]
    assert logged[-1] < logged[0]

    save_rag(rag, tmp_path, "sequence", "together")
    assert {path.name for path in tmp_path.iterdir()} == {"question_encoder", "generator", "manifest.json"}
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "generator").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "generator")
    batch = batch_of(rag)
    right = 0
    with torch.no_grad():
        rows, _ = rag.retrieve(rag.encode_questions(batch))
        found = summed(read_together(rag, batch, rows, "together").joint, batch)
        ids, mask = (part.unflatten(0, rows.shape) for part in rag.contexts(batch, rows))
        for question, answer in enumerate(ANSWERS):
            each = [one[None, real.bool()] for one, real in zip(ids[question], mask[question], strict=True)]
            states = torch.cat([theirs.get_encoder()(input_ids=one).last_hidden_state for one in each], 1)
            labels = batch.targets[[question]][:, batch.target_mask[question]]
            fed = torch.cat([torch.tensor([rag.generator.decoder_prefix]), labels[:, :-1]], 1)
            logits = theirs(encoder_outputs=BaseModelOutput(states), decoder_input_ids=fed).logits
            expected = logits.log_softmax(-1).gather(-1, labels[..., None]).sum()
            torch.testing.assert_close(found[question], expected, rtol=1e-5, atol=1e-4)
            attended = torch.ones(states.shape[:2], dtype=torch.long)
            said = theirs.generate(encoder_outputs=BaseModelOutput(states), attention_mask=attended, num_beams=1)[0]
            right += words.decode(said, skip_special_tokens=True).strip() == answer
    assert right >= 6

    encoder, generator = load_rag_parts(tmp_path)
    again = open_rag(encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(forward(again, EVERYTHING).nll, forward(rag, EVERYTHING).nll)


@pytest.mark.slow
@WAYS
def test_however_many_ranks_share_an_update_it_is_the_same(crew, tmp_path, gradient):
    recipe = recipe_of(gradient).model_dump(include={"reading", "retriever_gradient"})
    settings = {"recipe": recipe, **THREE_STEPS}
    crew.do("train", tmp_path / "ranks", batch_size=4, gradient_accumulation_steps=2, **settings)
    whole = alone(tmp_path / "alone", batch_size=8, gradient_accumulation_steps=1, **settings)
    assert_same(whole, tmp_path / "ranks", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"generator": "bart"},
        {"generator": "t5", "batch_size": 1, "gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"recipe": WEIGHTED},
    ],
    ids=["bart", "t5, three questions", "gradient checkpointing", "weighted"],
)
def test_with_fsdp_too(crew, tmp_path, settings):
    settings = {"recipe": TOGETHER, **THREE_STEPS, "max_grad_norm": 1e9} | settings
    crew.do("train", tmp_path / "ranks", fsdp=True, **settings)
    whole = alone(tmp_path / "alone", **settings)
    assert_same(whole, tmp_path / "ranks")
