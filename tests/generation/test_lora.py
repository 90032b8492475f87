"""Adapters on a frozen base in fewer bits: the same loss, a gradient for the adapters alone, one plain model in the end."""

import copy
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.compute.precision import cast_weights
from stages.generation import lora
from stages.generation.generator import load_generator
from stages.generation.lora import add_lora, loading, merge_lora, quantized
from stages.machine.signals import Interrupted
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.settings.retrieval import Lora
from stages.storage.checkpoints import Checkpoints, own_tensors
from stages.training import fsdp
from stages.training.trainer import Trainer
from tests.generation.test_generator import tiny_model
from tests.rag.test_families import CAUSAL, rag_of
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS

BF16 = Lora(rank=4, alpha=16, dropout=0.0, target_modules=None, base="bf16")
SHORT = SETTINGS.model_copy(update={"max_steps": 6, "learning_rate": 2e-2, "eval_steps": 6, "save_steps": 2})
CPU = torch.device("cpu")


def on_bf16(family):
    """The tiny model as `loading` would give it, with adapters; the question encoder stays in fp32."""
    rag = rag_of(family)
    cast_weights(rag.generator_model, torch.bfloat16)
    torch.manual_seed(7)
    add_lora(rag.generator_model, BF16)
    return rag


def losses(rag):
    return rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), list(range(len(QUESTIONS)))), marginal="sequence").nll


def trained(rag, checkpoints=None, stop_at=None):
    trainer = Trainer(rag, NEW, SHORT, "no", 7, checkpoints)
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer.run(
        examples, examples, lambda point: None, lambda: 15 if trainer.progress.step == stop_at else None
    )  # fmt: skip
    return trainer


def adapters(rag):
    return {name: value for name, value in rag.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("family", ["bart", "t5", "gpt2", "llama"])
def test_the_loss_is_that_of_fp32_and_the_gradient_is_the_adapters_own(family):
    rag = on_bf16(family)
    nll = losses(rag)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, losses(rag_of(family)), rtol=1e-2, atol=5e-2)
    nll.sum().backward()
    learned = {name for name, value in rag.generator_model.named_parameters() if value.grad is not None}
    assert learned and all("lora_" in name for name in learned)
    kinds = {value.dtype for value in adapters(rag).values()}
    frozen = {value.dtype for value in rag.generator_model.parameters() if not value.requires_grad}
    assert kinds == {torch.float32} and frozen == {torch.bfloat16}
    whole = rag_of(family)
    add_lora(whole.generator_model, BF16)
    for mine, its in zip(adapters(rag).values(), adapters(whole).values(), strict=True):
        its.data.copy_(mine.data)
    losses(whole).sum().backward()
    mine, its = (torch.cat([value.grad.flatten() for value in adapters(one).values()]) for one in (rag, whole))
    assert torch.cosine_similarity(mine, its, dim=0) > 0.99 and its.norm() > 0


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_it_learns_and_is_saved_as_one_model_of_the_bases_size(family, tmp_path):
    rag = on_bf16(family)
    state = rag.generator_model.state_dict()
    base = {name.replace(".base_layer", ""): value.clone() for name, value in state.items() if "lora_" not in name}
    before = losses(rag).mean()
    trained(rag)
    with torch.no_grad():
        with_adapters = losses(rag)
        save_rag(rag, tmp_path, "sequence")
        assert with_adapters.mean() < before - 0.3
        for dtype in (torch.float32, torch.bfloat16):
            parts = load_rag_parts(tmp_path, dtype)
            assert {value.dtype for value in parts[1].model.parameters()} == {dtype}
            again = open_rag(*parts, rag.index, rag.passages, 3, LENGTHS, CPU)
            torch.testing.assert_close(losses(again), with_adapters, rtol=2e-2, atol=5e-2)
    files = [file for file in tmp_path.rglob("*.safetensors") if family == "bart" or "generator" in str(file)]
    saved = {name: value for file in files for name, value in load_file(file).items() if "question_encoder" not in name}
    assert saved and {value.dtype for value in saved.values()} == {torch.bfloat16}
    merged = rag.generator_model.state_dict()
    assert merged.keys() == base.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert 0 < len(changed) <= len(adapters(on_bf16(family))) / 2


