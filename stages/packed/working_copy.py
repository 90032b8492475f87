"""A model's weights in half precision, to compute with, beside the fp32 ones that an optimizer moves.

As large trainers do (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1): products, norms and the residual stream
are in half precision, weights, sums of gradients and moments in fp32. Autocast casts the weights anew in each pass and
keeps norms and residual stream in fp32, which is twice the memory and twice the way through it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stages.compute.precision import cast_weights


class WorkingCopy:
    """A copy of `model` in `dtype`, whose gradients are added up in fp32, as `grad` of the model's own parameters.

    Only these are trained, saved and loaded; whoever changes them says so by `update`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.own = list(model.parameters())
        self.model = copy.deepcopy(model)
        cast_weights(self.model, dtype)
        self.copies = list(self.model.parameters())
        assert all(one.requires_grad and one.dtype == dtype for one in self.copies) and len(self.own) == len(
            self.copies
        )
        for own, computed in zip(self.own, self.copies, strict=True):
            computed.register_post_accumulate_grad_hook(lambda computed, own=own: _hand_over(computed, own))

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether all weights are trained, in fp32: of a frozen one a copy would be memory alone."""
        return all(one.requires_grad and one.dtype == torch.float for one in model.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Copies the model's own weights again."""
        torch._foreach_copy_(self.copies, self.own)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Without autocast, which would take norms back to fp32."""
        with torch.autocast(self.own[0].device.type, enabled=False):
            yield


def _hand_over(computed: nn.Parameter, own: nn.Parameter) -> None:
    # First, or where memory runs out below it would stay, which no optimizer's zero_grad sees, and count twice.
    found, computed.grad = computed.grad, None
    if own.grad is None:
        own.grad = found.to(own.dtype)
    else:
        own.grad.add_(found)
