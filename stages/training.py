"""The training loop: one code for every recipe.

accelerate carries precision, loss scaling, clipping and devices; the arithmetic of a step (which questions, divided by
what) comes from recipes.py, the loss from rag.py. A step is an optimizer step.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from stages import checkpoints as checkpointing
from stages import marginalization
from stages.checkpoints import Checkpoints
from stages.params import Recipe, Train
from stages.rag import Examples, Rag
from stages.recipes import Update, updates
from stages.throughput import DeviceGaps, matrix_rate, training_flop, weights_by_tokens

VALIDATION_BATCH = 16


@dataclass
class Progress:
    """Where a training stands; what a checkpoint must bring back besides weights and optimizer."""

    step: int = 0
    updates_taken: int = 0
    questions_seen: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    training_seconds: float = 0.0
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
    waits: DeviceGaps | None = None
    started: float = field(default_factory=time.perf_counter)


def validation_loss(rag: Rag, validation: Examples, marginal: str) -> dict[str, float]:
    """Mean NLL of the validation answers, without label smoothing, per sequence and per answer token, in nats.

    A recipe that averages is measured by the RAG-Sequence marginal too: one yardstick for recipes to be compared by.
    """
    measured = "token" if marginal == "token" else "sequence"
    was_training = rag.training
    rag.eval()
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(validation), VALIDATION_BATCH):
            rows = list(range(first, min(first + VALIDATION_BATCH, len(validation))))
            total += rag(rag.batch(validation, rows), marginal=measured).nll.double().sum().item()
    rag.train(was_training)
    return {
        "val_loss_per_sequence": total / len(validation),
        "val_loss_per_token": total / int(validation.target_mask.sum()),
    }


def make_optimizer(rag: Rag, settings: Train) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only."""
    trained = [parameter for parameter in rag.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
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


def _gpu_use(device: torch.device) -> dict[str, float]:
    """Percent of the GPU in use now and percent of its memory in use at the peak; nothing without a GPU."""
    if device.type != "cuda":
        return {}
    memory = 100 * torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
    try:
        return {"gpu_utilization": float(torch.cuda.utilization(device)), "gpu_memory": memory}
    except (ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is missing, or the driver does not answer
        return {}


class Trainer:
    """One training run of a RAG model under a recipe."""

    def __init__(self, rag: Rag, recipe: Recipe, settings: Train, precision: str, seed: int,
                 checkpoints: Checkpoints | None):  # fmt: skip
        device = next(rag.parameters()).device
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        self.rag, self.recipe, self.settings, self.seed = rag, recipe, settings, seed
        self.checkpoints = checkpoints
        self.model, self.optimizer = self.accelerator.prepare(rag, make_optimizer(rag, settings))
        self.schedule = make_schedule(self.optimizer.optimizer, settings)
        self.progress = Progress()
        self.sizes = weights_by_tokens(rag.question_encoder, rag.generator_model)
        self.matrix_rate = matrix_rate(
            device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float)
        )

    def run(self, training: Examples, validation: Examples, on_point: Callable[[dict], None]) -> None:
        """Trains up to `max_steps`; every logged point goes to `on_point` and into `progress.history`.

        Goes on from the latest checkpoint where there is one. Leaves the best weights in the model if the recipe keeps
        the best, else the last.
        """
        resumed = self._resume()  # before its progress is looked at: a checkpoint brings another one
        progress, settings = self.progress, self.settings
        if resumed:
            print(f"resumed at step {progress.step} of {settings.max_steps}")
        else:
            self._point({"step": 0, "questions_seen": 0, **self._validate(validation)}, on_point)
        stream = updates(
            len(training), self.seed, self.recipe, settings.batch_size, settings.gradient_accumulation_steps
        )
        stream = islice(stream, progress.updates_taken, None)
        bar = tqdm(total=settings.max_steps, initial=progress.step, desc="train", unit=" steps")
        window = self._window()
        self.rag.train()
        while progress.step < settings.max_steps:
            norms = self._step(stream, training, window)
            bar.update()
            last = progress.step == settings.max_steps
            point = {}
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
            if self.checkpoints and not last and progress.step % settings.save_steps == 0:
                pause = time.perf_counter()
                self._save()
                window.started += time.perf_counter() - pause
        bar.close()
        if self.recipe.checkpoints == "best":
            best = self.checkpoints.best() if self.checkpoints else None
            if best is not None:
                checkpointing.load_weights(self.rag, best)
        self.rag.eval()

    def _step(self, stream: Iterator[Update], training: Examples, window: Window) -> dict[str, torch.Tensor]:
        """Takes updates from the stream until one is applied; returns gradient norms."""
        while True:
            update = next(stream)
            for rows in update.micro_batches:
                self._accumulate(training, rows, update.divisor, window)
            self.progress.updates_taken += 1
            self.progress.questions_seen += update.questions
            if update.applied:
                break
            self.optimizer.zero_grad()
        norms = self._gradient_norms()
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16's loss scaling drops steps that overflow
            self.schedule.step()
        self.optimizer.zero_grad()
        window.waits.open()  # again: the optimizer's work is no waiting
        self.progress.step += 1
        window.steps += 1
        return norms

    def _window(self) -> Window:
        return Window(waits=DeviceGaps(self.accelerator.device))

    def _accumulate(self, training: Examples, rows: list[int], divisor: int, window: Window) -> None:
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
        gradients = [p.grad for p in self.rag.question_encoder.parameters() if p.grad is not None]
        zero = torch.zeros((), device=self.accelerator.device)
        of_encoder = torch.nn.utils.get_total_norm(gradients) if gradients else zero
        of_all = torch.nn.utils.clip_grad_norm_(self.rag.parameters(), self.settings.max_grad_norm)
        return {"gradient_norm": of_all, "question_encoder_gradient_norm": of_encoder}

    def _summary(self, window: Window, norms: dict[str, torch.Tensor]) -> dict[str, float]:
        values = {
            "train_loss_per_sequence": float(window.nll) / window.questions,
            "train_loss_per_token": float(window.nll) / float(window.target_tokens),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{name: float(norm) for name, norm in norms.items()},
            "prior_entropy": float(window.prior_entropy) / window.questions,
            "distinct_passages": float(window.distinct) / window.forwards,
        }
        seconds = time.perf_counter() - window.started  # read after the values above have waited for the device
        flop = training_flop(
            self.sizes, *map(float, (window.question_tokens, window.context_tokens, window.scored_tokens))
        )
        self.progress.training_seconds += seconds
        return values | {
            "seconds_per_step": seconds / window.steps,
            "seconds_per_batch": seconds / window.forwards,
            "questions_per_second": window.questions / seconds,
            "tokens_per_second": (float(window.context_tokens) + float(window.target_tokens)) / seconds,
            "mfu": flop / seconds / self.matrix_rate,
            "host_wait": window.waits.seconds() / seconds,
            **_gpu_use(self.accelerator.device),
        }

    def _validate(self, validation: Examples) -> dict[str, float]:
        losses = validation_loss(self.rag, validation, self.recipe.marginalization)
        if losses["val_loss_per_sequence"] < self.progress.best_loss:
            self.progress.best_loss = losses["val_loss_per_sequence"]
            self.progress.best_step = self.progress.step
            if self.checkpoints and self.recipe.checkpoints == "best":
                self.checkpoints.save_best(checkpointing.own_weights(self.rag))
        return losses

    def _point(self, point: dict, on_point: Callable[[dict], None]) -> None:
        self.progress.history.append(point)
        on_point(point)

    def _save(self) -> None:
        state = {
            "progress": vars(self.progress),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "random": checkpointing.random_state(),
        }
        self.checkpoints.save(self.progress.step, checkpointing.own_weights(self.rag), state)

    def _resume(self) -> bool:
        found = self.checkpoints.latest() if self.checkpoints else None
        if found is None:
            return False
        weights, state = found
        checkpointing.load_weights(self.rag, weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        checkpointing.set_random_state(state["random"])
        self.progress = Progress(**state["progress"])
        return True
