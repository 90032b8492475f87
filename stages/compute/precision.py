"""The floating-point type that a device computes in: what a parameter asks for, and what the device has."""

import torch
from torch import nn


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU whose own units compute in bf16; older ones emulate it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(precision: str, device: torch.device) -> str:
    """accelerate's name of the precision that a recipe asks for on this device: 'no', 'bf16' or 'fp16'.

    Raises ValueError for fp16 on a CPU, where loss scaling has no kernels.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "no"
        return "bf16" if has_bf16(device) else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("recipes: precision: fp16 needs a GPU; use auto, bf16 or fp32 on a CPU")
    return "no" if precision == "fp32" else precision


def generator_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that a generator's weights decode in; "auto": bf16 on a GPU that has it, else fp32.

    Raises ValueError for fp16 on a CPU.
    """
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("evaluate.precision: fp16 needs a GPU; use auto, bf16 or fp32 on a CPU")
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model in place to what `from_pretrained(dtype=...)` gives: the frequencies of rotary positions stay fp32.

    Rounded to bf16 they are off by up to 0.4 %, which at position 1,000 is as much as four positions.
    """
    frequencies = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    model.to(dtype)
    for module, name, buffer in frequencies:
        setattr(module, name, buffer)
