"""No padding, the same numbers: packed BART's passes against the library's padded ones, in fp32 to rounding, in bf16 to noise."""

import pytest
import torch
from transformers import BartConfig, DPRConfig

from stages.bench import random_models
from stages.generation import marginalization, vocabulary
from stages.generation.packed_bart import PackedBart
from tests.tiny_rag import ANSWERS, QUESTIONS, tiny_rag

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])


def loss_and_gradients(packed, label_smoothing=0.0, half=False):
    rag = tiny_rag()
    if not packed:
        rag.packed = None
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), list(range(len(QUESTIONS))))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        nll = rag(batch, marginal="sequence", label_smoothing=label_smoothing).nll
    nll.sum().backward()
    return nll.detach(), {name: p.grad for name, p in rag.named_parameters() if p.grad is not None}


def distance(one, other):
    """Relative distance of all gradients as one vector: some alone (a key's bias) are nothing but rounding."""
    difference = torch.stack([(one[name] - value).norm() for name, value in other.items()]).norm()
    return difference / torch.stack([value.norm() for value in other.values()]).norm()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_fp32_loss_and_gradients_are_those_of_the_padded_model(label_smoothing):
    nll, gradients = loss_and_gradients(True, label_smoothing)
    expected, expected_gradients = loss_and_gradients(False, label_smoothing)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    assert distance(gradients, expected_gradients) < 1e-5


def test_bf16_is_no_further_from_fp32_than_the_padded_models_bf16():
    exact, gradients = loss_and_gradients(False)
    padded, padded_gradients = loss_and_gradients(False, half=True)
    packed, packed_gradients = loss_and_gradients(True, half=True)
    noise = (padded - exact).abs().max()
    assert 0 < noise < 0.05 * exact.max()
    assert (packed - exact).abs().max() < 2 * noise
    assert distance(packed_gradients, gradients) < 2 * distance(padded_gradients, gradients)


def test_a_vocabulary_projection_in_pieces_changes_nothing(monkeypatch):
    nll, gradients = loss_and_gradients(True)
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 8192 * 3)  # three answer positions at once
    in_pieces, gradients_in_pieces = loss_and_gradients(True)
    torch.testing.assert_close(in_pieces, nll, rtol=1e-6, atol=1e-6)
    assert distance(gradients_in_pieces, gradients) < 1e-5


@pytest.mark.parametrize("vocab", [21, 24])
def test_impossible_words_change_neither_log_p_nor_gradients(vocab):
    torch.manual_seed(0)
    states, bias, targets = torch.randn(6, 4), torch.randn(vocab), torch.tensor([0, 3, vocab - 1, 7, 7, 20])
    results = []
    for fill in (lambda *head: head, vocabulary.in_rows_of_8):
        weight = torch.randn(vocab, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        read = states.clone().requires_grad_()
        wide, biases = fill(weight, bias)
        assert len(wide) == len(biases) == (24 if results else vocab)
        log_p = marginalization.token_log_probs((read @ wide.T + biases)[None, None], targets[None])
        results.append((log_p.detach(), *torch.autograd.grad(log_p.square().sum(), (read, weight))))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_padding_tokens_reach_nothing():
    rag = tiny_rag()
    ids, mask = torch.randint(4, 8192, (4, 4)), MASK
    targets, target_mask = torch.randint(4, 8192, (4, 3)), MASK[:, :3].bool()
    arguments = (ids, mask, targets, target_mask)
    scored = rag.packed.token_log_probs(*arguments)
    assert not scored[~target_mask].any() and (scored[target_mask] < 0).all()
    ids, targets = ids.masked_fill(mask == 0, 7), targets.masked_fill(~target_mask, 7)
    assert torch.equal(rag.packed.token_log_probs(ids, mask, targets, target_mask), scored)


def test_dropout_of_every_kind_reaches_the_packed_layers():
    rag = tiny_rag()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), [0, 1, 2])
    for kind in ("dropout", "activation_dropout"):
        for module in rag.generator_model.modules():
            if isinstance(getattr(module, kind, None), float):
                setattr(module, kind, 0.5)
        rag.train()
        noisy = [rag(batch, marginal="sequence").nll for _ in range(2)]
        rag.eval()
        calm = [rag(batch, marginal="sequence").nll for _ in range(2)]
        assert not torch.equal(*noisy) and torch.equal(*calm)
        for module in rag.generator_model.modules():
            if isinstance(getattr(module, kind, None), float):
                setattr(module, kind, 0.0)


def test_models_with_layerdrop_and_other_families_are_not_packed():
    assert PackedBart.fits(BartConfig())
    assert not PackedBart.fits(BartConfig(encoder_layerdrop=0.1))
    assert not PackedBart.fits(BartConfig(decoder_layerdrop=0.1))
    assert not PackedBart.fits(DPRConfig())


def test_random_shapes_have_the_lengths_that_they_promise():
    rag = random_models.random_rag("tiny", 3000, 3, torch.device("cpu"))
    examples = random_models.random_examples(rag, 200)
    sizes = (rag.passages.offsets[1:] - rag.passages.offsets[:-1]).double()
    assert 100 < sizes.mean() < 118 and sizes.max() <= 265
    together = sizes.view(-1, 3).mean(1)  # what a question finds
    assert 105 < together.mean() < 113 and together.std() < 8
    assert 4.5 < examples.target_mask.sum(1).double().mean() < 7.5
    last = examples.target_mask.sum(1) - 1
    assert (examples.targets[torch.arange(200), last] == rag.generator.eos_token_id).all()