def test_the_sum_is_rounded_once():
    rag = on_bf16("llama")
    for value in adapters(rag).values():
        torch.nn.init.normal_(value, std=0.3)
    layer = rag.generator_model.model.layers[0].self_attn.q_proj
    expected = (layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    merge_lora(rag.generator_model)
    assert torch.equal(rag.generator_model.model.layers[0].self_attn.q_proj.weight, expected)


def test_killed_and_resumed_it_ends_the_same_and_no_checkpoint_holds_the_base(tmp_path):
    whole = trained(on_bf16("llama"), Checkpoints(tmp_path / "whole", 2)).rag
    with pytest.raises(Interrupted):
        trained(on_bf16("llama"), Checkpoints(tmp_path / "stopped", 2), stop_at=3)
    written = {file.parent.name: load_file(file) for file in (tmp_path / "stopped").rglob("weights.safetensors")}
    assert "step-00000003" in written
    for weights in written.values():
        assert all("generator_model" not in name or "lora_" in name for name in weights)
        assert any("lora_" in name for name in weights) and any("question_encoder" in name for name in weights)
    resumed = trained(on_bf16("llama"), Checkpoints(tmp_path / "stopped", 2)).rag
    assert all(torch.equal(a, b) for a, b in zip(adapters(whole).values(), adapters(resumed).values(), strict=True))
    assert own_tensors(resumed).keys() == load_file(tmp_path / "stopped/finished/weights.safetensors").keys()
    again = trained(on_bf16("llama"), Checkpoints(tmp_path / "stopped", 2)).rag  # as a command repeated after its end
    assert all(torch.equal(a, b) for a, b in zip(adapters(whole).values(), adapters(again).values(), strict=True))


@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_few_bits_without_gpu_or_library_are_one_line(base, monkeypatch):
    with pytest.raises(ValueError, match=f"^models.lora.base: {base} needs a GPU; use bf16"):
        loading(base, CPU)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"^models.lora.base: {base} needs the package bitsandbytes: pip install"):
        loading(base, torch.device("cuda", 0))
    with pytest.raises(ValueError, match=f"^models.lora.base: {base} does not work with FSDP"):
        fsdp.check_base(base)


def test_what_from_pretrained_is_given():
    assert loading("fp32", CPU) == {"dtype": torch.float32} and loading("bf16", CPU) == {"dtype": torch.bfloat16}
    asked = {base: quantized(base, CPU) for base in ("8bit", "4bit")}
    assert asked["8bit"]["quantization_config"].load_in_8bit
    config = asked["4bit"]["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 == asked["4bit"]["dtype"]
    assert all(given["device_map"] == {"": CPU} for given in asked.values())


def test_a_base_is_loaded_in_its_type(tmp_path):
    rag_of("llama").generator_model.save_pretrained(tmp_path)
    rag_of("llama").generator.tokenizer.save_pretrained(tmp_path)
    kinds = {value.dtype for value in load_generator(str(tmp_path), loading=loading("bf16", CPU)).model.parameters()}
    assert kinds == {torch.bfloat16}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("base", "error"), [("8bit", 0.02), ("4bit", 0.2)])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_few_bits_learn_and_become_plain_weights(base, error, targets, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # a CPU's own order of 4 bits
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CAUSAL["llama"]), dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **quantized(base, CPU))
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.randint(3, 8192, (3, 20))
    torch.testing.assert_close(model(ids).logits.float(), original(ids).logits, atol=error, rtol=0)
    add_lora(model, BF16.model_copy(update={"base": base, "target_modules": targets}))
    learned = [value for value in model.parameters() if value.requires_grad]
    assert {value.dtype for value in learned} == {torch.float32}
    optimizer = torch.optim.Adam(learned, lr=5e-2)
    seen = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 0.02
    assert all("lora_" in name for name in own_tensors(model))
    with torch.no_grad():
        expected = model(ids).logits.float()
        merge_lora(model)
        model.save_pretrained(tmp_path / "saved")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert not hasattr(plain.config, "quantization_config")
        torch.testing.assert_close(plain(ids).logits, expected, atol=0.05, rtol=0.05)


def test_a_base_that_fits_nothing_is_one_line():
    with pytest.raises(ValueError, match="models.lora.target_modules: no adapters for a llama"):
        add_lora(tiny_model("llama", 60), BF16.model_copy(update={"target_modules": ["c_attn"]}))
