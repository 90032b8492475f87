"""The training loop: one code for every recipe.

accelerate carries precision, loss scaling, clipping and devices; the arithmetic of a step (which questions, divided by
what) comes from recipes.py, its gradients from accumulation.py, the loss from rag/model.py. A step is an optimizer step.
"""

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from tqdm import tqdm

from stages.compute import ranks
from stages.generation import retriever_losses
from stages.machine.signals import Interrupted
from stages.rag.batches import Examples
from stages.rag.found_once import FoundOnce
from stages.rag.model import Rag
from stages.settings.runs import Recipe, Train
from stages.storage.checkpoints import Checkpoints
from stages.training import fsdp
from stages.training.accumulation import Accumulation
from stages.training.checkpointing import Keeper
from stages.training.index_refresh import Refresh
from stages.training.optimizer import clipped_norms, make_optimizer, make_schedule
from stages.training.progress import Progress, Window
from stages.training.recipes import Update, check_ranks, updates
from stages.training.skipped_steps import Skips, step_unless
from stages.training.throughput import gpu_use_of_ranks, matrix_rate, training_flop, weights_by_tokens
from stages.training.validation import VALIDATION_BATCH, validation_loss

SHOWN = {"loss": "train_loss_per_sequence", "val_loss": "val_loss_per_sequence"}  # in the bar


