"""Attention of packed rows against torch's over one row after the other."""

import pytest
import torch
import torch.nn.functional as F

from stages.packed import packing
from stages.packed.packing import Packing, attention


def packed(lengths: list[int]) -> Packing:
    return Packing.of_lengths(torch.tensor(lengths), sum(lengths), max(lengths))


def reference(query, key, value, asking: list[int], asked: list[int], causal: bool):
    rows = []
    for q, k, v in zip(query.split(asking), key.split(asked), value.split(asked), strict=True):
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(len(q), len(k)).tril().bool(), -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(rows)


@pytest.mark.parametrize("long_row", [1, 1000])  # row by row, or padded
@pytest.mark.parametrize(
    ("asked", "kv_heads", "causal"),
    [([9, 3, 12, 1], 4, False), ([9, 3, 12, 1], 2, True), ([5, 7, 2, 20], 4, False), ([5, 7, 2, 20], 2, False)],
)
def test_no_row_sees_another_whether_rows_are_padded_or_taken_one_by_one(
    monkeypatch, asked, kv_heads, causal, long_row
):
    monkeypatch.setattr(packing, "LONG_ROW", long_row)
    asking = [9, 3, 12, 1]
    torch.manual_seed(3)
    query = torch.randn(sum(asking), 4, 8, requires_grad=True)
    key, value = (torch.randn(sum(asked), kv_heads, 8, requires_grad=True) for _ in range(2))
    rows = packed(asking)
    others = rows if asked == asking else packed(asked)
    weight = torch.randn_like(query)
    results = []
    for mixed in (
        attention(query, key, value, rows, others, 0.0, causal),
        reference(query, key, value, asking, asked, causal),
    ):
        gradients = torch.autograd.grad((mixed * weight).sum(), (query, key, value))
        results.append((mixed.detach(), *gradients))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_long_rows_on_a_cpu_are_not_padded(monkeypatch):
    shapes = []
    own = F.scaled_dot_product_attention

    def watched(query, *rest, **named):
        shapes.append(query.shape[2])
        return own(query, *rest, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for lengths in ([90, 70], [9, 7]):
        states = torch.randn(sum(lengths), 2, 4)
        attention(states, states, states, packed(lengths), packed(lengths), 0.0)
    assert shapes == [90, 70, 9]  # the short ones together, as wide as the longer
