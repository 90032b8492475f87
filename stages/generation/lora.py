"""Low-rank adapters for a generator (Hu et al. 2021, arXiv:2106.09685) through peft: W + (alpha / rank) B A, W frozen.

Training sees the adapters as ordinary weights. At its end they are merged into the model, which then loads without peft.
"""

from torch import nn

from stages.params import Lora


def add_lora(model: nn.Module, settings: Lora) -> None:
    """Puts adapters into the model, in place, and freezes everything else. B starts at zero: the model's output is the same.

    ValueError where `target_modules` names nothing in this model or peft knows no default for it.
    """
    from peft import LoraConfig, inject_adapter_in_model  # 2 s that runs without adapters need not wait for

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=targets if targets in (None, "all-linear") else list(targets),
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"models.lora.target_modules: no adapters for a {model.config.model_type}: {reason}") from None


def merge_lora(model: nn.Module) -> None:
    """Makes a model with adapters a plain one, in place: W becomes W + (alpha / rank) B A. Nothing happens without them."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "get_delta_weight"):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
