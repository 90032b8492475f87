"""Optimizer, learning rates and gradient norms of a training."""

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from stages.rag.model import Rag
from stages.settings.runs import Train
from stages.training import fsdp


def make_optimizer(rag: Rag, settings: Train) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only; the rates of encoders, reranker and prior may be
    their own."""
    parts = [(rag, settings.learning_rate)]
    own = settings.question_encoder_learning_rate is not None or settings.reranker_learning_rate is not None
    if own or rag.context_encoder or rag.prior.log_factors is not None:
        of_questions = settings.question_encoder_learning_rate or settings.learning_rate
        parts = [(rag.generator_model, settings.learning_rate), (rag.question_encoder, of_questions)]
        if rag.context_encoder:
            parts.append((rag.context_encoder, settings.context_encoder_learning_rate or of_questions))
        if rag.cross_encoder:
            parts.append((rag.cross_encoder, settings.reranker_learning_rate or of_questions))
        if rag.prior.log_factors is not None:
            parts.append((rag.prior, settings.prior_learning_rate))
    groups = []
    for module, rate in parts:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        others = [parameter for parameter in trained if parameter.dim() <= 1]
        groups += [
            {"params": matrices, "weight_decay": settings.weight_decay, "lr": rate},
            {"params": others, "weight_decay": 0.0, "lr": rate},
        ]
    return AdamW(groups, lr=settings.learning_rate, fused=True)


def make_schedule(optimizer, settings: Train) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then linear decay to zero at `max_steps`."""
    warmup, total = settings.warmup_steps, settings.max_steps
    return LambdaLR(
        optimizer,
        lambda step: (step + 1) / (warmup + 1) if step < warmup else max(0.0, (total - step) / (total - warmup)),
    )


def clipped_norms(rag: Rag, max_norm: float) -> dict[str, torch.Tensor]:
    """Norms of the gradients, of all together and of the encoders alone, before all are clipped to `max_norm`."""
    norms = {}
    for name in ("question_encoder", "context_encoder", "cross_encoder"):
        if encoder := getattr(rag, name):
            gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
            zero = torch.zeros((), device=next(encoder.parameters()).device)
            norms[f"{name}_gradient_norm"] = fsdp.total_norm(gradients) if gradients else zero
    trained = [parameter for parameter in rag.parameters() if parameter.grad is not None]
    of_all = fsdp.total_norm([parameter.grad for parameter in trained])
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, of_all)
    return {"gradient_norm": of_all, **norms}
