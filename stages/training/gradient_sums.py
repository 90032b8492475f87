"""Gradients summed over the ranks while the backward pass goes on (Li et al. 2020, arXiv:2006.15704, section 3.2).

Gradients lie in a few flat buffers, the buckets, from which they are sent without a copy. In the last backward pass of an
update a bucket is sent as soon as its last gradient has come, buckets always in the same order: so all ranks send the
same, whatever passes each of them has.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stages.compute import ranks
from stages.rag.model import Rag

BUCKET = 1 << 25  # numbers sent together, 128 MiB in fp32
ALIGNED = 64  # a gradient begins at a multiple of so many numbers: kernels read 16 bytes at a time


class GradientSums:
    """Makes `grad` of all trained parameters views of buckets, and these sums over the ranks.

    `parts` are parameters in the order in which a backward pass comes to them; a bucket holds those of one part. Where
    `leaves` names a tensor for a parameter, backward passes end there and its own hook hands the gradient on. All ranks
    make and use it together. `zero` takes the place of the optimizer's zero_grad.
    """

    def __init__(self, parts: list[list[nn.Parameter]], leaves: dict[nn.Parameter, Tensor] | None = None):
        trained = [[parameter for parameter in part if parameter.requires_grad] for part in parts]
        self.buckets = [Bucket(some) for part in trained for some in cut(part)]
        self.places = {one: place for place, bucket in enumerate(self.buckets) for one in bucket.views}
        self.seen: set[nn.Parameter] = set()  # those that have got a gradient since `zero`
        self.overlapping = False
        self.sent: list = []  # the sums begun, of the first buckets
        ends = {parameter: (leaves or {}).get(parameter, parameter) for parameter in self.places}
        self.hooks = [
            leaf.register_post_accumulate_grad_hook(lambda _, parameter=parameter: self.arrived([parameter]))
            for parameter, leaf in ends.items()
        ]
        self.zero()

    @classmethod
    def of(cls, rag: Rag) -> "GradientSums":
        """Those of a Rag that has its working copy and its CUDA graphs, if any.

        Graphs that were recorded before keep adding to buffers of their own, which are then copied.
        """
        parts, taken = [], set()
        # Scores come behind the generator's answers, encoders behind the scores.
        for module in (rag.generator_model, rag.context_encoder, rag.cross_encoder, rag.question_encoder, rag.prior):
            parts.append([one for one in reversed(list(module.parameters() if module else ())) if one not in taken])
            taken.update(parts[-1])
        assert taken == set(rag.parameters())
        sums = cls(parts, rag.working and dict(zip(rag.working.own, rag.working.copies, strict=True)))
        if rag.packed and rag.packed.graphs:
            rag.packed.graphs.on_gradients = sums.arrived
        return sums

    def zero(self) -> None:
        """All gradients are zero, and none has come yet."""
        self.seen.clear()
        for bucket in self.buckets:
            bucket.flat.zero_()
            for parameter, view in bucket.views.items():
                if parameter.grad is not view:
                    parameter.grad = view

    def last_pass(self) -> None:
        """To be called before the last backward pass of an update, where no exchange of another kind will come before
        `finish` on any rank's GPU: what is complete is sent from here on."""
        self.overlapping = True
        for bucket in self.buckets:
            bucket.missing = set(bucket.views)

    def arrived(self, parameters: list[nn.Parameter]) -> None:
        """These have got a gradient in the present backward pass."""
        self.seen.update(parameters)
        if not self.overlapping:
            return
        for parameter in parameters:
            assert self.places[parameter] >= len(self.sent), "a second gradient in the last pass, behind its sum"
            self.buckets[self.places[parameter]].missing.discard(parameter)
        while len(self.sent) < len(self.buckets) and not self.buckets[len(self.sent)].missing:
            self.sent.append(self.buckets[len(self.sent)].begin_sum())

    def finish(self) -> None:
        """Every gradient is its sum over the ranks from here on, the same bits on each of them; on a GPU for what is
        queued from here on.

        Each rank must call it once an update, also one without questions, which takes part with zeros, and one whose
        passes failed. A parameter that got no gradient anywhere has None: zeros would let the weight decay act on it.
        """
        nowhere = ranks.least([int(parameter not in self.seen) for parameter in self.places])
        without = {parameter for parameter, absent in zip(self.places, nowhere, strict=True) if absent}
        for bucket in self.buckets[len(self.sent) :]:
            if not without.issuperset(bucket.views):  # one that another rank has sent already had all of its gradients
                self.sent.append(bucket.begin_sum())
        for begun in self.sent:
            begun.wait()
        for parameter in without:
            parameter.grad = None
        self.sent, self.overlapping = [], False

    def close(self) -> None:
        """Gives the gradients' memory back."""
        for hook in self.hooks:
            hook.remove()
        for parameter in self.places:
            parameter.grad = None
        self.buckets, self.places = [], {}


class Bucket:
    """Gradients of one type that are sent together."""

    def __init__(self, parameters: list[nn.Parameter]):
        starts = [0]
        for parameter in parameters:
            starts.append(starts[-1] + -(-parameter.numel() // ALIGNED) * ALIGNED)
        self.flat = torch.zeros(starts[-1], dtype=parameters[0].dtype, device=parameters[0].device)
        self.views = {
            parameter: self.flat.as_strided(parameter.shape, _strides(parameter), start)
            for parameter, start in zip(parameters, starts, strict=False)
        }
        self.missing: set[nn.Parameter] = set()  # what the last backward pass has not come to

    def begin_sum(self) -> torch.distributed.Work:
        for parameter, view in self.views.items():
            if parameter.grad is not view:  # somebody else's, or cleared by somebody else
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view
        return ranks.begin_sum(self.flat)


def _strides(parameter: nn.Parameter) -> tuple[int, ...]:
    """Those of a gradient as autograd would make it."""
    return torch.empty_like(parameter, device="meta").stride()


def cut(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, cut where a bucket is full or the type changes."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        full = held + parameter.numel() > BUCKET
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.numel()
    if bucket:
        yield bucket
