"""The training loop: one code for every recipe.

accelerate carries precision, loss scaling, clipping and devices; the arithmetic of a step (which questions, divided by
what) comes from recipes.py, the loss from rag.py. A step is an optimizer step.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from stages import checkpoints as checkpointing
from stages import marginalization, ranks, sharding
from stages.checkpoints import Checkpoints
from stages.interrupts import Interrupted
from stages.micro_batches import free_memory, halved, in_batches, is_out_of_memory, split
from stages.params import Recipe, Train
from stages.rag import Examples, Rag
from stages.recipes import Update, check_ranks, updates
from stages.refresh import Refresh, split_snapshots
from stages.skips import Skips, step_unless
from stages.throughput import DeviceGaps, gpu_use, matrix_rate, training_flop, weights_by_tokens

VALIDATION_BATCH = 16
SUMS = (
    "nll",
    "context_tokens",
    "prior_entropy",
    "distinct",
    "target_tokens",
    "question_tokens",
    "scored_tokens",
    "questions",
    "forwards",
)  # of a Window


@dataclass
class Progress:
    """Where a training stands; what a checkpoint must bring back besides weights and optimizer."""

    step: int = 0
    updates_taken: int = 0
    questions_seen: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    training_seconds: float = 0.0
    skipped_steps: int = 0  # their gradient was not finite
    overflow_steps: int = 0  # the same under fp16's loss scaling, which looks for its scale
    skipped_in_a_row: int = 0
    micro_batch: int | None = None  # most questions a forward pass since memory ran out; None: it never did
    halvings: list[str] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)


@dataclass
class Window:
    """Sums since the last logged point, kept on the device so that logging alone waits for it."""

    nll: torch.Tensor | float = 0.0
    question_tokens: torch.Tensor | float = 0.0
    context_tokens: torch.Tensor | float = 0.0
    prior_entropy: torch.Tensor | float = 0.0
    distinct: torch.Tensor | float = 0.0
    target_tokens: torch.Tensor | float = 0.0
    scored_tokens: torch.Tensor | float = 0.0
    questions: int = 0
    forwards: int = 0
    steps: int = 0
    waited: float = 0.0  # seconds that the device waited for the host before a checkpoint
    waits: DeviceGaps | None = None  # and since
    started: float = field(default_factory=time.perf_counter)

    def state(self) -> dict:
        """The sums, to be given back to `restore`: of this window, or of another process's that goes on with it."""
        sums = {
            name: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor | int | float)
        }
        return sums | {"started": time.perf_counter() - self.started}

    def restore(self, state: dict, device: torch.device) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(device, copy=True) if isinstance(value, torch.Tensor) else value)
        self.started = time.perf_counter() - state["started"]


def validation_loss(
    rag: Rag, validation: Examples, marginal: str, batch_size: int = VALIDATION_BATCH
) -> dict[str, float]:
    """Mean NLL of the validation answers, without label smoothing, per sequence and per answer token, in nats.

    A recipe that averages is measured by the RAG-Sequence marginal too: one yardstick for recipes to be compared by.
    Every rank takes its share of the answers and returns the same sums; with FSDP equally many, some for nothing.
    """
    measured = "token" if marginal == "token" else "sequence"
    was_training = rag.training
    rag.eval()

    mine = ranks.share(list(range(len(validation))))
    counted = len(mine)
    mine += [0] * sharding.missing_passes(rag, counted)

    def loss(places: list[int]) -> float:
        output = rag(rag.batch(validation, [mine[place] for place in places]), marginal=measured)
        return output.nll[: max(0, counted - places[0])].double().sum().item()

    with torch.no_grad():
        total = sum(in_batches(len(mine), batch_size, loss, halve=not sharding.is_sharded(rag)))
    rag.index.finish_searches()
    total = ranks.summed({"nll": total})["nll"]
    rag.train(was_training)
    return {
        "val_loss_per_sequence": total / len(validation),
        "val_loss_per_token": total / int(validation.target_mask.sum()),
    }


