"""Passages read in parallel against transformers' own models, told by an explicit mask and positions what to see."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.generation import marginalization
from stages.generation.blocks import FAMILIES, Blocks, PackedBlocks, causal_attention, fits
from stages.generation.generator import generator_from
from stages.packed import packing
from stages.rag.opening import open_rag
from stages.rag.together import prompts_together, read_together
from tests.generation.test_packed_bart import distance
from tests.rag.test_model import lose
from tests.tiny_rag import ANSWERS, LENGTHS, QUESTIONS, tiny_rag, tokenizer

SIZES = dict(
    vocab_size=8192, bos_token_id=0, pad_token_id=1, eos_token_id=2, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=72,
)  # fmt: skip
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=72, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
# Found, found in part (the middle missing, the first and the end missing), not found at all.
ROWS = torch.tensor([[4, 0, 7], [1, -1, 5], [-1, 2, -1], [-1, -1, -1]])
SOME = [0, 3, 5, 6]
PREFIX = [0, 77]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")


def rag_of(family="llama", prefix=(), n_docs=3):
    """`prefix`: what stands before the passages, as BOS or a chat's frame would."""
    rag = tiny_rag()
    torch.manual_seed(0)
    sizes = GPT2 | dict(vocab_size=8192, bos_token_id=0, eos_token_id=2) if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **sizes | dict(sliding_window=None))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    generator = generator_from(model, tokenizer("generator"))
    generator.context_prefix = list(prefix)
    return open_rag(
        rag.encoder, generator, rag.index, rag.passages, n_docs, LENGTHS, torch.device("cpu"), reading="parallel"
    )


def batch_of(rag, some=SOME):
    return rag.batch(rag.examples(QUESTIONS, ANSWERS), some)


def by_the_book(rag, question, rows, written, model=None, prior=None):
    """log p [n + 1, V] of what follows each of the n tokens `written`, and what comes before them, by transformers' model.

    One prompt, made of lists, without padding; the mask says what each token sees and, with a `prior` [K], the tail how well.
    """
    generator = rag.generator
    [asked] = generator.question_tokens([QUESTIONS[question]])
    prefix, tail = generator.context_prefix, [*asked, *generator.context_suffix, *written]
    room = LENGTHS.context_tokens - len(prefix) - len(asked) - len(generator.context_suffix)
    offsets = rag.passages.offsets
    passages = [rag.passages.tokens[offsets[row] : offsets[row + 1]].tolist()[:room] for row in rows if row >= 0]
    longest = max(map(len, passages), default=0)
    ids, positions, blocks = list(prefix), list(range(len(prefix))), ["prefix"] * len(prefix)
    for number, passage in enumerate(passages):
        ids += passage
        positions += range(len(prefix), len(prefix) + len(passage))
        blocks += [number] * len(passage)
    ids += tail
    positions += range(len(prefix) + longest, len(prefix) + longest + len(tail))
    blocks += ["tail"] * len(tail)
    seen = [
        [k <= q and (blocks[q] == "tail" or blocks[k] in ("prefix", blocks[q])) for k in range(len(ids))]
        for q in range(len(ids))
    ]
    weights = torch.zeros(len(ids))
    if prior is not None:
        there = prior[torch.tensor(rows) >= 0]
        weights = torch.stack([there[at] if isinstance(at, int) else torch.zeros(()) for at in blocks])
    tail = torch.tensor([at == "tail" for at in blocks])[:, None]
    added = torch.where(tail, weights, 0.0)
    mask = torch.where(torch.tensor(seen), added, torch.finfo(torch.float).min)[None, None]
    logits = (model or copy.deepcopy(generator.model))(
        input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=torch.tensor([positions]), use_cache=False
    ).logits[0, -len(written) - 1 :]
    return logits.log_softmax(-1)


def expected_log_probs(rag, batch, rows, some=SOME, model=None, prior=None):
    found = []
    for place, (question, targets, mask) in enumerate(zip(some, batch.targets, batch.target_mask, strict=True)):
        answer, weights = targets[mask], None if prior is None else prior[place]
        log_probs = by_the_book(rag, question, rows[place].tolist(), answer[:-1].tolist(), model, weights)
        found.append(log_probs.gather(1, answer[:, None]).squeeze(1))
    return torch.cat(found)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def some_prior(rows=ROWS):
    """log p(z | x), another for every question."""
    torch.manual_seed(3)
    return marginalization.log_prior(torch.randn(rows.shape).masked_fill(rows < 0, float("-inf")))


def way_by(prior):
    return "parallel" if prior is None else "weighted"


WEIGHED = pytest.mark.parametrize("weighed", [False, True], ids=["parallel", "weighted"])
FRAMED = pytest.mark.parametrize("prefix", [(), PREFIX], ids=["bare", "prefix"])
BOTH = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])


