"""Our own decoder of Llama and its like against the library's with its cache, and against FlashAttention on a GPU."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.evaluation import states
from stages.evaluation.causal_state import CausalState
from stages.evaluation.decoding import generate
from stages.evaluation.llama_decoder import LlamaState
from stages.evaluation.shared_contexts import Hypotheses, SharedContexts, attend, attend_before, merged
from stages.evaluation.states import start
from stages.generation.causal import Causal
from stages.packed.packing import Packing
from tests.generation.test_causal import SIZES

EOS = 2
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
FAMILIES = {
    "llama": dict(rope_parameters=LLAMA3, attention_bias=True),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": {},
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")


def random_generator(family, **changes):
    torch.manual_seed(0)
    sizes = SIZES | dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2) | FAMILIES[family] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.3) if weight.dim() > 1 else weight.data.add_(0.1 * torch.randn_like(weight))
    return Causal(model, None, EOS, 1, [], [], False, 64)


def prompts():
    random = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([9, 3, 6, 1])[:, None]
    return torch.randint(4, 60, mask.shape, generator=random), mask.long()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_move_gives_the_librarys_numbers(family):
    generator = random_generator(family)
    contexts = generator.encode(*prompts())
    ours, theirs = start(generator, contexts), CausalState.of(generator, contexts)
    assert isinstance(ours, LlamaState)
    random = torch.Generator().manual_seed(2)

    def same(ours, theirs, rows, count):
        tokens = torch.randint(4, 60, (rows, count), generator=random)
        torch.testing.assert_close(ours.advance(tokens), theirs.advance(tokens), rtol=1e-4, atol=1e-5)

    torch.testing.assert_close(ours.first(), theirs.first(), rtol=1e-4, atol=1e-5)
    beams = [state.fork(torch.arange(4).repeat_interleave(3)) for state in (ours, theirs)]
    for step in range(10):  # more than there is room for at first
        same(*beams, 12, 1)
        order = (torch.arange(4)[:, None] * 3 + torch.randint(0, 3, (4, 3), generator=random)).flatten()
        for state in beams:
            state.reorder(order)
        if step == 4:
            kept = torch.tensor([7, 6, 7, 11])  # two contexts are left, and more of one than of the other
            fewer = [state.fork(kept) for state in beams]
            same(*fewer, 4, 3)
            same(*fewer, 4, 2)
    rescored = [state.fork(torch.tensor([2, 0, 2])) for state in (ours, theirs)]
    same(*rescored, 3, 5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("decoding", ["thorough", "fast"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_answers_are_those_of_the_librarys_cache(family, decoding, beams, monkeypatch):
    generator = random_generator(family)
    generator.decode = lambda ids: " ".join(map(str, ids))
    ids, mask = (part.view(2, 2, -1) for part in prompts())
    prior = torch.tensor([[-0.5, -0.9], [-0.1, -2.3]])

    def answers():
        return generate(
            generator, ids, mask, prior, num_beams=beams, max_answer_tokens=6, decoding=decoding,
            marginalization="sequence",
        )  # fmt: skip

    ours = answers()
    monkeypatch.setattr(states.LlamaState, "fits", staticmethod(lambda model: False))
    for answer, expected in zip(ours, answers(), strict=True):
        assert answer.token_ids == expected.token_ids
        assert answer.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        assert answer.doc_log_probs == pytest.approx(expected.doc_log_probs, abs=1e-4)


def test_what_is_written_otherwise_stays_with_the_library():
    assert LlamaState.fits(random_generator("llama").model)
    assert not LlamaState.fits(random_generator("mistral", sliding_window=4).model)
    windows = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not LlamaState.fits(random_generator("qwen2", **windows).model)
    dynamic = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
    assert not LlamaState.fits(random_generator("llama", rope_parameters=dynamic).model)
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2))
    assert not LlamaState.fits(gpt2)


def test_two_parts_of_the_keys_are_one_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 6, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    parts = [attend(query, key[:, :, some], value[:, :, some], 0.3) for some in (slice(0, 4), slice(4, 9))]
    shared = [part.repeat_interleave(3, 1) for part in (key, value)]
    whole = torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *shared, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(merged(*parts), whole)


@on_gpu
@pytest.mark.parametrize("count", [1, 3])
def test_flash_attention_gives_the_numbers_of_matrix_products(count):
    """Results and sums, of contexts that no hypothesis asks, some ask once and others several times."""
    torch.manual_seed(0)
    packing = Packing.of(torch.arange(200, device="cuda") < torch.tensor([[200], [1], [77], [130]], device="cuda"))
    tokens = len(packing.index)
    layer = [torch.randn(tokens, 3, 64, device="cuda").bfloat16() for _ in range(2)]
    rows = torch.tensor([3, 0, 3, 2, 3, 0], device="cuda")
    query = torch.randn(6, count, 9, 64, device="cuda").bfloat16()
    own = [torch.randn(6, 3, 8, 64, device="cuda").bfloat16()[:, :, :5] for _ in range(2)]
    results = []
    for cast in (lambda part: part, lambda part: part.float()):
        contexts = SharedContexts.of([tuple(map(cast, layer))], packing).under(rows)
        results.append(contexts.read(cast(query), 0, 0.125))
        results.append(attend_before(cast(query), *map(cast, own), 0.125))
    for found, expected in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(found[0].float(), expected[0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(found[1].float(), expected[1], rtol=0.01, atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_half_precision_stays_near_the_library(device):
    generator = random_generator("llama", hidden_size=96, head_dim=16)
    generator.model.to(device, torch.bfloat16)
    contexts = generator.encode(*(part.to(device) for part in prompts()))
    ours, theirs = start(generator, contexts), CausalState.of(generator, contexts)
    first, expected = ours.first(), theirs.first()
    assert (first - expected).norm() / expected.norm() < 0.05
    rows = torch.arange(4, device=device).repeat_interleave(3)
    tokens = torch.arange(5, 17, device=device)[:, None]
    found, expected = (state.fork(rows).advance(tokens).float() for state in (ours, theirs))
    assert (found - expected).norm() / expected.norm() < 0.05


def test_hypotheses_know_their_place():
    at = Hypotheses.on(torch.tensor([2, 0, 2, 2, 0]), 4)
    assert at.width == 3 and at.place.tolist() == [6, 0, 7, 8, 1]
    assert at.order.tolist() == [1, 4, 0, 2, 3] and at.ends.tolist() == [0, 2, 2, 5, 5]
