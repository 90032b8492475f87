"""How much of the machine a training step uses: FLOP that the mathematics needs over FLOP that the device could do.

MFU is counted from weights and real tokens (Chowdhery et al. 2022, appendix B): padding, recomputation and repeated work
count as waste, not as use. Not on a CPU: what it could do is no constant there. The same product of 512 took 1 ms or 20,
as cores were free, and a step came out at 1.2 of the possible.
"""

import time

import torch
from torch import nn

from stages.compute import ranks

GPU_USE = ("gpu_utilization", "gpu_memory")
# Projections of the contexts in the decoder: they run over the contexts' tokens (BART's and T5's names).
OF_CONTEXTS = ("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v")


def weights_by_tokens(question_encoder: nn.Module, generator_model: nn.Module) -> dict[str, float]:
    """Elements of the matrices that every token of a kind is multiplied with: "question", "context" and "answer".

    A model without an encoder reads contexts and answers with the same layers and predicts answers alone. A matrix that
    does not learn, as under LoRA, counts two thirds: its own gradient is never computed.
    """
    sizes = {"question": 0.0, "context": 0.0, "answer": 0.0}
    for module in question_encoder.modules():
        sizes["question"] += _worth(module) if isinstance(module, nn.Linear) else 0
    split = generator_model.config.is_encoder_decoder
    encoder = set(generator_model.get_encoder().modules()) if split else set()
    head = generator_model.get_output_embeddings()
    for name, module in generator_model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        # An adapter's matrices lie below the name of the one that it adapts.
        of_contexts = any(f"{one}." in f"{name}." for one in OF_CONTEXTS)
        reads_contexts = module in encoder or of_contexts or (not split and module is not head)
        sizes["context"] += _worth(module) if reads_contexts else 0
        sizes["answer"] += _worth(module) if not reads_contexts or not split else 0
    return sizes


def _worth(module: nn.Linear) -> float:
    # By its sides: a weight of 4 bits is stored two to an element.
    return module.in_features * module.out_features * (1 if module.weight.requires_grad else 2 / 3)


def training_flop(
    sizes: dict[str, float], question_tokens: float, context_tokens: float, answer_tokens: float
) -> float:
    """FLOP of forward and backward passes: 6 for each weight and token (2 forward, 4 backward).

    `answer_tokens` counts an answer once for every passage that it is scored under, or once for all that are read together;
    a pass without gradient counts a third. Attention's own products are left out: 2 % of BART-large over contexts of 123
    tokens. So is a context encoder that trains too.
    """
    tokens = {"question": question_tokens, "context": context_tokens, "answer": answer_tokens}
    return 6.0 * sum(sizes[kind] * tokens[kind] for kind in sizes)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square matrix product on this device: what a perfect step could reach.

    The fastest of ten products of 8192 on a GPU, 512 on a CPU: 0.2 s at most. In fp32 it follows torch's matmul precision.
    """
    size = 8192 if device.type == "cuda" else 512
    own = torch.Generator(device).manual_seed(0)  # the training's random numbers stay what they are
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=own) for _ in range(2))
    seconds = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_use(device: torch.device) -> dict[str, float]:
    """Percent of the GPU in use now and percent of its memory in use at the peak; nothing without a GPU."""
    if device.type != "cuda":
        return {}
    memory = 100 * torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
    try:
        return dict(zip(GPU_USE, (float(torch.cuda.utilization(device)), memory), strict=True))
    except (ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is missing, or the driver does not answer
        return {}


def gpu_use_of_ranks(device: torch.device) -> dict[str, float]:
    """`gpu_use`; with several ranks, all of which must call it, the means and each rank's with `_rank_N` behind the name.

    A rank whose driver does not answer is left out.
    """
    own = gpu_use(device)
    if ranks.world() == 1 or device.type != "cuda":
        return own
    table = ranks.gathered([round(100 * own.get(name, -1.0)) for name in GPU_USE])  # whole numbers travel
    found = {}
    for name, column in zip(GPU_USE, zip(*table, strict=True), strict=True):
        known = {number: value / 100 for number, value in enumerate(column) if value >= 0}
        if known:
            found[name] = sum(known.values()) / len(known)
        found |= {f"{name}_rank_{number}": value for number, value in known.items()}
    return found


class DeviceGaps:
    """Seconds between two points of the host's program as the device lived them.

    On a GPU: from the end of all work given to it before `open` to the moment `close` reached it; zero when the host is
    ahead. On a CPU, where work is done when it is given, the time between the calls.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.gaps: list[tuple] = []
        self.opened = None

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def open(self) -> None:
        self.opened = self._now()

    def close(self) -> None:
        if self.opened is not None:
            self.gaps.append((self.opened, self._now()))
            self.opened = None

    def seconds(self) -> float:
        """The sum of all gaps so far; waits for the device."""
        if not self.gaps:
            return 0.0
        if not self.on_gpu:
            return sum(after - before for before, after in self.gaps)
        self.gaps[-1][1].synchronize()
        return sum(before.elapsed_time(after) for before, after in self.gaps) / 1000
