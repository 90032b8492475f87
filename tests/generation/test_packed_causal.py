"""Decoder-only models without padding give the padded models' numbers, family by family."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig

from stages.evaluation.decoding import generate
from stages.generation import marginalization, vocabulary
from stages.generation.causal import Causal
from stages.generation.marginalization import log_prior
from stages.generation.packed_causal import FAMILIES, PackedCausal
from stages.packed import packing
from stages.packed.packing import Packing
from stages.rag.folder import save_rag
from tests.generation.test_causal import MIXED, SIZES
from tests.generation.test_packed_bart import distance
from tests.rag.test_families import rag_of
from tests.tiny_rag import ANSWERS, QUESTIONS

PACKED = ["llama", "qwen2", "qwen3", "mistral"]
EVERYTHING = list(range(len(QUESTIONS)))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
WINDOWS = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
LIBRARY = {
    "gemma": {},
    "gemma3_text": MIXED,
    "mistral": dict(sliding_window=4),
    "olmo2": {},
    "phi3": {},
    "qwen2": WINDOWS,
    "qwen3": WINDOWS,
    "smollm3": {},
    "starcoder2": dict(sliding_window=4),
}


def loss_and_gradients(family, packed, label_smoothing=0.0, checkpointing=False):
    rag = rag_of(family)
    assert isinstance(rag.packed, PackedCausal)
    for parameter in rag.generator_model.parameters():
        parameter.data.mul_(3)
    if not packed:
        rag.packed = None
    if checkpointing:
        rag.generator_model.gradient_checkpointing_enable({"use_reentrant": False})
    rag.train()
    output = rag(
        rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING), marginal="sequence", label_smoothing=label_smoothing
    )
    output.nll.sum().backward()
    return output.nll.detach(), {name: p.grad for name, p in rag.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", PACKED)
def test_loss_and_gradients_are_those_of_the_padded_model(family, label_smoothing):
    nll, gradients = loss_and_gradients(family, True, label_smoothing)
    expected, expected_gradients = loss_and_gradients(family, False, label_smoothing)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    assert distance(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_vocabulary_in_pieces_changes_nothing_and_no_piece_is_larger(monkeypatch, label_smoothing):
    nll, gradients = loss_and_gradients("qwen2", True, label_smoothing)
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 8192 * 3)  # three answer tokens at once
    rows, whole = [], marginalization.token_log_probs
    monkeypatch.setattr(
        marginalization, "token_log_probs", lambda logits, *rest: rows.append(logits.shape[-2]) or whole(logits, *rest)
    )
    in_pieces, gradients_in_pieces = loss_and_gradients("qwen2", True, label_smoothing)
    torch.testing.assert_close(in_pieces, nll, rtol=1e-5, atol=1e-5)
    assert distance(gradients_in_pieces, gradients) < 1e-5
    assert max(rows) == 3 and len(rows) > 9


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_packed_familys_logits_are_what_its_head_says(family):
    """A family that scales or caps them behind the head cannot be packed this way."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | LIBRARY.get(family, {}))).eval()
    ids = torch.tensor([[5, 6, 7]])
    states = model.get_decoder()(ids).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(states), model(ids).logits)


def test_gradient_checkpointing_changes_no_gradient():
    nll, gradients = loss_and_gradients("llama", True)
    again, gradients_again = loss_and_gradients("llama", True, checkpointing=True)
    torch.testing.assert_close(again, nll)
    assert distance(gradients_again, gradients) < 1e-6