class Trainer:
    """One training run of a RAG model under a recipe."""

    def __init__(self, rag: Rag, recipe: Recipe, settings: Train, precision: str, seed: int,
                 checkpoints: Checkpoints | None, skips: Skips | None = None, keep_threads: bool = False):  # fmt: skip
        check_ranks(recipe, ranks.world())
        device = next(rag.parameters()).device
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        self.rag, self.recipe, self.settings, self.seed = rag, recipe, settings, seed
        self.sharded = fsdp.is_sharded(rag)
        self.checkpoints = checkpoints
        if settings.gradient_checkpointing:
            rag.compute_activations_again()
        # Precision only ("evaluation"): DDP would average gradients, but an update is the sum over all questions.
        model = self.accelerator.prepare_model(rag, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(rag, settings))
        self.schedule = make_schedule(self.optimizer.optimizer, settings)
        self.accumulation = Accumulation(rag, model, self.optimizer, self.accelerator, recipe, settings, seed)
        self.progress = Progress()
        self.refresh = Refresh(rag, settings.index_refresh_steps, settings.max_steps)
        self.skips = skips or Skips(settings.max_skipped_steps)
        self.skips.overflow = self.accelerator.scaler is not None
        self.keeper = Keeper(
            checkpoints, recipe.checkpoints == "best", rag, self.optimizer, self.schedule, self.accelerator.scaler,
            self.refresh, keep_threads,
        )  # fmt: skip
        self.sizes = weights_by_tokens(rag.question_encoder, rag.generator_model)
        computed_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float)
        self.matrix_rate = matrix_rate(device, computed_in) if device.type == "cuda" else None

    def run(
        self, training: Examples, validation: Examples, on_point: Callable[[dict], None],
        asked_to_stop: Callable[[], int | None] = lambda: None,
    ) -> None:  # fmt: skip
        """Trains up to `max_steps`; every logged point goes to `on_point` and into `progress.history`.

        Goes on from the latest checkpoint where there is one, on a CPU with as many threads as it had: other numbers
        add up in other orders (`keep_threads` keeps the present number). Leaves the best weights in the model if the
        recipe keeps the best, else the last. Raises Interrupted behind the first step at which `asked_to_stop` gives a
        signal's number, with a checkpoint written.

        With several ranks each forwards its share of every update's questions, and all take the same step; rank 0 alone
        calls `on_point`, writes and prints. A signal to any of them stops all. Of a sharded model, rank 0 gets all weights
        back once the training has finished.
        """
        try:
            with fsdp.memory_errors(self.rag):
                self._run(training, validation, on_point, asked_to_stop)
        finally:
            self.accumulation.close()
            self.refresh.close()
            self.keeper.close()

    def _run(
        self, training: Examples, validation: Examples, on_point: Callable[[dict], None],
        asked_to_stop: Callable[[], int | None],
    ) -> None:  # fmt: skip
        if finished := self.keeper.finished():
            self.progress = finished
            self._say(f"trained already, {self.progress.step} steps: the model is written again")
            return
        if not self.sharded:  # whose encoder all ranks must ask, or none
            self.keeper.once = self.accumulation.once = FoundOnce.of_training(self.rag, self.recipe, training)
        window = Window.on(self.accelerator.device)
        resumed = self.keeper.resume(window, self.accelerator.device)
        self.progress = resumed or self.progress
        progress, settings = self.progress, self.settings
        self._agree()
        if resumed:
            self._say(f"resumed at step {progress.step} of {settings.max_steps}")
        else:
            self._point({"step": 0, "questions_seen": 0, **self._validate(validation)}, on_point)
        stream = updates(
            len(training), self.seed, self.recipe, settings.batch_size, settings.gradient_accumulation_steps
        )
        stream = islice(stream, progress.updates_taken, None)
        bar = tqdm(
            total=settings.max_steps, initial=progress.step, desc="train", unit=" steps", disable=not ranks.is_main()
        )
        shown: dict[str, str] = {}
        self.rag.train()
        while progress.step < settings.max_steps:
            norms = self._step(stream, training, window)
            bar.update()
            last = progress.step == settings.max_steps
            point = self.refresh.after(progress.step)
            if last or progress.step % settings.logging_steps == 0:
                point |= self._summary(window, norms)
                window = Window.on(self.accelerator.device)
            if last or progress.step % settings.eval_steps == 0:
                pause = time.perf_counter()
                point |= self._validate(validation)
                window.started += time.perf_counter() - pause
            if point:
                shown |= {name: f"{point[key]:.3f}" for name, key in SHOWN.items() if key in point}
                bar.set_postfix(shown)
                window.waits.opened = None  # validating and logging are no waiting for the host
                self._point({"step": progress.step, "questions_seen": progress.questions_seen, **point}, on_point)
            stop = ranks.most(asked_to_stop() or 0)
            if self.checkpoints and not last and (stop or progress.step % settings.save_steps == 0):
                pause = time.perf_counter()
                self.skips.settle(progress)
                self.keeper.save(progress, window)
                window.started += time.perf_counter() - pause
            if stop and not last:
                bar.close()
                self._interrupt(stop)
        bar.close()
        self.skips.settle(progress)
        if progress.best_loss == math.inf:
            if self.recipe.checkpoints == "best":
                self._say("no validation loss was finite: the last weights are kept in place of the best")
            self._take_as_best(math.inf)
        self.rag.eval()
        self.keeper.finish(progress)
        if stop := ranks.most(asked_to_stop() or 0):
            self._interrupt(stop)

    def _agree(self) -> None:
        """Every rank must start from the same weights, and draws dropout masks of its own."""
        ranks.check_same("step to go on from", self.progress.step)
        if ranks.world() > 1 and not self.sharded:  # whose ranks were compared before
            ranks.check_same("weights", sum(float(value.detach().double().sum()) for value in self.rag.parameters()))
        if not ranks.is_main():
            torch.manual_seed((self.seed * 1_000_003 + self.progress.step) * 1024 + ranks.rank())

    def _say(self, line: str) -> None:
        if ranks.is_main():
            tqdm.write(line)

    def _interrupt(self, number: int) -> None:
        kept = "the same command goes on from there" if self.checkpoints else "nothing is kept"
        raise Interrupted(number, f"interrupted at step {self.progress.step} of {self.settings.max_steps}; {kept}")

    def _step(self, stream: Iterator[Update], training: Examples, window: Window) -> dict[str, torch.Tensor]:
        """Takes updates from the stream until one is applied; returns gradient norms."""
        while True:
            update = next(stream)
            self.accumulation.gradients(training, update, self.progress, window)
            self.progress.updates_taken += 1
            self.progress.questions_seen += update.questions
            if update.applied:
                break
            self.accumulation.zero_grad()
        self.accelerator.unscale_gradients()
        norms = clipped_norms(self.rag, self.settings.max_grad_norm)
        self._step_if_finite(update.rows, norms["gradient_norm"])
        self.rag.weights_changed()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16's loss scaling drops steps that overflow
            self.schedule.step()
        self.accumulation.zero_grad()
        window.waits.open()  # again: the optimizer's work is no waiting
        self.progress.step += 1
        window.steps += 1
        return norms

    def _step_if_finite(self, rows: list[int], gradient_norm: torch.Tensor) -> None:
        bad = ~torch.isfinite(gradient_norm)
        step_unless(bad, self.optimizer, scaled=self.accelerator.scaler is not None)
        self.skips.note(self.progress.step + 1, rows, bad, self.progress)

    def _summary(self, window: Window, norms: dict[str, torch.Tensor]) -> dict[str, float]:
        self.skips.settle(self.progress)
        sums = window.summed()
        values = {
            "skipped_steps": self.progress.skipped_steps,
            "overflow_steps": self.progress.overflow_steps,
            "micro_batch": self.progress.micro_batch or self.settings.batch_size,
            "train_loss_per_sequence": float(sums["nll"]) / sums["questions"],
            "train_loss_per_token": float(sums["nll"]) / float(sums["target_tokens"]),
            **self._retriever_loss(sums),
            **({"gold_nll": float(sums["gold_nll"]) / int(sums["with_gold"])} if int(sums["with_gold"]) else {}),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **(self.rag.prior.numbers() if self.rag.prior.log_factors is not None else {}),
            **{name: float(norm) for name, norm in norms.items()},
            "prior_entropy": float(sums["prior_entropy"]) / sums["questions"],
            "distinct_passages": float(sums["distinct"]) / sums["forwards"],
            "questions_without_passages": int(sums["without_passages"]),
        }
        seconds = time.perf_counter() - window.started  # read after the values above have waited for the device
        flop = training_flop(
            self.sizes, *(float(sums[kind]) for kind in ("question_tokens", "context_tokens", "scored_tokens"))
        )
        self.progress.training_seconds += seconds
        self.progress.questions_without_passages += int(sums["without_passages"])
        return values | {
            "seconds_per_step": seconds / window.steps,
            "seconds_per_batch": seconds / max(1, window.forwards),  # this rank's
            "questions_per_second": sums["questions"] / seconds,
            "tokens_per_second": (float(sums["context_tokens"]) + float(sums["target_tokens"])) / seconds,
            **({"mfu": flop / seconds / (self.matrix_rate * ranks.world())} if self.matrix_rate else {}),
            "host_wait": (window.waited + window.waits.seconds()) / seconds,
            **gpu_use_of_ranks(self.accelerator.device),
        }

    def _retriever_loss(self, sums: dict[str, torch.Tensor | float]) -> dict[str, float]:
        """Where it is a loss of its own."""
        recipe = self.recipe
        if recipe.retriever_gradient not in retriever_losses.LOSS:
            return {}
        return {"retriever_loss": float(sums["retriever_loss"]) / sums["questions"]}

    def _validate(self, validation: Examples) -> dict[str, float]:
        losses = validation_loss(
            self.rag, validation, self.recipe.marginalization, max(VALIDATION_BATCH, self.settings.batch_size),
            self.recipe.reading,
        )  # fmt: skip
        loss = losses["val_loss_per_sequence"]
        if not math.isfinite(loss):
            self._say(
                f"validation loss {loss} at step {self.progress.step}: these weights are not taken for the best; training "
                "goes on, look at the learning rate, the precision and the validation questions"
            )
        elif loss < self.progress.best_loss:
            self._take_as_best(loss)
        return losses

    def _take_as_best(self, loss: float) -> None:
        self.progress.best_loss, self.progress.best_step = loss, self.progress.step
        self.keeper.save_best(self.progress.step)

    def _point(self, point: dict, on_point: Callable[[dict], None]) -> None:
        self.progress.history.append(point)
        if ranks.is_main():
            on_point(point)
