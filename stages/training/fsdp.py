"""FSDP2 (Zhao et al. 2023, arXiv:2304.11277; torch's fully_shard): every rank holds a part of each trained tensor.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. A layer's weights are gathered for its forward and its
backward pass and given up again; gradients, moments and the weights themselves stay in parts. Gathering is a meeting of
all ranks, so all of them make the same number of forward passes. Under bf16 weights travel and work in bf16, where
autocast alone would keep embeddings and norms in fp32; gradients are summed and weights updated in fp32.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stages.compute import ranks
from stages.compute.out_of_memory import REMEDIES, is_out_of_memory
from stages.storage.checkpoints import part_of, whole

NOT_HONOURED = {
    "FSDP_OFFLOAD_PARAMS": "parameters stay on the GPUs; launch with --fsdp_offload_params false",
    "FSDP_ACTIVATION_CHECKPOINTING": "that is train.gradient_checkpointing here; launch without it",
    "FSDP_IGNORED_MODULES": "all is sharded that is trained; launch without it",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "all ranks share one copy of the models; launch without it",
}


@dataclass(frozen=True)
class Sharding:
    """What accelerate's configuration says about it."""

    layers: tuple[str, ...] = ()  # classes whose modules are gathered one by one; none: those that the models name
    reshard_after_forward: bool = True  # False: a layer's weights stay from its forward to its backward pass


def asked() -> Sharding | None:
    """What `accelerate launch --use_fsdp` asked for, None without it or with one process.

    From then on accelerate and transformers are not told of it: they would wrap and load the models their own way.
    Raises ValueError for FSDP 1 and for what is not honoured.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP_VERSION: version 1 is not supported; give --fsdp_version 2")
    for variable, remedy in NOT_HONOURED.items():
        if os.environ.get(variable, "false").lower() not in ("", "false", "0", "none"):
            raise ValueError(f"{variable} is set: {remedy}")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise ValueError(
            "FSDP_AUTO_WRAP_POLICY: SIZE_BASED_WRAP is not supported; give TRANSFORMER_BASED_WRAP or nothing"
        )
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return Sharding(
        tuple(name.strip() for name in named.split(",") if name.strip()),
        os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "0"),
    )


def check_retriever(reranker: str | None, learn_weights: bool) -> None:
    """Raises ValueError for what reads weights past the layers' forward passes, or would be a scalar in parts."""
    if reranker:
        raise ValueError(f"models.reranker: {reranker} does not train with FSDP; launch without it or set it to null")
    if learn_weights:
        raise ValueError("retriever.learn_weights: true does not work with FSDP; launch without it or set it to false")


def check_base(base: str | None) -> None:
    """Raises ValueError for frozen weights of another type than that of what learns beside them."""
    if base not in (None, "fp32"):
        raise ValueError(f"models.lora.base: {base} does not work with FSDP; use fp32 there, or launch without it")


def shard(rag: nn.Module, how: Sharding, device: torch.device, precision: str) -> None:
    """Replaces the weights of a Rag, in place and layer by layer, by this rank's part of them on `device`.

    `rag` may be on the CPU: a GPU holds its part and, one at a time, a layer or what is outside of the layers
    (embeddings, head). `precision` is accelerate's name, no or bf16. Raises ValueError for fp16, for layers that are not
    there or not always run, and where the ranks' weights differ.
    """
    if precision == "fp16":
        raise ValueError(
            "recipes: precision: fp16 does not work with FSDP, which has no loss scaling; use bf16 or fp32"
        )
    if any(getattr(module, "layerdrop", 0) for module in rag.modules()):
        raise ValueError(
            "models.generator: layers are left out at random (layerdrop), which FSDP's ranks would not do together; set "
            "it to 0 in the model's config.json"
        )
    named = {name for module in rag.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    classes = set(how.layers) or named
    if missing := set(how.layers) - {type(module).__name__ for module in rag.modules()}:
        raise ValueError(
            f"FSDP_TRANSFORMER_CLS_TO_WRAP: the models have no layers of class {', '.join(sorted(missing))}"
        )
    ranks.wait()  # however unequally long the disks took
    ranks.check_same("weights", sum(float(value.detach().double().sum()) for value in rag.parameters()))
    # They read weights past the layers, whose forward passes gather them.
    rag.packed, rag.generator.past_modules = None, False
    mesh = init_device_mesh(device.type, (ranks.world(),))
    # Left to autocast, a cast copy of every layer's weights would stay until the backward pass. Its operations remain.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float, cast_forward_inputs=False
    )
    for module in reversed(list(rag.modules())):  # what is inside first
        if type(module).__name__ in classes:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=how.reshard_after_forward)
    fully_shard(rag, mesh=mesh, mp_policy=policy, reshard_after_forward=how.reshard_after_forward)
    for module in rag.modules():
        if isinstance(module, FSDPModule):
            # An update is the sum over all questions. gloo knows no sum with a factor, NCCL needs none.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def missing_passes(rag: nn.Module, passes: int) -> int:
    """Forward passes that this rank has fewer than another one and must make too: 0 without FSDP. Asked before the first."""
    return ranks.most(passes) - passes if is_sharded(rag) else 0


def parts_of_moments(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state_dict of whole tensors, each replaced by this rank's part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        place: {
            name: part_of(value, parameters[place]) if isinstance(value, Tensor) else value
            for name, value in of.items()
        }
        for place, of in state["state"].items()
    }
    return state | {"state": moments}


def make_whole(rag: nn.Module) -> None:
    """Gives rank 0 all weights again, on the CPU, to be saved; every rank must call it. Nothing happens without FSDP."""
    if not is_sharded(rag):
        return
    rag.state_dict()  # its hooks give up what a forward pass has gathered
    found: dict[nn.Parameter, nn.Parameter] = {}  # tied ones once
    for module in rag.modules():
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in found:
                gathered = whole(parameter)
                found[parameter] = (
                    parameter if gathered is None else nn.Parameter(gathered.cpu(), parameter.requires_grad)
                )
            module._parameters[name] = found[parameter]


@contextmanager
def memory_errors(rag: nn.Module) -> Iterator[None]:
    """While open, running out of memory is a ValueError with FSDP: one rank cannot begin anew without the others."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (is_sharded(rag) and is_out_of_memory(error)):
            raise
        raise ValueError(
            f"out of memory, and with FSDP no pass is halved; lower train.batch_size, or {REMEDIES}"
        ) from error


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, the same on every rank."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