@pytest.mark.slow
def test_compiled_layers_are_one_graph_with_the_same_numbers(monkeypatch):
    """Traced as on a GPU, but run by torch's own kernels: a machine without a C++ compiler can test it."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="aot_eager", **options)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rag = rag_of("llama")
    examples = rag.examples(QUESTIONS, ANSWERS)
    expected = rag(rag.batch(examples, EVERYTHING), marginal="sequence").nll.detach()
    rag.packed.compile()
    rag.train()
    for rows in (EVERYTHING, [0, 1, 2], [5, 6, 7, 8]):
        nll = rag(rag.batch(examples, rows), marginal="sequence").nll
        nll.sum().backward()
        torch.testing.assert_close(nll, expected[rows], rtol=1e-5, atol=1e-5)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1 and stats["calls_captured"] > 50
    assert "_orig_mod" not in "".join(rag.state_dict())


def test_answers_of_one_token_and_padding_tokens():
    rag = rag_of("llama")
    ids, mask = torch.randint(4, 8192, (3, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    alone = torch.tensor([[2], [2], [2]])
    single = rag.packed.token_log_probs(ids, mask, alone, torch.ones_like(alone, dtype=torch.bool))
    for row in range(3):
        prompt = ids[row : row + 1, : mask[row].sum()]
        expected = rag.generator_model(prompt).logits[0, -1].log_softmax(-1)[2]
        torch.testing.assert_close(single[row, 0], expected, rtol=1e-5, atol=1e-5)
    targets, target_mask = torch.randint(4, 8192, (3, 3)), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    scored = rag.packed.token_log_probs(ids, mask, targets, target_mask)
    assert not scored[~target_mask].any() and (scored[target_mask] < 0).all()
    ids, targets = ids.masked_fill(mask == 0, 7), targets.masked_fill(~target_mask, 7)
    assert torch.equal(rag.packed.token_log_probs(ids, mask, targets, target_mask), scored)


def test_decoding_and_what_is_saved_do_not_know_of_it(tmp_path):
    rag = rag_of("llama")
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    with torch.no_grad():
        rows, scores = rag.retrieve(rag.encode_questions(batch))
    ids, mask = rag.contexts(batch, rows)

    def answers():
        shape = (len(QUESTIONS), rows.shape[1], -1)
        found = generate(
            rag.generator, ids.view(shape), mask.view(shape), log_prior(scores), num_beams=3, max_answer_tokens=6,
            decoding="thorough", marginalization="sequence",
        )  # fmt: skip
        return [(answer.text, pytest.approx(answer.log_prob, abs=1e-4)) for answer in found]

    with_packing = answers()
    rag.generator_model.set_attn_implementation("sdpa")
    assert [text for text, _ in answers()] == [text for text, _ in with_packing]
    rag.packed = PackedCausal(rag.generator)
    save_rag(rag, tmp_path, "sequence")
    assert "packed" not in (tmp_path / "generator/config.json").read_text(encoding="utf-8")


@torch.no_grad()
@pytest.mark.parametrize("family", LIBRARY)
def test_a_library_family_is_reproduced_with_its_scalings_and_windows(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | LIBRARY[family])).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.3)
    ids, mask = torch.randint(4, 60, (3, 9)), torch.arange(9) < torch.tensor([9, 3, 6])[:, None]
    targets, target_mask = torch.randint(4, 60, (3, 4)), torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    expected = []
    for row in range(3):
        prompt, answer = ids[row, mask[row]], targets[row, target_mask[row]]
        logits = model(torch.cat([prompt, answer[:-1]])[None]).logits[0, len(prompt) - 1 :]
        expected.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
    assert PackedCausal.fits(model.config)
    packed = PackedCausal(Causal(model, None, 2, 1, [], [], False, 64))
    scored = packed.token_log_probs(ids, mask.long(), targets, target_mask)
    torch.testing.assert_close(scored[target_mask], torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_what_looks_ahead_or_caps_its_attention_is_not_packed():
    assert PackedCausal.fits(LlamaConfig()) and PackedCausal.fits(MistralConfig(sliding_window=8))
    assert not PackedCausal.fits(Gemma2Config())
    assert not PackedCausal.fits(Gemma3TextConfig(final_logit_softcapping=30.0))
    assert not PackedCausal.fits(AutoConfig.for_model("granite"))
    assert not PackedCausal.fits(Gemma3TextConfig(use_bidirectional_attention=True))
    assert not PackedCausal.fits(rag_of("gpt2").generator_model.config)


def test_autocast_leaves_no_query_in_fp32(monkeypatch):
    """Rotary embeddings make fp32 of them, for which a GPU has no kernel without a mask."""
    asked, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*parts, **options):
        asked.append([part.dtype for part in parts])
        return plain(*parts, **options)

    monkeypatch.setattr(packing.F, "scaled_dot_product_attention", attention)
    rag = rag_of("llama")
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        rag(batch, marginal="sequence").nll.sum().backward()
    assert asked[-1] == [torch.bfloat16] * 3


def test_whether_a_gpu_has_flash_attention_is_a_constant_of_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(packing, "_has_flash", lambda: True)
    compiled = torch.compile(lambda x: x + 1 if packing.has_flash() else x, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 1


def test_an_old_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    packing._has_flash.cache_clear()
    assert not packing.has_flash() and not packing.has_flash()
    packing._has_flash.cache_clear()
    assert capsys.readouterr().err.count("\n") == 1


def attended(heads, shared, half, window):
    """Attention over three packed rows and the gradients of queries, keys and values, from the same numbers."""
    torch.manual_seed(0)
    rows = Packing.of(torch.arange(70, device="cuda") < torch.tensor([70, 1, 33], device="cuda")[:, None])
    tokens = len(rows.index)
    parts = [torch.randn(tokens, count, 64, device="cuda") for count in (heads, heads // shared, heads // shared)]
    parts = [(part.bfloat16() if half else part.bfloat16().float()).requires_grad_() for part in parts]
    mixed = packing.attention(*parts, rows, rows, 0.0, causal=True, scale=0.2, window=window)
    weights = torch.randn(mixed.shape, device="cuda")
    return [mixed, *torch.autograd.grad((mixed.float() * weights).sum(), parts)]


@on_gpu
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("window", [None, 8])
def test_the_kernel_without_a_mask_is_attention_with_one(shared, window):
    for found, expected in zip(attended(9, shared, True, window), attended(9, shared, False, window), strict=True):
        assert ((found.float() - expected).norm() / expected.norm()) < 0.01


@on_gpu
def test_training_in_half_precision_builds_no_mask(monkeypatch):
    rag = rag_of("llama").to("cuda")
    rag.passages = rag.passages.to(torch.device("cuda"))
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    with torch.autocast("cuda", torch.bfloat16, enabled=False):
        expected = rag(batch, marginal="sequence").nll.detach()
    monkeypatch.setattr(packing, "_mask", None)
    with torch.autocast("cuda", torch.bfloat16):
        nll = rag(batch, marginal="sequence").nll
        nll.sum().backward()
    torch.testing.assert_close(nll.detach(), expected, rtol=0.02, atol=0.02)
