"""Low-rank adapters for a generator (Hu et al. 2021, arXiv:2106.09685) through peft: W + (alpha / rank) B A, W frozen.

Training sees the adapters as ordinary weights, in fp32 whatever the frozen weights are kept in: fp32, bf16, or 8 and 4 bits
by bitsandbytes (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339; QLoRA's NF4, Dettmers et al. 2023, arXiv:2305.14314).
At its end they are merged into the model, which then loads without peft and without bitsandbytes.
"""

from importlib.util import find_spec

import torch
from torch import nn

from stages.compute.precision import has_bf16
from stages.settings.retrieval import Lora

KEY = "models.lora.base"
QUANTIZED = ("8bit", "4bit")
QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")


def check_base(base: str, device_type: str) -> None:
    """Raises ValueError where weights of 8 or 4 bits cannot be had: without bitsandbytes, without a GPU."""
    if base not in QUANTIZED:
        return
    if device_type != "cuda":
        raise ValueError(f"{KEY}: {base} needs a GPU; use bf16 or fp32 on a CPU")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{KEY}: {base} needs the package bitsandbytes: pip install bitsandbytes; or use bf16")


def loading(base: str, device: torch.device) -> dict:
    """What `from_pretrained` takes for frozen weights of this kind; weights of 8 and 4 bits are made on the GPU.

    Raises ValueError as `check_base` does.
    """
    check_base(base, device.type)
    return (
        quantized(base, device) if base in QUANTIZED else {"dtype": torch.bfloat16 if base == "bf16" else torch.float}
    )


def quantized(base: str, device: torch.device) -> dict:
    """The same of 8 and 4 bits alone, unchecked."""
    from transformers import BitsAndBytesConfig

    computed_in = torch.bfloat16 if has_bf16(device) or device.type == "cpu" else torch.float16
    if base == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computed_in,
        )  # fmt: skip
    return {"dtype": computed_in, "quantization_config": config, "device_map": {"": device}}


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
    # peft gives them the type of the weights beside them: in bf16 most of Adam's small steps would be rounded away.
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Makes a model with adapters a plain one, in place: W becomes W + (alpha / rank) B A. Nothing happens without them.

    The sum is made in fp32, then rounded to the type of W. Weights of 8 and 4 bits become what they stand for, in the type
    that they were computed in, the adapted ones and all others: rounded back to their few bits the adapters would be lost.
    """
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "get_delta_weight"):
            base = plain(layer.get_base_layer(), model.config.dtype)
            [adapter] = layer.active_adapters
            base.weight.copy_(base.weight.float() + layer.get_delta_weight(adapter).float())
            model.set_submodule(name, base)
    if getattr(model, "hf_quantizer", None) is not None:
        for name, layer in list(model.named_modules()):
            if type(layer).__name__ in QUANTIZED_LAYERS:
                model.set_submodule(name, plain(layer, model.config.dtype))
        model.hf_quantizer.remove_quantization_config(model)


def plain(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A layer of 8 or 4 bits as an ordinary one of this type; any other as it is."""
    if type(layer).__name__ not in QUANTIZED_LAYERS:
        return layer
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer).to(dtype)
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return made
