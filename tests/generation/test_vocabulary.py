"""The vocabulary in pieces: the same log-probabilities and gradients, whatever a family does behind its head."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.generation import vocabulary
from stages.generation.causal import Causal
from stages.generation.generator import generator_from
from tests.generation.test_causal import EOS, LIBRARY, SIZES
from tests.generation.test_generator import CAUSAL, FAMILIES, batch, bpe_tokenizer, tiny_model
from tests.generation.test_packed_bart import distance

SEQ2SEQ = [family for family in FAMILIES if family not in CAUSAL]


def generator_of(family):
    torch.manual_seed(0)
    if family in SEQ2SEQ:
        return generator_from(tiny_model(family, 60).eval(), bpe_tokenizer())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | LIBRARY[family])).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.3)
    return Causal(model, None, EOS, 1, [], [], False, 64)


def log_probs_and_gradients(generator, label_smoothing):
    input_ids, mask, targets = batch()
    generator.model.zero_grad()
    rows = []
    head = generator.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, given, output: rows.append(output.numel() // output.shape[-1]))
    contexts = generator.encode(input_ids, mask)
    found = vocabulary.padded_log_probs(generator, contexts, targets, label_smoothing)
    (found * torch.linspace(0.5, 2, found.numel()).view_as(found)).sum().backward()
    hook.remove()
    gradients = {n: p.grad.clone() for n, p in generator.model.named_parameters() if p.grad is not None}
    return found.detach(), gradients, rows


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", [*LIBRARY, *SEQ2SEQ])
def test_pieces_change_neither_log_probs_nor_gradients(monkeypatch, family, label_smoothing):
    generator = generator_of(family)
    expected, expected_gradients, rows = log_probs_and_gradients(generator, label_smoothing)
    assert rows == [15] and expected.shape == (3, 5)
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 4 * 60)
    found, gradients, rows = log_probs_and_gradients(generator, label_smoothing)
    # Once forward, once more for the backward pass.
    assert sorted(rows) == sorted(2 * [4, 4, 4, 3])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and distance(gradients, expected_gradients) < 1e-5
    assert "forward" not in vars(generator.model.get_decoder())


def test_fsdp_runs_the_whole_model(monkeypatch):
    """Its weights are gathered by the modules' own forward passes."""
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 60)
    generator = generator_of("granite")
    generator.past_modules = False
    _, _, rows = log_probs_and_gradients(generator, 0.0)
    assert rows == [15]
