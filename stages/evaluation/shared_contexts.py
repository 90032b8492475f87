"""Keys and values of contexts that several hypotheses ask together, and softmax over keys that lie in two places.

Softmax over all keys is softmax over each place's, weighted by the place's share of the whole; the share takes the log of
the scores' sum of exponentials beside each result (Dao et al. 2022, arXiv:2205.14135, section 3.1).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from stages.packed.packing import HALF, Packing, asking_bias, has_flash

# What attention gives [R, n, heads, d] and, beside it, the log of its scores' sum of exponentials [R, n, heads], fp32.
Part = tuple[Tensor, Tensor]


@dataclass
class Hypotheses:
    """Which of C contexts each of R hypotheses stands on, and its place among the at most `width` that do so."""

    context: LongTensor  # [R]
    place: LongTensor  # [R] context x width + number
    order: LongTensor | None  # [R] the hypotheses sorted by context; None: they are
    ends: LongTensor  # [C + 1] where each context's begin and end in that order
    width: int

    @classmethod
    def on(cls, context: LongTensor, contexts: int) -> "Hypotheses":
        count = torch.zeros(contexts, dtype=torch.long, device=context.device)
        count.index_add_(0, context, torch.ones_like(context))
        ends = F.pad(count.cumsum(0), (1, 0))
        order = context.argsort(stable=True)
        number = torch.empty_like(context)
        number[order] = torch.arange(len(context), device=context.device) - ends[context[order]]
        width, apart = torch.stack([count.max(), (context.diff() < 0).any().long()]).tolist()
        return cls(context, context * width + number, order if apart else None, ends, width)


@dataclass
class SharedContexts:
    """Each layer's keys and values of C contexts, and the hypotheses on them; the contexts are never copied for these.

    On a GPU in half precision they stay packed [tokens, heads, d], as FlashAttention reads them (`packing` says where they
    are). Elsewhere they are padded [C, heads, L, d], for matrix products, and `packing` is None. `biased`: the keys are those of
    packing.py's `biased`.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor  # [C]
    hypotheses: Hypotheses
    packing: Packing | None
    biased: bool = False

    @classmethod
    def of(cls, layers: list[tuple[Tensor, Tensor]], packing: Packing, biased: bool = False) -> "SharedContexts":
        """From packed keys and values [tokens, heads, d]; a hypothesis stands on each context."""
        flash = uses_flash(layers[0][0])
        if not flash:
            layers = [tuple(packing.unpack(part).transpose(1, 2).contiguous() for part in pair) for pair in layers]
        lengths = (packing.offsets[1:] - packing.offsets[:-1]).long()
        each = Hypotheses.on(torch.arange(packing.rows, device=lengths.device), packing.rows)
        return cls(layers, lengths, each, packing if flash else None, biased)

    def under(self, rows: LongTensor) -> "SharedContexts":
        """The same for hypotheses on the contexts of the given rows. What is padded leaves out contexts that none asks."""
        context = self.hypotheses.context[rows]
        if self.packing is None:
            used, place = context.unique(return_inverse=True)
            if len(used) < len(self.lengths):
                layers = [(key[used], value[used]) for key, value in self.layers]
                return SharedContexts(layers, self.lengths[used], Hypotheses.on(place, len(used)), None, self.biased)
        return replace(self, hypotheses=Hypotheses.on(context, len(self.lengths)))

    def read(self, query: Tensor, layer: int, scale: float) -> Part:
        """What the hypotheses' queries [R, n, heads, d] find in their contexts."""
        if self.biased:
            mixed, total = self._read(asking_bias(query), *self.layers[layer], scale)
            return mixed[..., : query.shape[-1]], total
        return self._read(query, *self.layers[layer], scale)

    def _read(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Part:
        if self.packing is not None:
            return self._read_packed(query, key, value, scale)
        at, contexts = self.hypotheses, len(self.lengths)
        asked = query.new_zeros(contexts * at.width, *query.shape[1:]).index_copy(0, at.place, query)
        asked = asked.view(contexts, -1, *query.shape[2:])
        seen = torch.arange(key.shape[2], device=key.device) < self.lengths[:, None]
        found = attend(asked, key, value, scale, seen[:, None, None, None])
        return tuple(part.reshape(-1, query.shape[1], *part.shape[2:])[at.place] for part in found)

    def _read_packed(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Part:
        at, heads = self.hypotheses, key.shape[1]
        # The heads that share keys ask like hypotheses of their own: so each key is read once for all of them.
        asked = query if at.order is None else query[at.order]
        asked = asked.unflatten(2, (heads, -1)).transpose(2, 3).contiguous()
        each = asked.shape[1] * asked.shape[2]
        mixed, total, *_ = torch.ops.aten._flash_attention_forward(
            asked.flatten(0, 2), key, value, (at.ends * each).int(), self.packing.offsets, at.width * each,
            self.packing.width, 0.0, False, False, scale=scale,
        )  # fmt: skip
        parts = []
        for part in (mixed, total.transpose(0, 1)):
            found = part.unflatten(0, asked.shape[:3]).transpose(2, 3).flatten(2, 3)
            parts.append(found if at.order is None else torch.empty_like(found).index_copy_(0, at.order, found))
        return tuple(parts)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None = None) -> Part:
    """Attention of queries [R, n, heads, d] over keys and values [R, heads or fewer, T, d].

    `seen` (None: everything) is true where a query sees a key, and broadcasts to [R, heads of keys, n, heads that share
    them, T]. A query sees at least one.
    """
    asked = query.unflatten(2, (key.shape[1], -1)).transpose(1, 2)
    scores = (asked.flatten(2, 3) @ key.mT).float().mul_(scale).unflatten(2, asked.shape[2:4])
    if seen is not None:
        scores.masked_fill_(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1)
    mixed = (weights.flatten(2, 3).to(value.dtype) @ value).unflatten(2, asked.shape[2:4]) / total[..., None]
    return tuple(part.transpose(1, 2).flatten(2, 3) for part in (mixed, top.squeeze(-1) + total.log()))


def attend_before(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Part:
    """`attend` where the n queries are the last of the T keys' positions and see none behind their own."""
    count, keys = query.shape[1], key.shape[2]
    if uses_flash(query):
        # Causal where it is shorter than its keys: as if the queries came last (FlashAttention 2.1).
        mixed, total, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            None,
            count,
            keys,
            0.0,
            count > 1,
            False,
            scale=scale,
        )
        return mixed, total.transpose(1, 2)
    seen = torch.ones(count, keys, dtype=torch.bool, device=key.device).tril(keys - count)
    return attend(query, key, value, scale, None if count == 1 else seen[:, None])


def merged(one: Part, other: Part) -> Tensor:
    """[R, n, heads, d]: attention over the keys of both."""
    share = torch.sigmoid(one[1] - other[1])[..., None]
    return torch.addcmul(other[0], one[0] - other[0], share).to(one[0].dtype)


def uses_flash(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in HALF and has_flash()
