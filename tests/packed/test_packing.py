"""Attention of packed rows against torch's over one row after the other."""

import pytest
import torch
import torch.nn.functional as F

from stages.packed import packing
from stages.packed.packing import Packing, attention


def packed(lengths: list[int]) -> Packing:
    return Packing.of_lengths(torch.tensor(lengths), sum(lengths), max(lengths))


def reference(query, key, value, asking: list[int], asked: list[int], causal: bool, bias=None):
    rows = []
    bias = torch.zeros(len(key), device=key.device) if bias is None else bias
    for q, k, v, b in zip(query.split(asking), *(part.split(asked) for part in (key, value, bias)), strict=True):
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + b
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


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
        ),
    ],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_bias_of_keys_is_added_to_their_logits_with_its_gradient(device, kv_heads):
    """On a GPU by FlashAttention's kernel, which knows of none, in bf16."""
    asking, asked = [9, 3, 12, 1], [5, 7, 90, 20]
    torch.manual_seed(3)
    shapes = ((sum(asking), 4, 64), *[(sum(asked), kv_heads, 64)] * 2, (sum(asked),))
    plain = [torch.randn(shape, device=device).bfloat16().float().requires_grad_() for shape in shapes]
    half = device == "cuda"
    given = [part.detach().bfloat16() if half and part.dim() > 1 else part.detach() for part in plain]
    query, key, value, bias = (part.requires_grad_() for part in given)
    rows, others = (Packing.of_lengths(torch.tensor(n, device=device), sum(n), max(n)) for n in (asking, asked))
    found = attention(query, key, value, rows, others, 0.0, key_bias=bias)
    expected = reference(*plain[:3], asking, asked, False, plain[3])
    assert (expected - reference(*plain[:3], asking, asked, False)).abs().max() > 0.1
    weights = torch.randn(expected.shape, device=device)
    found = [found, *torch.autograd.grad((found.float() * weights).sum(), (query, key, value, bias))]
    expected = [expected, *torch.autograd.grad((expected * weights).sum(), plain)]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < (0.02 if half else 1e-5) * other.norm()