@torch.no_grad()
@FRAMED
@BOTH
@WEIGHED
@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_is_the_librarys_told_what_to_see(family, weighed, prefix, packed):
    rag = rag_of(family, prefix)
    assert bool(rag.packed) == (family != "gpt2")
    if not packed:
        rag.packed = None
    batch = batch_of(rag)
    prior = some_prior() if weighed else None
    found = read_together(rag, batch, ROWS, way_by(prior), prior).joint[batch.target_mask]
    torch.testing.assert_close(found, expected_log_probs(rag, batch, ROWS, prior=prior), rtol=1e-5, atol=1e-5)
    if weighed:
        flat = read_together(rag, batch, ROWS, "parallel").joint[batch.target_mask]
        assert (found - flat).abs().max() > 1e-2
    elif family != "gpt2":  # whose positions are too few for all passages in a row
        together = read_together(rag, batch, ROWS, "together").joint[batch.target_mask]
        assert (found - together).abs().max() > 1e-2


@FRAMED
@BOTH
@WEIGHED
def test_gradients_are_the_librarys_too(weighed, prefix, packed):
    """Those on the prior, too."""
    rag = rag_of("llama", prefix)
    theirs = copy.deepcopy(rag.generator_model)
    theirs.set_attn_implementation("eager")
    if not packed:
        rag.packed = None
    rag.train()
    batch = batch_of(rag)
    priors = [some_prior().requires_grad_() if weighed else None for _ in range(2)]
    log_probs = read_together(rag, batch, ROWS, way_by(priors[0]), priors[0]).joint
    found = gradients(rag.generator_model, log_probs[batch.target_mask].sum())
    expected = gradients(theirs, expected_log_probs(rag, batch, ROWS, model=theirs, prior=priors[1]).sum())
    assert found.keys() == expected.keys() and distance(found, expected) < 1e-5
    if weighed:
        torch.testing.assert_close(priors[0].grad, priors[1].grad, rtol=1e-4, atol=1e-5)
        assert priors[0].grad.abs().max() > 1e-2


@FRAMED
@WEIGHED
def test_gradient_checkpointing_changes_nothing(weighed, prefix):
    found = []
    for checkpointing in (False, True):
        rag = rag_of("llama", prefix)
        if checkpointing:
            rag.compute_activations_again()
        rag.train()
        batch = batch_of(rag)
        prior = some_prior().requires_grad_() if weighed else None
        log_probs = read_together(rag, batch, ROWS, way_by(prior), prior).joint
        found.append(gradients(rag.generator_model, log_probs[batch.target_mask].sum()))
        if weighed:
            found[-1]["prior"] = prior.grad
    assert distance(*found) < 1e-6


@torch.no_grad()
@FRAMED
def test_a_passages_states_are_its_own_and_the_order_does_not_matter(prefix, monkeypatch):
    rag = rag_of("llama", prefix)
    batch = batch_of(rag, [0])

    def read(rows):
        rows = torch.tensor([rows])
        prompts, kept = prompts_together(rag, batch, rows, "parallel"), []
        hook = (
            rag.generator_model.get_decoder()
            .layers[-1]
            .register_forward_hook(lambda module, given, output: kept.append(output[0]))
        )
        scored = read_together(rag, batch, rows, "parallel").joint[batch.target_mask].sum()
        hook.remove()
        number = prompts.blocks.number[prompts.mask.bool()]
        return [kept[0][: len(number)][number == n] for n in range(rows.shape[1])], scored

    (first, second, third), scored = read([4, 0, 7])
    for order in ([7, 0, 4], [0, 4, 7]):
        torch.testing.assert_close(read(order)[1], scored, rtol=1e-6, atol=1e-5)
    for rows, place, states in (([8, 0, 1], 1, second), ([2, -1, 7], 2, third), ([-1, 0], 1, second)):
        torch.testing.assert_close(read(rows)[0][place], states, rtol=1e-5, atol=1e-5)
    # The first one's come behind those of the prefix, which are counted as its own.
    torch.testing.assert_close(read([7, 0, 4])[0][2], first[len(prefix) :], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@FRAMED
def test_one_passage_is_read_as_by_itself_and_none_as_the_question_alone(prefix):
    rag = rag_of("llama", prefix, n_docs=1)
    batch = batch_of(rag, list(range(len(QUESTIONS))))
    rows = torch.tensor([[5], [-1], [0], [8], [-1], [2], [3], [1], [7]])
    each = rag.token_log_probs(batch, *rag.contexts(batch, rows))[:, 0]
    found = read_together(rag, batch, rows, "parallel").joint
    torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
    among_missing = torch.cat([torch.full_like(rows, -1), rows, torch.full_like(rows, -1)], 1)
    torch.testing.assert_close(read_together(rag, batch, among_missing, "parallel").joint, each, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_likelihoods_under_each_alone_are_those_of_reading_each():
    rag = rag_of()
    batch = batch_of(rag)
    found = read_together(rag, batch, ROWS, "parallel", alone=True)
    torch.testing.assert_close(found.alone, rag.token_log_probs(batch, *rag.contexts(batch, ROWS)))


@pytest.mark.parametrize("gradient", ["emdr2", "perplexity_distillation"])
def test_the_retriever_learns_and_nothing_is_nan(gradient):
    rag = rag_of("llama", PREFIX)
    lose(rag)
    batch = batch_of(rag, list(range(len(QUESTIONS))))
    output = rag(batch, marginal="sequence", reading="parallel", retriever_gradient=gradient)
    (output.nll.sum() + output.retriever_loss.sum()).backward()
    assert torch.isfinite(output.nll).all()
    assert all(torch.isfinite(p.grad).all() for p in rag.parameters() if p.grad is not None)
    if gradient == "emdr2":
        with torch.no_grad():
            alone = rag.token_log_probs(batch, *rag.contexts(batch, output.rows))
        expected = marginalization.sequence_nll(output.log_prior, alone, batch.target_mask)
        torch.testing.assert_close(output.retriever_loss, expected, rtol=1e-5, atol=1e-4)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in rag.question_encoder.parameters())


def test_work_and_memory_grow_with_the_tokens_not_with_their_square(monkeypatch):
    """What attention computes: the scores of all its calls, padding included, for 3 and for 12 passages of one length."""
    scores, whole = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, **options):
        scores.append(query.shape[0] * query.shape[2] * key.shape[2])
        return whole(query, key, value, **options)

    monkeypatch.setattr(packing.F, "scaled_dot_product_attention", counted)
    rag = rag_of("llama", PREFIX)
    work = []
    for count in (3, 12):
        scores.clear()
        with torch.no_grad():
            read_together(rag, batch_of(rag), torch.full((4, count), 2), "parallel")
        work.append(sum(scores))
    assert work[1] < 4 * work[0]


