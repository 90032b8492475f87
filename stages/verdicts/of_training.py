"""Verdicts on a training: does the loss fall, does retrieval hold, is the machine used."""

import math

from stages.settings.runs import Signs
from stages.verdicts.sign import Sign, Verdicts


def training_signs(history: list[dict], metrics: dict[str, float], limits: Signs, on_gpu: bool) -> Verdicts:
    """Verdicts from a training's logged points and its summary."""
    last = [point for point in history if "prior_entropy" in point][-1]
    before, after = (metrics.get(name, math.nan) for name in ("val_loss_before_training", "val_loss_per_sequence"))
    drop = (before - after) / before
    # Not finite before training: no drop to tell of. Not finite after it: bad, whatever it was before.
    fell = None if math.isnan(before) and not math.isnan(after) else drop >= limits.val_loss_drop
    change = f" ({100 * drop:.0f} % less; at least {100 * limits.val_loss_drop:.0f} %)" if not math.isnan(drop) else ""
    batch = metrics["seconds_per_batch"]
    signs = [
        Sign(
            "val_loss", fell, f"validation loss {before:.3f} -> {after:.3f}{change}",
            "the loss is not falling: try train.learning_rate 1e-5 or 5e-5 (large models), more steps, or the recipe `new`",
        ),
        Sign(
            "speed", batch <= limits.seconds_per_batch if on_gpu else None,
            f"{batch:.2f} s a batch (at most {limits.seconds_per_batch:g} on a GPU)",
            "use batching: true_batches and precision: auto, and a larger train.batch_size",
        ),
        Sign(
            "retrieval", last["distinct_passages"] >= limits.distinct_passages,
            f"{100 * last['distinct_passages']:.0f} % of a batch's retrieved passages are distinct "
            f"(at least {100 * limits.distinct_passages:.0f} %)",
            "retrieval collapsed, every question finds the same passages: lower train.learning_rate, raise retriever.steps",
        ),
        Sign(
            "prior", last["prior_entropy"] <= limits.prior_entropy,
            f"prior entropy {last['prior_entropy']:.3f} of its maximum (at most {limits.prior_entropy:g})",
            "the prior is flat, scores do not tell passages apart: raise retriever.steps; check the question encoder's gradient",
        ),
    ]  # fmt: skip
    validated = {point["step"]: point["val_loss_per_sequence"] for point in history if "val_loss_per_sequence" in point}
    if finite := {step: loss for step, loss in validated.items() if math.isfinite(loss)}:
        lowest, last_step = min(finite, key=finite.get), max(finite)
        rise = finite[last_step] / finite[lowest] - 1
        signs.append(
            Sign(
                "overfitting", rise <= limits.val_loss_rise,
                f"validation loss lowest at step {lowest} of {last_step}, the last {100 * rise:.0f} % above it (at most "
                f"{100 * limits.val_loss_rise:.0f} %)",
                f"the steps behind it learned the training questions by heart: train.max_steps near {lowest}, or more questions",
            )
        )  # fmt: skip
    if count := metrics.get("questions_without_passages", 0) + metrics.get("val_questions_without_passages", 0):
        signs.append(
            Sign(
                "finds_passages", False,
                f"{count} times training and validation found no passage and went on from the question alone",
                "raise index.nprobe or index.ef_search, or take index.factory: Flat",
            )
        )  # fmt: skip
    measured = [point for point in history if "gpu_utilization" in point]
    utilization = sum(point["gpu_utilization"] for point in measured) / len(measured) if measured else None
    memory = max(point["gpu_memory"] for point in measured) if measured else None
    signs.append(
        Sign(
            "gpu_utilization", utilization >= limits.gpu_utilization if measured else None,
            f"GPU {utilization:.0f} % busy (at least {limits.gpu_utilization:g} %)" if measured else "GPU use: no GPU",
            "the GPU waits for the host: raise train.batch_size",
        )
    )  # fmt: skip
    signs.append(
        Sign(
            "gpu_memory", memory >= limits.gpu_memory if measured else None,
            f"GPU memory {memory:.0f} % full (at least {limits.gpu_memory:g} %)" if measured else "GPU memory: no GPU",
            "memory lies idle: raise train.batch_size and lower train.gradient_accumulation_steps",
        )
    )  # fmt: skip
    return Verdicts(signs)
