"""The reranker in the model: its order against brute force, its part of the prior, its gradient, its folder."""

import copy

import pytest
import torch

from stages.bm25.hits import Hits
from stages.params import load_params
from stages.rag.folder import save_rag
from stages.rag.opening import open_rag
from stages.rag.prior import PriorWeights, Weights, load_prior
from tests.tiny_rag import ANSWERS, LENGTHS, QUESTIONS, TITLES, reranked_rag, tiny_rag

EVERYTHING = list(range(len(QUESTIONS)))
WORDS = torch.rand(len(QUESTIONS), len(TITLES), generator=torch.Generator().manual_seed(2)) * 9


def hits(depth=None):
    scores, rows = WORDS.topk(depth or len(TITLES), dim=1)
    return Hits(rows, scores)


def batch_of(rag, some=None):
    return rag.batch(rag.examples(QUESTIONS, ANSWERS, some), EVERYTHING)


def retrieved(rag, batch):
    with torch.no_grad():
        return rag.retrieve(rag.encode_questions(batch), batch.hits, batch.asked)


@pytest.mark.parametrize("hybrid", [False, True], ids=["dense", "hybrid"])
def test_the_order_is_that_of_all_candidates_by_the_sum_of_their_scores(hybrid):
    rag = reranked_rag(n_docs=4, depth=6)
    batch = batch_of(rag, hits() if hybrid else None)
    rows, scores = retrieved(rag, batch)
    with torch.no_grad():
        dense = 1.5 * rag.encode_questions(batch) @ rag.index.vectors.T + (0.4 * WORDS if hybrid else 0.0)
        every = torch.arange(len(TITLES)).expand(len(QUESTIONS), -1)
        everything = dense + 2.0 * rag.reranker.scores(batch.asked, every)
    candidates = dense.topk(6).indices
    best = candidates.gather(1, everything.gather(1, candidates).topk(4).indices)
    assert torch.equal(rows, best)
    torch.testing.assert_close(scores, everything.gather(1, best) / 1.25)
    assert not torch.equal(rows, dense.topk(4).indices)


@pytest.mark.parametrize("hybrid", [False, True], ids=["dense", "hybrid"])
def test_without_weight_and_further_candidates_it_is_retrieval_as_it_was(hybrid):
    weights = Weights(1.5, 0.4, 0.0)
    rag, plain = reranked_rag(3, depth=3, learns=False, weights=weights), tiny_rag(3)
    plain.prior = PriorWeights(weights)
    some = hits(4) if hybrid else None
    for found, expected in zip(
        retrieved(rag, batch_of(rag, some)), retrieved(plain, batch_of(plain, some)), strict=True
    ):
        assert torch.equal(found, expected)


def test_what_learns_to_weigh_three_scores_does_not_choose_by_two_of_them(tmp_path):
    """The candidates stay those of the weights named in params.yaml, which the warm-up and the fit have seen."""
    rag = reranked_rag(n_docs=4, depth=4, weights=Weights(1.5, 0.02, 2.0, 1.25))
    rag.prior.named = Weights(1.5, 3.0)
    batch = batch_of(rag, hits())
    rows, scores = retrieved(rag, batch)
    with torch.no_grad():
        dense = 1.5 * rag.encode_questions(batch) @ rag.index.vectors.T
        candidates = (dense + 3.0 * WORDS).topk(4).indices
        assert not torch.equal(candidates.sort(1).values, (dense + 0.02 * WORDS).topk(4).indices.sort(1).values)
        every = torch.arange(len(TITLES)).expand(len(QUESTIONS), -1)
        everything = (dense + 0.02 * WORDS + 2.0 * rag.reranker.scores(batch.asked, every)) / 1.25
    best = candidates.gather(1, everything.gather(1, candidates).sort(1, descending=True).indices)
    assert torch.equal(rows, best)
    torch.testing.assert_close(scores, everything.gather(1, best))
    settings = load_params().retriever
    rag.prior.save(tmp_path)
    kept = load_prior(tmp_path, settings)
    assert kept.named == (settings.score_scale, settings.hybrid_weight, settings.cross_weight, settings.temperature)
    assert kept().hybrid_weight == pytest.approx(0.02)


def test_more_than_the_reranker_scores_come_behind_in_their_own_order():
    rag, few = reranked_rag(n_docs=8, depth=4), reranked_rag(n_docs=4, depth=4)
    rows, _ = retrieved(rag, batch_of(rag))
    assert torch.equal(rows[:, :4], retrieved(few, batch_of(few))[0])
    with torch.no_grad():
        dense = (rag.encode_questions(batch_of(rag)) @ rag.index.vectors.T).topk(8).indices
    assert torch.equal(rows[:, 4:], dense[:, 4:])


