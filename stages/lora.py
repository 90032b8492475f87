"""Low-rank adapters for a generator (Hu et al. 2021, arXiv:2106.09685) through peft: W + (alpha / rank) B A, W frozen.

Training sees the adapters as ordinary weights. What is saved is the merged model, which loads without peft.
"""

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without adapters: W + (alpha / rank) B A under the names that W had before."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    weights = {}
    for name, value in model.state_dict().items():
        layer, _, rest = name.partition(".base_layer.")
        if layer in layers and rest:
            for adapter in layers[layer].active_adapters if rest == "weight" else ():
                value = value + layers[layer].get_delta_weight(adapter).to(value.dtype)
            weights[f"{layer}.{rest}"] = value
        elif not any(part.startswith("lora_") for part in name.split(".")):
            weights[name] = value
    return weights
