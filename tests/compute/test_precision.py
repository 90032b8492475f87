"""A model cast for answering: everything but what must stay exact."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from stages.compute.precision import cast_weights

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=2048)  # fmt: skip
LONG = 1362


def frequencies(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Gemma3TextConfig(**SIZES, head_dim=16)])
def test_rotary_frequencies_stay_fp32_as_in_a_model_that_was_loaded_so(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    exact = {name: buffer.clone() for name, buffer in frequencies(model).items()}
    cast_weights(model, torch.bfloat16)
    found = frequencies(model)
    assert len(found) >= 2 and all(torch.equal(found[name], value) for name, value in exact.items())
    assert {buffer.dtype for buffer in found.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.arange(40)[None]
    assert torch.equal(model.eval()(ids).logits, loaded.eval()(ids).logits)


def test_a_long_prompts_log_probs_are_nearer_to_fp32_than_with_rounded_frequencies():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    ids = torch.randint(0, 64, (4, LONG))

    @torch.no_grad()
    def log_probs(model):
        return model(ids).logits[:, -100:].float().log_softmax(-1)

    exact = log_probs(model)
    kept, rounded = copy.deepcopy(model), copy.deepcopy(model)
    cast_weights(kept, torch.bfloat16)
    rounded.to(torch.bfloat16)
    distances = [(log_probs(one) - exact).abs().mean() for one in (kept, rounded)]
    assert distances[0] < 0.5 * distances[1], distances
