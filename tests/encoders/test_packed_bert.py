"""Packed rows and the packed context encoder against the padded library."""

import pytest
import torch
from transformers import DPRConfig, DPRContextEncoder

from stages.encoders.packed_bert import PackedBert
from stages.packed.packing import Packing, attention

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])


def test_packing_is_undone_by_unpacking_and_is_the_same_from_mask_and_lengths():
    packing = Packing.of(MASK)
    rows = torch.arange(MASK.numel()).view(MASK.shape) + 1
    assert packing.pack(rows).tolist() == [1, 2, 3, 5, 9, 10, 11, 12, 13, 14]
    assert torch.equal(packing.unpack(packing.pack(rows)), rows * MASK)
    lengths = MASK.sum(1)
    known = Packing.of_lengths(lengths, int(lengths.sum()), int(lengths.max()))
    for name, value in vars(packing).items():
        assert (
            torch.equal(getattr(known, name), value) if isinstance(value, torch.Tensor) else value == vars(known)[name]
        )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_stays_inside_its_row(causal):
    torch.manual_seed(0)
    packing = Packing.of(MASK)
    query, key, value = torch.randn(3, 10, 2, 8)
    mixed = attention(query, key, value, packing, packing, 0.0, causal)
    for first, last in zip(packing.offsets, packing.offsets[1:], strict=False):
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(part[first:last].transpose(0, 1) for part in (query, key, value)), is_causal=causal
        )
        torch.testing.assert_close(mixed[first:last], alone.transpose(0, 1))


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("projection", [0, 6])
def test_packed_bert_gives_the_librarys_vectors(projection, dtype):
    torch.manual_seed(0)
    config = DPRConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        projection_dim=projection, initializer_range=0.5,
    )  # fmt: skip
    model = DPRContextEncoder(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero in a new model
            torch.nn.init.normal_(parameter)
    ids = torch.randint(4, 50, MASK.shape)
    packing = Packing.of(MASK)
    with torch.no_grad():
        expected = model(ids, attention_mask=MASK).pooler_output
        found = PackedBert(model.ctx_encoder, dtype).vectors(packing.pack(ids), packing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision's kernels are a GPU's")
def test_vectors_in_half_precision_point_where_full_precisions_do():
    torch.manual_seed(0)
    config = DPRConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
        initializer_range=0.1,
    )  # fmt: skip
    model = DPRContextEncoder(config).eval().cuda()
    ids, mask = torch.randint(4, 50, MASK.shape).cuda(), MASK.cuda()
    packing = Packing.of(mask)
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).pooler_output
        found = PackedBert(model.ctx_encoder, torch.bfloat16).vectors(packing.pack(ids), packing)
        with torch.autocast("cuda", torch.bfloat16):
            usual = model(ids, attention_mask=mask).pooler_output.float()
    assert found.dtype == torch.float32

    def turned(vectors: torch.Tensor) -> float:
        return 1 - torch.nn.functional.cosine_similarity(vectors, expected).min().item()

    assert turned(found) < max(3 * turned(usual), 1e-3)
