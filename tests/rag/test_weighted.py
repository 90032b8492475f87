"""Passages read together, each attended to as much as its prior says, against what that means without a prior."""

import pytest
import torch
from torch import Tensor

from stages.generation import marginalization
from stages.generation.seq2seq import Contexts
from stages.rag.together import joint_contexts, read_together
from tests.generation.test_packed_bart import distance
from tests.rag.test_model import lose
from tests.rag.test_parallel import rag_of as decoder_only
from tests.rag.test_together import (
    EVERYTHING,
    OTHERS,
    assert_packed_gradients_are_the_padded_ones,
    batch_of,
    gradients,
    summed,
)
from tests.rag.test_together import rag_by as encoder_decoder
from tests.tiny_rag import reranked_rag, tiny_rag

WAYS = ["bart", "bart, padded", "t5", *OTHERS]
DECODER_ONLY = ["llama", "llama, padded", "gemma", "gpt2"]
BOTH = pytest.mark.parametrize("way", ["bart", "bart, padded", "t5"])
ROWS = torch.tensor([[4, 0, 7], [1, 3, 5], [8, 2, 6], [2, 0, 1]])
ASKED = [0, 3, 5, 6]


def rag_by(way: str):
    if way.split(",")[0] not in DECODER_ONLY:
        return encoder_decoder(way)
    rag = decoder_only(way.split(",")[0], prefix=[0])
    if "padded" in way:
        rag.packed = None
    return rag


def weighted(rag, rows=EVERYTHING, gradient="exact"):
    return rag(batch_of(rag, rows), marginal="sequence", reading="weighted", retriever_gradient=gradient)