@pytest.mark.slow
@WEIGHED
def test_compiled_layers_are_one_graph_with_the_same_numbers(weighed, monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="aot_eager", **options)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rag = rag_of("llama", PREFIX)
    readings = ROWS, ROWS.flip(0), ROWS[:, :2]

    def log_probs_of(rows):
        prior = some_prior(rows).requires_grad_() if weighed else None
        return read_together(rag, batch_of(rag), rows, way_by(prior), prior).joint

    expected = [log_probs_of(rows).detach() for rows in readings]
    rag.packed.compile()
    rag.train()
    for rows, log_probs in zip(readings, expected, strict=True):
        found = log_probs_of(rows)
        found.sum().backward()
        torch.testing.assert_close(found.detach(), log_probs, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_only_what_sees_the_whole_text_can_read_so():
    assert fits(AutoConfig.for_model("qwen2")) and fits(AutoConfig.for_model("mistral", sliding_window=None))
    windows = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    for other in (
        AutoConfig.for_model("mistral", sliding_window=4), AutoConfig.for_model("qwen3", **windows),
        AutoConfig.for_model("gemma3_text"), AutoConfig.for_model("bloom"), AutoConfig.for_model("bart"),
    ):  # fmt: skip
        assert not fits(other)
    rag = tiny_rag()
    with pytest.raises(ValueError, match="reading: parallel is of decoder-only .* type bart .*use that"):
        open_rag(
            rag.encoder, rag.generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"), reading="parallel"
        )


@on_gpu
@WEIGHED
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_kernel_is_attention_with_a_mask(prefix, weighed):
    """Results and gradients of both calls, of prompts with all, some and no passages."""
    ends = prefix + torch.tensor([[70, 71, 104], [0, 33, 33], [0, 0, 0]], device="cuda")
    mask = torch.arange(prefix + 125, device="cuda") < prefix + torch.tensor([[125], [50], [9]], device="cuda")
    torch.manual_seed(0)
    blocks = Blocks.of(ends, prefix, mask.shape[1])
    if weighed:
        prior = torch.randn(3, 3, device="cuda").log_softmax(1)
        blocks = blocks.weighed(prior.bfloat16().float())
    read = PackedBlocks.of(blocks, mask)
    seen = blocks.mask(torch.float, blocks.seen() & mask[:, None, None])
    parts = [torch.randn(len(read.positions), heads, 64, device="cuda").bfloat16() for heads in (9, 3, 3)]
    weights = torch.randn(len(read.positions), 9, 64, device="cuda")

    def with_gradients(parts, attend):
        parts = [part.requires_grad_() for part in parts]
        mixed = attend(*parts)
        return [mixed, *torch.autograd.grad((mixed.float() * weights).sum(), parts)]

    def masked(query, key, value):
        key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
        padded = [read.prompts.unpack(part).transpose(1, 2) for part in (query, key, value)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*padded, attn_mask=seen, scale=0.2)
        return read.pack(mixed.transpose(1, 2))

    found = with_gradients(parts, lambda *given: causal_attention(*given, read, scale=0.2))
    expected = with_gradients([part.detach().float() for part in parts], masked)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.01