def test_prior_minus_posterior_reaches_the_cross_encoder_and_the_weights():
    """Against autograd of the formula in float64, the cross-encoder's scores from the library's padded forward."""
    rag = reranked_rag(n_docs=3, depth=6)
    with torch.no_grad():
        rag.prior.log_factors.copy_(torch.tensor([0.1, -0.2, 0.3, -0.1]))
    batch = batch_of(rag, hits())
    output = rag(batch, marginal="sequence")
    output.nll.sum().backward()
    rows = output.rows
    with torch.no_grad():
        ids, mask = rag.contexts(batch, rows)
        answers = rag.token_log_probs(batch, ids, mask).masked_fill(~batch.target_mask[:, None], 0.0).sum(-1).double()
        dense = (rag.encode_questions(batch)[:, None] * rag.index.gather(rows)).sum(-1).double()
    cross, factors = copy.deepcopy(rag.cross_encoder).double(), rag.prior.log_factors.detach().double().requires_grad_()
    cross.zero_grad()
    pairs = rag.reranker.encoder.pairs(batch.asked.repeated(3), rag.reranker.tokens, rows.flatten())
    padded, inside = pairs.packing.unpack(pairs.ids), pairs.packing.unpack(torch.ones_like(pairs.ids))
    crossed = cross(input_ids=padded + (1 - inside), attention_mask=inside).logits.view(rows.shape)
    scale, weight, of_cross, temperature = (
        start * factor for start, factor in zip((1.5, 0.4, 2.0, 1.25), factors.exp(), strict=True)
    )
    scores = (scale * dense + weight * WORDS.gather(1, rows).double() + of_cross * crossed) / temperature
    scores.retain_grad()
    nll = -(scores.log_softmax(1) + answers).logsumexp(1)
    nll.sum().backward()
    torch.testing.assert_close(output.nll.double(), nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.grad, scores.softmax(1) - (scores.log_softmax(1) + answers).softmax(1))
    torch.testing.assert_close(rag.prior.log_factors.grad.double(), factors.grad, rtol=1e-3, atol=1e-3)
    assert factors.grad.abs().min() > 1e-2
    for (name, parameter), other in zip(rag.cross_encoder.named_parameters(), cross.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad.double(), other.grad, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert rag.cross_encoder.classifier.weight.grad.abs().max() > 1e-2


def test_missing_passages_leave_every_gradient_finite():
    rag = reranked_rag(n_docs=5, depth=6, passages=2)
    few = reranked_rag(n_docs=2, depth=2, passages=2)
    output, expected = (one(batch_of(one), marginal="sequence") for one in (rag, few))
    torch.testing.assert_close(output.nll, expected.nll, rtol=1e-5, atol=1e-5)
    output.nll.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in rag.parameters() if p.grad is not None)
    assert rag.prior.log_factors.grad.any()


def test_without_a_retriever_gradient_nothing_that_ranks_learns():
    rag = reranked_rag()
    rag(batch_of(rag), marginal="sequence", retriever_gradient="none").nll.sum().backward()
    for module in (rag.question_encoder, rag.cross_encoder, rag.prior):
        assert all(parameter.grad is None for parameter in module.parameters())
    assert any(parameter.grad is not None for parameter in rag.generator_model.parameters())


def test_frozen_weights_are_the_numbers_themselves_and_no_parameter():
    frozen, learning = PriorWeights(Weights(20.0, 0.3)), PriorWeights(Weights(20.0, 0.3), learns=True)
    assert not list(frozen.parameters()) and frozen() == Weights(20.0, 0.3)
    found = learning()
    assert [value.item() for value in found] == [torch.tensor(value).item() for value in Weights(20.0, 0.3)]


def test_the_folder_keeps_the_reranker_and_what_the_weights_learned(tmp_path):
    rag = reranked_rag()
    with torch.no_grad():
        rag.prior.log_factors.copy_(torch.tensor([0.1, -0.2, 0.3, -0.1]))
    save_rag(rag, tmp_path, "sequence")
    again = reranked_rag()
    again.cross_encoder.load_state_dict(type(rag.cross_encoder).from_pretrained(tmp_path / "reranker").state_dict())
    again = open_rag(
        again.encoder, again.generator, again.index, again.passages, 3, LENGTHS, torch.device("cpu"),
        load_prior(tmp_path, load_params().retriever), reranker=again.reranker, rerank_depth=6,
    )  # fmt: skip
    for found, expected in zip(retrieved(again, batch_of(again)), retrieved(rag, batch_of(rag)), strict=True):
        assert torch.equal(found, expected)
    plain = tmp_path / "plain"
    save_rag(tiny_rag(), plain, "sequence")
    assert not (plain / "prior.json").exists() and not (plain / "reranker").exists()
