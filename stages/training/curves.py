"""Where the points of a training go: MLflow, TensorBoard, and the numbers of metrics/train.json."""

import json
import math
from pathlib import Path

from stages.settings.runs import Train
from stages.training.progress import Progress

# MLflow and TensorBoard draw what has the same word before its slash together, in alphabetical order: losses first.
TRACKED = {
    "train_loss_per_sequence": "loss/train",
    "val_loss_per_sequence": "loss/validation",
    "retriever_loss": "loss/retriever",
    "gold_nll": "loss/gold_passages",
    "train_loss_per_token": "loss/train_per_token",
    "val_loss_per_token": "loss/validation_per_token",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "question_encoder_gradient_norm": "optimizer/gradient_norm_question_encoder",
    "context_encoder_gradient_norm": "optimizer/gradient_norm_context_encoder",
    "cross_encoder_gradient_norm": "optimizer/gradient_norm_cross_encoder",
    "skipped_steps": "optimizer/skipped_steps",
    "overflow_steps": "optimizer/overflow_steps",
    "micro_batch": "optimizer/micro_batch",
    "prior_entropy": "retrieval/prior_entropy",
    "distinct_passages": "retrieval/distinct_passages",
    **{name: f"retrieval/{name}" for name in ("score_scale", "hybrid_weight", "cross_weight", "temperature")},
    "refresh_wait": "speed/index_refresh_wait",
}
SPEED = (
    "questions_seen", "questions_per_second", "seconds_per_step", "seconds_per_batch", "tokens_per_second", "mfu",
    "host_wait", "gpu_",
)  # fmt: skip


def tracked_name(name: str) -> str:
    """What MLflow and TensorBoard call a value of a logged point."""
    group = "speed" if name.startswith(SPEED) else "training"
    return TRACKED.get(name, f"{group}/{name}")


# Of the stages behind: file and key of a metric, and what MLflow calls it.
EARLIER = {
    ("retriever.json", "val_loss"): "retrieval/warmup_loss",
    ("lexical.json", "recall_at_20"): "retrieval/bm25_recall_at_20",
    ("reranker.json", "val_loss"): "retrieval/reranker_warmup_loss",
    ("index.json", "recall_of_exact_at_5"): "retrieval/index_recall_of_exact_at_5",
    ("encode.json", "passages_per_second"): "speed/encoded_passages_per_second",
}


def earlier_metrics(folder: Path) -> dict[str, float]:
    """What warm-up, BM25, encoding and index have measured, as far as they have."""
    found = {}
    for (file, key), name in EARLIER.items():
        if (folder / file).is_file():
            measured = json.loads((folder / file).read_text(encoding="utf-8"))
            found |= {name: measured[key]} if key in measured else {}
    return found


class Curves:
    """Sends each logged point to the tracker and, with a folder, to TensorBoard, under the same names.

    usual: values that say nothing, e.g. {"skipped_steps": 0}; such a curve begins where it leaves that value.

    A resumed training goes again through the steps behind its last checkpoint; those that its journal holds already are
    not sent twice, and TensorBoard forgets what a killed process had written beyond the first new point.
    """

    def __init__(self, tracker, board_folder: Path | None, usual: dict[str, float]):
        self.tracker, self.board_folder, self.usual = tracker, board_folder, usual
        self.logged = tracker.journal.logged_steps()
        self.board = None

    def point(self, point: dict) -> None:
        values = {
            tracked_name(name): value
            for name, value in point.items()
            if name != "step" and self.usual.get(name) != value
        }
        if point["step"] not in self.logged:
            self.tracker.log_metrics(values, step=point["step"])
        if self.board_folder is not None:
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.board_folder), purge_step=point["step"])
            for name, value in values.items():
                self.board.add_scalar(name, value, point["step"])
            self.board.flush()


def summary(progress: Progress, settings: Train, keeps_best: bool) -> dict[str, float]:
    """The numbers of metrics/train.json. The losses are those of the weights that are kept, at `kept_step`.

    A loss that is not finite is absent.
    """
    validated = [point for point in progress.history if "val_loss_per_sequence" in point]
    timed = [point for point in progress.history if "seconds_per_step" in point]
    kept = next(point for point in validated if point["step"] == progress.best_step) if keeps_best else validated[-1]
    seconds = progress.training_seconds
    losses = {
        "val_loss_per_sequence": kept["val_loss_per_sequence"],
        "val_loss_per_token": kept["val_loss_per_token"],
        "val_loss_before_training": validated[0]["val_loss_per_sequence"],
        "last_val_loss_per_sequence": validated[-1]["val_loss_per_sequence"],
    }
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)} | {
        "kept_step": kept["step"],
        "steps": progress.step,
        "questions_seen": progress.questions_seen,
        "questions_without_passages": progress.questions_without_passages,
        "val_questions_without_passages": kept["val_questions_without_passages"],
        "batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "seconds_per_step": seconds / progress.step,
        "seconds_per_batch": timed[-1]["seconds_per_batch"],
        "questions_per_second": progress.questions_seen / seconds,
        "tokens_per_second": timed[-1]["tokens_per_second"],
        "training_seconds": seconds,
        "skipped_steps": progress.skipped_steps,
        "overflow_steps": progress.overflow_steps,
        "micro_batch": progress.micro_batch or settings.batch_size,
    }