def likelihood(rag, batch, rows, prior: list | Tensor | None) -> Tensor:
    """log p(y | x, all passages) [B]; a list is the same prior for every question."""
    if isinstance(prior, list):
        prior = torch.tensor(prior).log().expand(rows.shape)
    flat = "together" if rag.generator_model.config.is_encoder_decoder else "parallel"
    return summed(read_together(rag, batch, rows, flat if prior is None else "weighted", prior).joint, batch)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_twice_the_prior_is_a_passage_that_stands_there_twice(way):
    """Attention's softmax sums over copies: reading together without a prior, of rows that name a passage again."""
    rag = rag_by(way)
    batch = batch_of(rag, ASKED)
    expected = likelihood(rag, batch, torch.cat([ROWS, ROWS[:, [0, 0, 1]]], 1), None)
    torch.testing.assert_close(likelihood(rag, batch, ROWS, [3 / 6, 2 / 6, 1 / 6]), expected, rtol=1e-5, atol=1e-4)
    assert (expected - likelihood(rag, batch, ROWS, None)).abs().min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_flat_prior_is_none(way):
    rag = rag_by(way)
    batch = batch_of(rag, ASKED)
    flat = likelihood(rag, batch, ROWS, [1 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(flat, likelihood(rag, batch, ROWS, None), rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", [*WAYS, *DECODER_ONLY])
def test_a_sure_passage_is_read_as_if_alone_and_so_are_copies_of_it_whatever_they_weigh(way):
    rag = rag_by(way)
    batch = batch_of(rag, ASKED)
    sure = likelihood(rag, batch, ROWS, torch.tensor([[-40.0, 0.0, -40.0]]).expand(4, -1))
    alone = rag.token_log_probs(batch, *rag.contexts(batch, ROWS[:, [1]]))[:, 0]
    longest = rag.passages.offsets.diff()[ROWS].amax(1) == rag.passages.offsets.diff()[ROWS[:, 1]]
    # Of a decoder-only model the tail stands behind the longest passage.
    same = longest if way in DECODER_ONLY else torch.ones(4, dtype=torch.bool)
    assert same.any()
    torch.testing.assert_close(sure[same], summed(alone, batch)[same], rtol=1e-5, atol=1e-4)
    copies = likelihood(rag, batch, ROWS[:, [1, 1, 1]], [0.7, 0.2, 0.1])
    torch.testing.assert_close(copies, summed(alone, batch), rtol=1e-5, atol=1e-4)


@torch.no_grad()
@BOTH
def test_padding_and_missing_passages_change_nothing(way):
    rag = rag_by(way)
    batch = batch_of(rag)
    rows = torch.arange(27).view(9, 3) % 9
    torch.manual_seed(0)
    prior = torch.randn(9, 3).log_softmax(1)
    among = likelihood(rag, batch, rows, prior)
    for question in EVERYTHING:
        alone = batch_of(rag, [question])
        own, weights = rows[[question]], prior[[question]]
        for read, given in (
            (own.flip(1), weights.flip(1)),
            (torch.cat([torch.full((1, 2), -1), own], 1), torch.cat([torch.full((1, 2), -torch.inf), weights], 1)),
        ):
            found = likelihood(rag, alone, read, given)
            torch.testing.assert_close(found[0], among[question], rtol=1e-5, atol=1e-4)


@BOTH
def test_the_gradient_on_the_scores_is_the_likelihoods(way):
    """Against central differences."""
    rag = rag_by(way)
    batch = batch_of(rag, ASKED)
    rag.generator_model.double()
    torch.manual_seed(0)
    scores = torch.randn(4, 3, dtype=torch.double, requires_grad=True)

    def loss(scores):
        return -likelihood(rag, batch, ROWS, scores.log_softmax(1)).sum()

    [found] = torch.autograd.grad(loss(scores), scores)
    step, expected = 3e-2, torch.zeros(scores.numel())
    with torch.no_grad():
        for place in range(scores.numel()):
            moved = torch.zeros(scores.numel(), dtype=torch.double)
            moved[place] = step
            moved = moved.view_as(scores)
            expected[place] = (loss(scores + moved) - loss(scores - moved)) / (2 * step)
    # Log-probabilities are summed up in fp32.
    assert (found.flatten() - expected).norm() < 1e-2 * expected.norm() and found.abs().min() > 1e-6


def test_a_decoder_only_generators_likelihood_teaches_the_question_encoder():
    rag = rag_by("llama")
    assert {name.split(".")[0] for name in gradients(rag, weighted(rag).nll)} == {"question_encoder", "generator_model"}


def test_it_teaches_everything_that_ranks_and_with_none_nothing_of_it():
    rag = reranked_rag()
    parts = {name.split(".")[0] for name in gradients(rag, weighted(rag).nll)}
    assert parts == {"question_encoder", "cross_encoder", "prior", "generator_model"}
    output = weighted(rag, gradient="none")
    assert {name.split(".")[0] for name in gradients(rag, output.nll)} == {"generator_model"}
    assert output.retriever_loss is None and output.scored_under == weighted(rag).scored_under == 1


def test_packed_gradients_are_the_padded_ones():
    assert_packed_gradients_are_the_padded_ones(lambda rag: weighted(rag).nll)


@pytest.mark.parametrize("way", ["bart", "bart, padded", "t5", "llama", "gpt2"])
def test_a_question_for_which_nothing_was_found_is_read_alone_and_teaches_the_retriever_nothing(way):
    rag = rag_by(way)
    batch = batch_of(rag, [2, 5])
    expected = -summed(rag.token_log_probs(batch, *rag.contexts(batch, torch.full((2, 1), -1)))[:, 0], batch)[0]
    usual = weighted(rag, [2, 5])
    lose(rag)
    output = weighted(rag, [2, 5])
    torch.testing.assert_close(output.nll, torch.stack([expected, usual.nll[1]]), rtol=1e-5, atol=1e-4)
    taught = gradients(rag, output.nll[0])
    assert all(name.startswith("generator") and value.isfinite().all() for name, value in taught.items())


def test_an_index_smaller_than_n_docs():
    few, many = tiny_rag(n_docs=2, passages=2), tiny_rag(n_docs=5, passages=2)
    outputs = [weighted(rag) for rag in (few, many)]
    torch.testing.assert_close(outputs[0].nll, outputs[1].nll, rtol=1e-5, atol=1e-5)
    found, expected = (gradients(rag, output.nll) for rag, output in zip((few, many), outputs, strict=True))
    assert distance(found, expected) < 1e-4


@torch.no_grad()
@BOTH
def test_what_decoding_reads_is_what_training_reads(way):
    """Also repeated and chosen, as beams do it."""
    rag = rag_by(way)
    batch = batch_of(rag, ASKED)
    prior = marginalization.log_prior(torch.tensor([[0.0, 1.0, -1.0]]).expand(4, -1))
    contexts = rag.generator.encode(*rag.contexts(batch, ROWS))
    joined = joint_contexts(rag, batch, ROWS, contexts, "weighted", prior)
    expected = likelihood(rag, batch, ROWS, prior)
    for read, places in ((joined, [0, 1, 2, 3]), (joined.repeat(2), [0, 0, 1, 1, 2, 2, 3, 3]),
                         (joined.select(torch.tensor([3, 1])), [3, 1])):  # fmt: skip
        logits = rag.generator.logits(read, batch.targets[places])
        scored = logits.log_softmax(-1).gather(-1, batch.targets[places][..., None])[..., 0]
        found = scored.masked_fill(~batch.target_mask[places], 0.0).sum(-1)
        torch.testing.assert_close(found, expected[places], rtol=1e-5, atol=1e-4)
    assert isinstance(joined, Contexts) and joined.bias is not None


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers(monkeypatch):
    rag, compiled = rag_by("bart"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **options: compiled(layer, backend="aot_eager", **options))
    batch = batch_of(rag, ASKED)

    def scored():
        prior = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(4, 1).requires_grad_()
        found = likelihood(rag, batch, ROWS, prior)
        return found.detach(), *torch.autograd.grad(found.sum(), prior)

    plain = scored()
    rag.packed.compile()
    for found, expected in zip(scored(), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
