"""train, recipes, evaluate, signs, tracking, runtime: a training, its evaluation, and where and how they run."""

from typing import Annotated, Literal

from pydantic import Field

from stages.settings.section import Count, Name, Positive, Rate, Section, Share


class Train(Section):
    recipe: Name
    seed: Count
    max_steps: Positive
    batch_size: Positive
    gradient_accumulation_steps: Positive
    learning_rate: Rate
    question_encoder_learning_rate: Rate | None
    context_encoder_learning_rate: Rate | None
    reranker_learning_rate: Rate | None
    prior_learning_rate: Rate
    positives_weight: Annotated[float, Field(ge=0)]
    warmup_steps: Count
    weight_decay: Share
    max_grad_norm: Annotated[float, Field(gt=0)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    save_total_limit: Positive
    gradient_checkpointing: bool
    compile: bool
    bf16_copy: bool
    halve_on_oom: bool
    max_skipped_steps: Positive
    index_refresh_steps: Count
    answers: Literal["first", "drawn"]


# exact is the gradient of the likelihood itself, where that depends on the prior; the others are losses beside it.
RETRIEVER_GRADIENTS = {
    "each": ("exact", "none"),
    "weighted": ("exact", "none"),
    "together": ("emdr2", "perplexity_distillation", "none"),
    "parallel": ("emdr2", "perplexity_distillation", "none"),
}


class Recipe(Section):
    reading: Literal["each", "together", "weighted", "parallel"]
    marginalization: Literal["sequence", "token", "average"]
    accumulation: Literal["across_batches", "within_batch"]
    batching: Literal["true_batches", "one_at_a_time"]
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    checkpoints: Literal["best", "last"]
    tensorboard: bool
    retriever_gradient: Literal["exact", "emdr2", "perplexity_distillation", "none"]


class Evaluate(Section):
    split: Literal["test", "validation"]
    num_samples: Positive | None
    further_depths: list[Annotated[int, Field(ge=1, le=1000)]]
    decoding: Literal["thorough", "fast"]
    num_beams: Positive
    batch_size: Positive
    precision: Literal["auto", "bf16", "fp16", "fp32"]


class Signs(Section):
    seconds_per_batch: Annotated[float, Field(gt=0)]
    gpu_utilization: Annotated[float, Field(ge=0, le=100)]
    gpu_memory: Annotated[float, Field(ge=0, le=100)]
    val_loss_drop: Annotated[float, Field(ge=0)]
    val_loss_rise: Annotated[float, Field(ge=0)]
    exact_match: Annotated[float, Field(ge=0, le=100)]
    distinct_passages: Share
    prior_entropy: Share


class Tracking(Section):
    experiment: Name
    system_metrics_seconds: Annotated[float, Field(ge=0)]
    model_gigabytes: Annotated[float, Field(ge=0)]


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"]
    threads: Count
    processes: Count
    cuda_graphs: bool