def make_optimizer(rag: Rag, settings: Train) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only; the encoders' rates may be their own."""
    parts = [(rag, settings.learning_rate)]
    if settings.question_encoder_learning_rate is not None or rag.context_encoder:
        of_questions = settings.question_encoder_learning_rate or settings.learning_rate
        parts = [(rag.generator_model, settings.learning_rate), (rag.question_encoder, of_questions)]
    if rag.context_encoder:
        parts.append((rag.context_encoder, settings.context_encoder_learning_rate or of_questions))
    groups = []
    for module, rate in parts:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        others = [parameter for parameter in trained if parameter.dim() <= 1]
        groups += [
            {"params": matrices, "weight_decay": settings.weight_decay, "lr": rate},
            {"params": others, "weight_decay": 0.0, "lr": rate},
        ]
    return AdamW(groups, lr=settings.learning_rate, fused=next(rag.parameters()).is_cuda)


def make_schedule(optimizer, settings: Train) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then linear decay to zero at `max_steps`."""
    warmup, total = settings.warmup_steps, settings.max_steps
    return LambdaLR(
        optimizer,
        lambda step: (step + 1) / (warmup + 1) if step < warmup else max(0.0, (total - step) / (total - warmup)),
    )


def distinct_share(rows: torch.Tensor) -> torch.Tensor:
    """Distinct over all retrieved passages of `rows` (-1: missing), without waiting for the device."""
    ordered = rows.flatten().sort().values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    present = ordered >= 0
    return (first & present).sum() / present.sum().clamp(min=1)


class Trainer:
    """One training run of a RAG model under a recipe."""

    def __init__(self, rag: Rag, recipe: Recipe, settings: Train, precision: str, seed: int,
                 checkpoints: Checkpoints | None, skips: Skips | None = None, keep_threads: bool = False):  # fmt: skip
        check_ranks(recipe, ranks.world())
        device = next(rag.parameters()).device
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        self.rag, self.recipe, self.settings, self.seed = rag, recipe, settings, seed
        self.sharded = sharding.is_sharded(rag)
        self.checkpoints = checkpoints
        if settings.gradient_checkpointing:
            # The generator's alone: a question is short, its encoder keeps little.
            rag.generator_model.gradient_checkpointing_enable({"use_reentrant": False})
        # Precision only ("evaluation"): DDP would average gradients, but an update is the sum over all questions.
        self.model = self.accelerator.prepare_model(rag, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(rag, settings))
        self.schedule = make_schedule(self.optimizer.optimizer, settings)
        self.progress = Progress()
        self.refresh = Refresh(rag, settings.index_refresh_steps, settings.max_steps)
        self.skips = skips or Skips(settings.max_skipped_steps)
        self.skips.overflow = self.accelerator.scaler is not None
        self.keep_threads = keep_threads
        self.writer, self.writing = ThreadPoolExecutor(max_workers=1), Future()
        self.writing.set_result(None)
        self.copies: dict[str, list] = {}  # of the last checkpoint and the last best weights, to be written over
        self.sizes = weights_by_tokens(rag.question_encoder, rag.generator_model)
        self.matrix_rate = matrix_rate(
            device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float)
        )

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
            with sharding.memory_errors(self.rag):
                self._run(training, validation, on_point, asked_to_stop)
        finally:
            self.refresh.close()
            self.writing.result()

    def _run(
        self, training: Examples, validation: Examples, on_point: Callable[[dict], None],
        asked_to_stop: Callable[[], int | None],
    ) -> None:  # fmt: skip
        if self._restore_finished():
            self._say(f"trained already, {self.progress.step} steps: the model is written again")
            return
        window = self._window()
        resumed = self._resume(window)  # before its progress is looked at: a checkpoint brings another one
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
        self.rag.train()
        while progress.step < settings.max_steps:
            norms = self._step(stream, training, window)
            bar.update()
            last = progress.step == settings.max_steps
            point = self.refresh.after(progress.step)
            if last or progress.step % settings.logging_steps == 0:
                point |= self._summary(window, norms)
                window = self._window()
            if last or progress.step % settings.eval_steps == 0:
                pause = time.perf_counter()
                point |= self._validate(validation)
                window.started += time.perf_counter() - pause
                bar.set_postfix_str(f"val loss {point['val_loss_per_sequence']:.3f}")
            if point:
                window.waits.opened = None  # validating and logging are no waiting for the host
                self._point({"step": progress.step, "questions_seen": progress.questions_seen, **point}, on_point)
            stop = ranks.most(asked_to_stop() or 0)
            if self.checkpoints and not last and (stop or progress.step % settings.save_steps == 0):
                pause = time.perf_counter()
                self._save(window)
                window.started += time.perf_counter() - pause
            if stop and not last:
                bar.close()
                self._interrupt(stop)
        bar.close()
        self.skips.settle(progress)
        self.rag.eval()
        if self.checkpoints:
            self._finish()
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

    def _write(self, write: Callable, step: int, state: list, *what) -> None:
        """Writes a copy of `state` beside the steps to come: a disk takes half a minute for BART-large and its optimizer.

        One at a time, or copies would pile up in memory; what went wrong with the last one is raised here. Every rank
        comes by: rank 0 writes what it holds, or what all of them hold a part of.
        """
        self.writing.result()
        if self.sharded:
            ranks.wait()  # for rank 0's disk
        elif not ranks.is_main():
            return
        copies = checkpointing.snapshot(state, self.copies.get(write.__name__))
        if ranks.is_main():
            self.copies[write.__name__] = copies
            self.writing = self.writer.submit(write, step, *copies, *what)

    def _finish(self) -> None:
        """Brings back the weights that the recipe keeps, and keeps them until DVC has taken the model."""
        self.writing.result()
        ranks.wait()  # until rank 0 has written what all read
        if self.recipe.checkpoints == "best":
            checkpointing.load_weights(self.rag, self.checkpoints.best(self.progress.best_step))
        sharding.make_whole(self.rag)
        ranks.wait()  # until all have read what rank 0 replaces
        if ranks.is_main():
            self.checkpoints.finish(checkpointing.own_weights(self.rag), {"progress": vars(self.progress)})
        ranks.wait()

    def _restore_finished(self) -> bool:
        found = self.checkpoints.finished() if self.checkpoints else None
        if found is None:
            return False
        weights, state = found
        checkpointing.load_weights(self.rag, weights)
        sharding.make_whole(self.rag)
        self.progress = Progress(**state["progress"])
        self.rag.eval()
        return True

    def _step(self, stream: Iterator[Update], training: Examples, window: Window) -> dict[str, torch.Tensor]:
        """Takes updates from the stream until one is applied; returns gradient norms."""
        while True:
            update = next(stream)
            self._accumulate_all(training, update, window)
            self.progress.updates_taken += 1
            self.progress.questions_seen += update.questions
            if update.applied:
                break
            self.optimizer.zero_grad()
        if not self.sharded:  # a sharded model's are sums already
            ranks.sum_gradients(self.rag.parameters())
        norms = self._gradient_norms()
        self._step_if_finite(update.rows, norms["gradient_norm"])
        if not self.accelerator.optimizer_step_was_skipped:  # fp16's loss scaling drops steps that overflow
            self.schedule.step()
        self.optimizer.zero_grad()
        window.waits.open()  # again: the optimizer's work is no waiting
        self.progress.step += 1
        window.steps += 1
        return norms

    def _window(self) -> Window:
        return Window(waits=DeviceGaps(self.accelerator.device))

    def _accumulate_all(self, training: Examples, update: Update, window: Window) -> None:
        """The gradients of an update; where memory runs out, anew from zero in forward passes of half the size.

        Of a rank's share only; where one rank runs out of memory, all of them begin anew. With FSDP none does, and who has
        fewer passes makes further ones that weigh nothing.
        """
        before, random = window.state(), checkpointing.random_state()
        while True:
            rows: list[int] = []
            failed = size = ranks.NOBODY
            try:
                passes = split(self._share(update), self.progress.micro_batch)
                missing = sharding.missing_passes(self.rag, len(passes))
                for rows in passes:
                    self._accumulate(training, rows, update.divisor, window)
                for _ in range(missing):
                    self._accumulate(training, update.rows[:1], math.inf, self._window())
            except (RuntimeError, MemoryError) as error:
                if self.sharded or not (self.settings.halve_on_oom and is_out_of_memory(error)):
                    raise
                failed, size = len(rows), halved(len(rows))
            self.rag.index.finish_searches()
            failed, size = ranks.least([failed, size])
            if size == ranks.NOBODY:
                return
            self.optimizer.zero_grad()
            free_memory()
            window.restore(before, self.accelerator.device)
            checkpointing.set_random_state(random)
            self._note_halving(failed, size)

    def _share(self, update: Update) -> list[list[int]]:
        """The forward passes of this rank: a share of the update's questions, batch_size together."""
        if ranks.world() == 1:
            return update.micro_batches
        return split([ranks.share(update.rows)], self.settings.batch_size)

    def _note_halving(self, failed: int, size: int) -> None:
        self.progress.micro_batch = size
        step = self.progress.step + 1
        self.progress.halvings.append(f"step {step}: {failed} -> {size}")
        self._say(
            f"out of memory at step {step} with {failed} questions a forward pass: {size} from here on, the same update "
            f"in more passes (train.batch_size: {size} saves the attempt)"
        )

    def _step_if_finite(self, rows: list[int], gradient_norm: torch.Tensor) -> None:
        bad = ~torch.isfinite(gradient_norm)
        step_unless(bad, self.optimizer, scaled=self.accelerator.scaler is not None)
        self.skips.note(self.progress.step + 1, rows, bad, self.progress)

    def _accumulate(self, training: Examples, rows: list[int], divisor: float, window: Window) -> None:
        if window.waits.opened is None:
            window.waits.open()
        batch = self.rag.batch(training, rows)
        window.waits.close()
        output = self.model(
            batch,
            marginal=self.recipe.marginalization,
            retriever_gradient=self.recipe.retriever_gradient,
            label_smoothing=self.settings.label_smoothing,
        )
        self.accelerator.backward(output.nll.sum() / divisor)
        window.nll += output.nll.detach().sum()
        window.question_tokens += batch.question_mask.sum()
        window.context_tokens += output.context_tokens
        window.target_tokens += batch.target_mask.sum()
        window.scored_tokens += batch.target_mask.sum() * output.rows.shape[1]
        window.prior_entropy += marginalization.normalized_entropy(output.log_prior).sum()
        window.distinct += distinct_share(output.rows)
        window.questions += len(rows)
        window.forwards += 1
        window.waits.open()

    def _gradient_norms(self) -> dict[str, torch.Tensor]:
        self.accelerator.unscale_gradients()
        norms = {}
        for name in ("question_encoder", "context_encoder"):
            if encoder := getattr(self.rag, name):
                gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
                zero = torch.zeros((), device=self.accelerator.device)
                norms[f"{name}_gradient_norm"] = sharding.total_norm(gradients) if gradients else zero
        trained = [parameter for parameter in self.rag.parameters() if parameter.grad is not None]
        of_all = sharding.total_norm([parameter.grad for parameter in trained])
        torch.nn.utils.clip_grads_with_norm_(trained, self.settings.max_grad_norm, of_all)
        return {"gradient_norm": of_all, **norms}

    def _summary(self, window: Window, norms: dict[str, torch.Tensor]) -> dict[str, float]:
        self.skips.settle(self.progress)
        sums = ranks.summed({name: getattr(window, name) for name in SUMS})
        values = {
            "skipped_steps": self.progress.skipped_steps,
            "overflow_steps": self.progress.overflow_steps,
            "micro_batch": self.progress.micro_batch or self.settings.batch_size,
            "train_loss_per_sequence": float(sums["nll"]) / sums["questions"],
            "train_loss_per_token": float(sums["nll"]) / float(sums["target_tokens"]),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{name: float(norm) for name, norm in norms.items()},
            "prior_entropy": float(sums["prior_entropy"]) / sums["questions"],
            "distinct_passages": float(sums["distinct"]) / sums["forwards"],
        }
        seconds = time.perf_counter() - window.started  # read after the values above have waited for the device
        flop = training_flop(
            self.sizes, *(float(sums[kind]) for kind in ("question_tokens", "context_tokens", "scored_tokens"))
        )
        self.progress.training_seconds += seconds
        return values | {
            "seconds_per_step": seconds / window.steps,
            "seconds_per_batch": seconds / max(1, window.forwards),  # this rank's
            "questions_per_second": sums["questions"] / seconds,
            "tokens_per_second": (float(sums["context_tokens"]) + float(sums["target_tokens"])) / seconds,
            "mfu": flop / seconds / (self.matrix_rate * ranks.world()),
            "host_wait": (window.waited + window.waits.seconds()) / seconds,
            **gpu_use(self.accelerator.device),
        }

    def _validate(self, validation: Examples) -> dict[str, float]:
        losses = validation_loss(
            self.rag, validation, self.recipe.marginalization, max(VALIDATION_BATCH, self.settings.batch_size)
        )
        if losses["val_loss_per_sequence"] < self.progress.best_loss:
            self.progress.best_loss = losses["val_loss_per_sequence"]
            self.progress.best_step = self.progress.step
            if self.checkpoints and self.recipe.checkpoints == "best":
                self._write(self.checkpoints.save_best, self.progress.step, [checkpointing.own_tensors(self.rag)])
                ranks.wait()
        return losses

    def _point(self, point: dict, on_point: Callable[[dict], None]) -> None:
        self.progress.history.append(point)
        if ranks.is_main():
            on_point(point)

    def _save(self, window: Window) -> None:
        """Writes what rank 0 holds and the sums of all ranks: any number of ranks may go on from there."""
        self.skips.settle(self.progress)
        sums = ranks.summed({name: getattr(window, name) for name in SUMS})
        window.waited += window.waits.seconds()
        window.waits.gaps.clear()
        self._write_step(window.state() | (sums if ranks.world() > 1 else {}))
        ranks.wait()

    def _write_step(self, window: dict) -> None:
        state = {
            "progress": vars(self.progress),
            "window": window,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "random": checkpointing.random_state(),
            "threads": torch.get_num_threads(),
            "ranks": ranks.world(),
        }
        best = self.progress.best_step if self.recipe.checkpoints == "best" else None
        weights = checkpointing.own_tensors(self.rag) | self.refresh.tensors()
        self._write(self.checkpoints.save, self.progress.step, [weights, state], best)

    def _resume(self, window: Window) -> bool:
        found = self.checkpoints.latest() if self.checkpoints else None
        if found is None:
            return False
        weights, state = found
        weights, snapshots = split_snapshots(weights)
        checkpointing.load_weights(self.rag, weights)
        self.optimizer.load_state_dict(sharding.parts_of_moments(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        checkpointing.set_random_state(state["random"])
        if ranks.is_main():  # the sums of all ranks
            window.restore(state["window"], self.accelerator.device)
        self.progress = Progress(**state["progress"])
        if self.accelerator.device.type == "cpu" and state["ranks"] == ranks.world():
            checkpointing.restore_threads(state["threads"], self.keep_threads)
        self.refresh.restore(snapshots, self.progress.step)
        return True
