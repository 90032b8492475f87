"""The loop: equal updates however a step is cut up, the old recipe's defects one by one, kills that cost nothing."""

import copy
import json
import signal
import threading
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from stages.machine.signals import Interrupted
from stages.params import load_params
from stages.storage.checkpoints import Checkpoints
from stages.training import recipes
from stages.training.accumulation import Accumulation
from stages.training.curves import summary
from stages.training.optimizer import make_optimizer
from stages.training.trainer import Trainer
from stages.training.validation import validation_loss
from stages.verdicts.of_training import training_signs
from tests.rag.test_model import lose
from tests.tiny_rag import ANSWERS, NEW, OLD, QUESTIONS, SETTINGS, tiny_rag


def run(recipe=NEW, folder=None, on_point=lambda point: None, rag=None, **settings):
    rag = rag or tiny_rag()
    checkpoints = Checkpoints(folder, 2) if folder else None
    trainer = Trainer(rag, recipe, SETTINGS.model_copy(update=settings), "no", 7, checkpoints)
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer.run(examples, examples, on_point)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.rag.state_dict().items()}


def assert_same_weights(one, other, tolerance):
    for name, value in weights(one).items():
        torch.testing.assert_close(
            value, weights(other)[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


SGD_STEP = {"max_steps": 2, "learning_rate": 1e-3, "eval_steps": 9, "warmup_steps": 0}


@pytest.fixture
def sgd(monkeypatch):
    """Plain SGD: Adam's first steps are the gradient's sign, which would hide a wrong scale."""
    monkeypatch.setattr(
        "stages.training.trainer.make_optimizer",
        lambda rag, settings: torch.optim.SGD(rag.parameters(), lr=settings.learning_rate),
    )


def test_gradient_checkpointing_changes_nothing_but_memory(sgd):
    plain = run(gradient_checkpointing=False, **SGD_STEP)
    recomputed = run(gradient_checkpointing=True, **SGD_STEP)
    layers = recomputed.rag.generator_model.model
    assert layers.encoder.gradient_checkpointing and layers.decoder.gradient_checkpointing
    assert_same_weights(plain, recomputed, 1e-6)
    start = tiny_rag().state_dict()
    assert any((value - start[name]).abs().max() > 1e-5 for name, value in weights(recomputed).items())


def test_the_question_encoder_may_learn_at_its_own_rate():
    rag = tiny_rag()
    optimizer = make_optimizer(rag, SETTINGS.model_copy(update={"question_encoder_learning_rate": 1e-5}))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in rag.question_encoder.parameters()} == {1e-5}
    assert {rates[id(p)] for p in rag.generator_model.parameters()} == {SETTINGS.learning_rate}
    assert len(rates) == len(list(rag.parameters()))


# Nine questions: the second step holds the last of one epoch and the first of the next.
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_however_a_step_is_cut_up_the_update_is_the_same(sgd, batch_size, accumulation):
    count = batch_size * accumulation
    whole = run(batch_size=count, gradient_accumulation_steps=1, max_grad_norm=1e9, **SGD_STEP)
    parts = run(batch_size=batch_size, gradient_accumulation_steps=accumulation, max_grad_norm=1e9, **SGD_STEP)
    assert_same_weights(whole, parts, 1e-6)
    start = tiny_rag().state_dict()
    assert any((value - start[name]).abs().max() > 1e-5 for name, value in weights(whole).items())
    assert parts.progress.questions_seen == 2 * count


def test_one_at_a_time_is_slower_but_the_same(sgd):
    one = run(NEW.model_copy(update={"batching": "one_at_a_time"}), max_grad_norm=1e9, **SGD_STEP)
    assert_same_weights(run(max_grad_norm=1e9, **SGD_STEP), one, 1e-6)


def test_old_accumulation_is_the_old_scripts_arithmetic(sgd):
    """Against a loop written out: a batch of 5, an update after every 2 questions, each loss halved, the fifth dropped."""
    recipe = NEW.model_copy(update={"accumulation": "within_batch"})
    trained = run(recipe, batch_size=5, gradient_accumulation_steps=2, max_grad_norm=1e9, **SGD_STEP)
    rag = tiny_rag()
    examples = rag.examples(QUESTIONS, ANSWERS)
    batch = recipes.epoch_order(len(QUESTIONS), 7, 0)[:5]
    rate = SGD_STEP["learning_rate"]
    for taken, row in enumerate(batch[:4], start=1):
        (rag(rag.batch(examples, [row]), marginal="sequence").nll.sum() / 2).backward()
        if taken % 2 == 0:
            # The schedule decays linearly from the first of two steps to the second.
            with torch.no_grad():
                for parameter in rag.parameters():
                    if parameter.grad is not None:
                        parameter -= rate * (1.0 if taken == 2 else 0.5) * parameter.grad
                        parameter.grad = None
    for name, value in rag.state_dict().items():
        torch.testing.assert_close(weights(trained)[name], value, rtol=0, atol=1e-6)
    assert trained.progress.questions_seen == 4
    more = run(recipe, batch_size=5, gradient_accumulation_steps=2, max_grad_norm=1e9, **{**SGD_STEP, "max_steps": 3})
    assert more.progress.questions_seen == 7  # the fifth question was seen, and dropped


def test_old_recipe_never_moves_the_question_encoder():
    averaged = NEW.model_copy(update={"marginalization": "average"})
    detached = NEW.model_copy(update={"retriever_gradient": "none"})
    for recipe in (OLD, averaged, detached):
        rag = tiny_rag()
        before = copy.deepcopy(rag.question_encoder.state_dict())
        trainer = run(recipe, rag=rag, weight_decay=0.0)
        assert all(torch.equal(before[name], value) for name, value in rag.question_encoder.state_dict().items())
        norms = [p["question_encoder_gradient_norm"] for p in trainer.progress.history if "learning_rate" in p]
        assert norms and not any(norms)
    moved = run()
    assert not all(torch.equal(before[name], value) for name, value in moved.rag.question_encoder.state_dict().items())


def test_old_recipe_forwards_one_question_at_a_time(monkeypatch):
    sizes = []
    original = Accumulation.add

    def counted(self, training, passes, *rest):
        sizes.extend(map(len, passes))
        assert len(passes) == 1  # nor are questions encoded together
        original(self, training, passes, *rest)

    monkeypatch.setattr(Accumulation, "add", counted)
    run(OLD, batch_size=8, gradient_accumulation_steps=4, max_steps=2)
    assert sizes == [1] * 8


def test_best_and_last(tmp_path, monkeypatch):
    """Where a rate rises until the last step makes things worse, the two recipes keep different weights."""
    monkeypatch.setattr(
        "stages.training.trainer.make_schedule",
        lambda optimizer, settings: LambdaLR(optimizer, lambda step: 30.0 if step == settings.max_steps - 1 else 1.0),
    )
    settings = {"max_steps": 4, "learning_rate": 0.1, "eval_steps": 1, "max_grad_norm": 100.0}
    best = run(NEW, tmp_path / "best", **settings)
    last = run(NEW.model_copy(update={"checkpoints": "last"}), tmp_path / "last", **settings)
    examples = best.rag.examples(QUESTIONS, ANSWERS)
    validated = [point["val_loss_per_sequence"] for point in best.progress.history if "val_loss_per_sequence" in point]
    assert min(validated) < validated[-1]
    assert validation_loss(best.rag, examples, "sequence")["val_loss_per_sequence"] == pytest.approx(
        min(validated), rel=1e-5
    )
    found = validation_loss(last.rag, examples, "sequence")["val_loss_per_sequence"]
    assert found == pytest.approx(validated[-1], rel=1e-5)


def test_validation_loss_has_no_label_smoothing_and_both_units():
    rag = tiny_rag()
    examples = rag.examples(QUESTIONS, ANSWERS)
    expected = rag(rag.batch(examples, list(range(len(examples)))), marginal="sequence").nll.mean().item()
    plain = run(max_steps=1, warmup_steps=0, label_smoothing=0.0).progress.history[0]
    smoothed = run(max_steps=1, warmup_steps=0, label_smoothing=0.3).progress.history[0]
    assert plain["val_loss_per_sequence"] == smoothed["val_loss_per_sequence"] == pytest.approx(expected, rel=1e-5)
    tokens = int(examples.target_mask.sum())
    assert plain["val_loss_per_token"] == pytest.approx(expected * len(examples) / tokens, rel=1e-5)


class Killed(Exception):
    pass


def killed_and_resumed(run, folder, killed_at, **settings):
    """A training by `run`, and the same killed at its first point from step `killed_at` on and resumed: of equal weights."""
    whole = run(folder=folder / "whole", **settings)

    def kill(point):
        if point["step"] >= killed_at:
            raise Killed

    with pytest.raises(Killed):
        run(folder=folder / "killed", on_point=kill, **settings)
    resumed = run(folder=folder / "killed", **settings)
    assert_same_weights(whole, resumed, 0)
    return whole, resumed


@pytest.mark.parametrize("recipe", [NEW, OLD], ids=["new", "old"])
@pytest.mark.parametrize("killed_at", [1, 2, 5])
def test_killed_and_resumed_equals_never_killed(tmp_path, recipe, killed_at):
    settings = {"max_steps": 6, "save_steps": 2, "batch_size": 4, "gradient_accumulation_steps": 2}
    whole, resumed = killed_and_resumed(partial(run, recipe), tmp_path, killed_at, **settings)

    def losses(trainer):
        names = ("step", "questions_seen", "train_loss_per_sequence", "val_loss_per_sequence", "gradient_norm")
        return [{name: point[name] for name in names if name in point} for point in trainer.progress.history]

    assert losses(resumed) == losses(whole)
    assert [point["step"] for point in resumed.progress.history] == list(range(7))


def untimed(trainer):
    timings = ("second", "host_wait", "mfu")
    return [
        {name: value for name, value in point.items() if not any(part in name for part in timings)}
        for point in trainer.progress.history
    ]


@pytest.mark.parametrize("asked_at", [1, 3, 6])
def test_asked_to_stop_it_ends_with_a_checkpoint_and_goes_on_to_the_same_curve(tmp_path, asked_at):
    """Checkpoints fall between logged points: the sums since the last one must come back too."""
    settings = {"max_steps": 6, "save_steps": 4, "logging_steps": 3, "eval_steps": 5}
    whole = run(NEW, tmp_path / "whole", **settings)
    rag = tiny_rag()
    stopped = Trainer(rag, NEW, SETTINGS.model_copy(update=settings), "no", 7, Checkpoints(tmp_path / "stopped", 2))
    examples = rag.examples(QUESTIONS, ANSWERS)
    with pytest.raises(Interrupted, match=f"step {asked_at} of 6") as caught:
        stopped.run(
            examples, examples, lambda point: None,
            lambda: signal.SIGTERM if stopped.progress.step == asked_at else None,
        )  # fmt: skip
    assert caught.value.number == signal.SIGTERM
    resumed = run(NEW, tmp_path / "stopped", **settings)
    assert resumed.progress.step == 6
    assert_same_weights(whole, resumed, 0)
    assert untimed(resumed) == untimed(whole)


def test_a_finished_training_is_not_trained_again(tmp_path):
    first = run(NEW, tmp_path)
    points = []
    again = run(NEW, tmp_path, points.append)
    assert points == [] and again.progress == first.progress and not again.rag.training
    assert_same_weights(first, again, 0)


def test_a_resumed_run_computes_with_the_threads_that_it_began_with(tmp_path, capsys, monkeypatch):
    """Two threads on a machine whose cores are busy are slow, so torch only says that it has them."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    def kill(point):
        if point["step"] == 2:
            raise Killed

    with monkeypatch.context() as two:
        two.setattr(torch, "get_num_threads", lambda: 2)
        with pytest.raises(Killed):
            run(NEW, tmp_path, kill)
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    run(NEW, tmp_path)
    assert given == [2] and "2 threads, as before" in capsys.readouterr().out


def test_a_checkpoint_is_of_its_step_however_late_the_disk_takes_it(tmp_path, monkeypatch):
    save, steps_went_on = Checkpoints.save, threading.Event()

    def late(self, step, *what):
        assert step != 2 or steps_went_on.wait(30)
        return save(self, step, *what)

    settings = {"max_steps": 5, "save_steps": 2, "eval_steps": 9}
    keep = NEW.model_copy(update={"checkpoints": "last"})
    monkeypatch.setattr(Checkpoints, "finish", lambda self, *what: None)  # which would take the others away
    run(keep, tmp_path / "prompt", **settings)
    monkeypatch.setattr(Checkpoints, "save", late)
    run(keep, tmp_path / "late", on_point=lambda point: point["step"] == 3 and steps_went_on.set(), **settings)
    for name in ("step-00000002", "step-00000004"):
        prompt, later = (
            torch.load(tmp_path / where / name / "state.pt", weights_only=True) for where in ("prompt", "late")
        )
        moments = [state["optimizer"]["state"] for state in (prompt, later)]
        assert all(torch.equal(one["exp_avg"], moments[1][key]["exp_avg"]) for key, one in moments[0].items())
        assert prompt["progress"]["step"] == later["progress"]["step"] == int(name[-1])
        assert len(prompt["progress"]["history"]) == len(later["progress"]["history"])
        kept = [(tmp_path / where / name / "weights.safetensors").read_bytes() for where in ("prompt", "late")]
        assert kept[0] == kept[1]


def test_a_disk_that_fails_behind_the_steps_stops_the_training(tmp_path, monkeypatch):
    def full(self, *what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(NEW, tmp_path, max_steps=3, save_steps=1)


def test_questions_without_passages_are_trained_on_counted_and_skip_no_step():
    rag = tiny_rag()
    lose(rag)
    trainer = run(rag=rag)
    assert trainer.progress.skipped_steps == 0
    points = [point for point in trainer.progress.history if "train_loss_per_sequence" in point]
    # A step's passes search together, and its first question is lost.
    assert points[0]["questions_without_passages"] == 1
    assert trainer.progress.questions_without_passages == sum(p["questions_without_passages"] for p in points)
    assert all(torch.isfinite(torch.tensor(point["train_loss_per_sequence"])) for point in points)
    metrics = summary(trainer.progress, trainer.settings, keeps_best=True)
    assert metrics["questions_without_passages"] == trainer.progress.questions_without_passages > 0
    assert metrics["val_questions_without_passages"] == 1  # of nine validated together
    assert metrics["val_loss_per_sequence"] > 0


def validated_as(monkeypatch, *losses: float) -> None:
    """The validations of a training come out with these losses, one after the other."""
    waiting = iter(losses)

    def known(*_):
        return {
            "val_loss_per_sequence": (loss := next(waiting)), "val_loss_per_token": loss,
            "val_questions_without_passages": 0,
        }  # fmt: skip

    monkeypatch.setattr("stages.training.trainer.validation_loss", known)


NAN = float("nan")


def test_a_training_whose_validation_is_never_finite_keeps_its_last_weights(monkeypatch, tmp_path, capsys):
    validated_as(monkeypatch, NAN, NAN, NAN)
    trainer = run(folder=tmp_path / "nan")
    said = capsys.readouterr().out
    assert said.count("validation loss nan at step") == 3 and said.count("the last weights are kept") == 1
    assert trainer.progress.best_step == trainer.progress.step == 4
    kept, _ = trainer.checkpoints.finished()
    for name, value in kept.items():
        assert torch.equal(value, trainer.rag.state_dict()[name]), name
    metrics = summary(trainer.progress, trainer.settings, keeps_best=True)
    assert metrics["kept_step"] == 4 and not [name for name in metrics if name.startswith("val_loss")]
    assert "nan" not in json.dumps(metrics).lower()
    verdicts = training_signs(trainer.progress.history, metrics, load_params().signs, on_gpu=False)
    assert verdicts.tags["sign.val_loss"] == "bad" and "nan" in verdicts.text


def test_the_best_is_the_best_of_the_finite_losses(monkeypatch, tmp_path):
    validated_as(monkeypatch, NAN, 5.0, NAN)
    trainer = run(folder=tmp_path)
    assert (trainer.progress.best_step, trainer.progress.best_loss) == (2, 5.0)
    assert summary(trainer.progress, trainer.settings, keeps_best=True)["val_loss_per_sequence"] == 5.0


def test_a_training_without_a_finite_validation_goes_on_from_its_checkpoints(monkeypatch, tmp_path):
    validated_as(monkeypatch, NAN, NAN, NAN)
    uninterrupted = run(folder=tmp_path / "whole")
    validated_as(monkeypatch, NAN, NAN, NAN, NAN)

    class Stopped(Exception):
        pass

    def stop(point):
        if point["step"] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run(folder=tmp_path / "killed", on_point=stop)
    assert Checkpoints(tmp_path / "killed", 2).latest() is not None
    assert_same_weights(uninterrupted, run(folder=tmp_path / "killed"), 0)


@pytest.mark.parametrize("recipe", [NEW, NEW.model_copy(update={"marginalization": "average"}),
                                    NEW.model_copy(update={"retriever_gradient": "none"})])  # fmt: skip
def test_questions_encoded_at_once_for_all_passes_give_the_same_training(sgd, monkeypatch, recipe):
    settings = SGD_STEP | {"batch_size": 2, "gradient_accumulation_steps": 4}
    rag, calls = tiny_rag(), []
    rag.question_encoder.register_forward_hook(lambda *call: calls.append(rag.training))
    ahead = run(recipe, rag=rag, **settings)
    assert calls.count(True) == 2  # one a step
    monkeypatch.setattr("stages.training.accumulation.FOUND_AHEAD", 1)
    each = run(recipe, rag=(rag := tiny_rag()), **settings)
    assert_same_weights(ahead, each, 1e-6)
    for point, other in zip(ahead.progress.history, each.progress.history, strict=True):
        assert point.keys() == other.keys()
        for name in {"train_loss_per_sequence", "gradient_norm", "question_encoder_gradient_norm"} & point.keys():
            assert point[name] == pytest.approx(other[name], rel=1e-5, abs=1e-9), name
