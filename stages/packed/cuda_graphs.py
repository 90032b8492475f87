"""A packed model's forward and backward pass as two CUDA graphs: two launches in place of thousands.

A training step is some thousand small kernels; a host that takes 10 to 30 microseconds for each is slower than the GPU.
A graph is recorded once for each size and replayed from then on. Sizes are rounded up so that few occur: the tokens that
are missing go into rows of their own, which nothing reads and whose gradient is zero.

Gradients do not come back through autograd: the recorded backward pass adds them to the parameters' own `grad`. So no hook
of a parameter is called; `on_gradients` is.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from stages.compute.out_of_memory import is_out_of_memory
from stages.packed.packing import PackedAnswers

MOST_GRAPHS = 64  # the sizes that come later run without; each graph takes some MB beside the memory that all share


class CudaGraphs:
    """Calls `log_probs` (PackedBart's or PackedCausal's) by graphs where gradients are wanted, else as it is.

    `model` is what it runs; `context_tokens` and `answer_tokens` the most that a row has. Gradients are added to `grad` of
    the parameters `trained`, where these are not the model's own (working_copy.py). Between a call and the backward pass
    through what it gave there must be no other call.
    """

    def __init__(
        self, log_probs: Callable[[PackedAnswers, float], Tensor], model: torch.nn.Module, context_tokens: int,
        answer_tokens: int, trained: list[torch.nn.Parameter] | None = None,
    ):  # fmt: skip
        self.log_probs, self.model = log_probs, model
        self.computed = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = trained or self.computed
        self.widths = (context_tokens, answer_tokens)
        self.graphs: dict[tuple, _Graph] = {}
        self.gradients: dict[int, Tensor] = {}  # by place in `parameters`: what the graphs add to
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = False
        self.calls = 0
        # Called when a replayed backward pass, queued by then, has added to these parameters' gradients.
        self.on_gradients: Callable[[list[torch.nn.Parameter]], None] = lambda parameters: None

    def __call__(self, packed: PackedAnswers, label_smoothing: float) -> Tensor:
        """log p of each answer token, in fp32: [answers], or more columns where `log_probs` gives them."""
        if not torch.is_grad_enabled() or self.failed:
            return self.log_probs(packed, label_smoothing)
        filled = fill(packed.widened(*self.widths))
        key = (
            len(filled.ids), len(filled.read), filled.tokens.rows, filled.together, filled.alone, label_smoothing,
            self.model.training,
        )  # fmt: skip
        if key not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                return self.log_probs(packed, label_smoothing)
            try:
                self.graphs[key] = self._record(filled, label_smoothing)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.failed = True
                print(f"CUDA graphs are not used: {str(error).splitlines()[0]}", file=sys.stderr)
                return self.log_probs(packed, label_smoothing)
        self.calls += 1
        anchor = torch.zeros((), device=filled.ids.device, requires_grad=True)
        return _Replay.apply(anchor, self, self.graphs[key], filled, self.calls)[: len(packed.read)]

    def own_gradients(self) -> None:
        """Makes the buffers that the graphs add to the parameters' gradients, with what is there already."""
        cleared = []
        for place, own in self.gradients.items():
            parameter = self.parameters[place]
            if parameter.grad is None:
                cleared.append(own)
            elif parameter.grad is not own:
                own.copy_(parameter.grad)
            parameter.grad = own
        if cleared:
            torch._foreach_zero_(cleared)

    def take_gradients(self, found: tuple[Tensor | None, ...]) -> None:
        """Chooses what the graphs will add to: of each parameter for which a gradient was `found` the very `grad`, where
        there is one and somebody may want it to stay where it is."""
        self.gradients = {
            place: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for place, (parameter, value) in enumerate(zip(self.parameters, found, strict=True))
            if value is not None
        }

    def _record(self, filled: PackedAnswers, label_smoothing: float) -> "_Graph":
        device = filled.ids.device
        random = torch.cuda.get_rng_state(device)
        inputs = [tensor.clone() for tensor in filled.tensors()]
        static = filled.of_tensors(inputs)
        # Without its cache: a graph must cast the weights of the step that replays it, not of the one that recorded it.
        casting = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        if not self.graphs:
            # Once as usual: libraries set themselves up, and memory runs out where that can be met.
            with casting:
                log_probs = self.log_probs(static, label_smoothing)
                found = torch.autograd.grad(log_probs, self.computed, torch.zeros_like(log_probs), allow_unused=True)
            self.take_gradients(found)
            del log_probs, found
            torch.cuda.empty_cache()  # to the pool that the graphs share
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._recording(forward), casting:
            log_probs = self.log_probs(static, label_smoothing)
        gradient = torch.zeros_like(log_probs)
        with self._recording(backward):
            read = [self.computed[place] for place in self.gradients]
            found = torch.autograd.grad(log_probs, read, gradient)
            torch._foreach_add_(list(self.gradients.values()), list(found))
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.set_rng_state(random, device)
        return _Graph(inputs, log_probs.detach(), gradient, forward, backward)

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # Not by torch.cuda.graph, which empties the allocator's cache: half a second for each size.
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()


class _Graph(NamedTuple):
    """One size's recording and the memory that it reads from and writes to."""

    inputs: list[Tensor]
    log_probs: Tensor
    gradient: Tensor  # of log_probs
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, graphs, graph, filled, call):
        graphs.own_gradients()
        for kept, new in zip(graph.inputs, filled.tensors(), strict=True):
            kept.copy_(new)
        graph.forward.replay()
        ctx.graphs, ctx.graph, ctx.call = graphs, graph, call
        return graph.log_probs.clone()

    @staticmethod
    def backward(ctx, gradient):
        assert ctx.call == ctx.graphs.calls, "a later forward pass has overwritten what this backward pass needs"
        ctx.graph.gradient.copy_(gradient)
        ctx.graph.backward.replay()
        ctx.graphs.on_gradients([ctx.graphs.parameters[place] for place in ctx.graphs.gradients])
        return None, None, None, None, None


def fill(packed: PackedAnswers) -> PackedAnswers:
    """The same with numbers of tokens rounded up, so that few sizes occur: contexts by at most 6 %, answers by half."""
    step_of_contexts, step_of_answers = _step(len(packed.ids), 16), _step(len(packed.read), 2)
    # Each further row gets at least one token and at most `width` of them.
    rows = 1 + max(
        -(-step_of_contexts // max(1, packed.tokens.width - 1)), -(-step_of_answers // max(1, packed.answers.width - 1))
    )
    tokens = -(-(len(packed.ids) + rows * packed.together) // step_of_contexts) * step_of_contexts
    answers = -(-(len(packed.read) + rows) // step_of_answers) * step_of_answers
    return packed.filled(tokens, answers, rows)


def _step(count: int, parts: int) -> int:
    """The power of two that divides the next lower power of two of `count` into `parts`."""
    return max(1, (1 << (count.bit_length() - 1)) // parts)
