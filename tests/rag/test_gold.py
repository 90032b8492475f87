"""Known positives beside the marginal: the loss and every gradient against a loop over all candidates in float64."""

import copy

import pytest
import torch

from stages.bm25.hits import Hits
from stages.encoders.cross_encoder import Asked
from stages.rag import ranked
from stages.rag.gold import FURTHER, gold_beside, retrieve_with_golds
from stages.rag.prior import PriorWeights, Weights
from tests.tiny_rag import ANSWERS, QUESTIONS, TITLES, TOGETHER, reranked_rag, tiny_rag
from tests.training.test_index_refresh import refreshing_rag

COUNT = len(TITLES)
EVERYTHING = list(range(len(QUESTIONS)))
WORDS = torch.rand(len(QUESTIONS), COUNT, generator=torch.Generator().manual_seed(2)) * 9
WEIGHTS = Weights(1.5, 0.4, 2.0, 1.25)
N_DOCS, DEPTH = 3, 5
KINDS = pytest.mark.parametrize("kind", ["dense", "hybrid", "reranked", "reranked hybrid", "refreshed hybrid"])


def rag_of(kind, **options):
    prior = PriorWeights(WEIGHTS, learns=True)
    if "refreshed" in kind:
        rag = refreshing_rag(N_DOCS, dropout=0.0, prior=prior)
        with torch.no_grad():  # the index is old
            rag.context_encoder.ctx_encoder.encode_proj.weight.mul_(0.9).add_(0.01)
        return rag
    if "reranked" in kind:
        return reranked_rag(N_DOCS, DEPTH, weights=WEIGHTS, **options)
    rag = tiny_rag(N_DOCS, **options)
    rag.prior = prior
    return rag


def hits_of(kind):
    scores, rows = WORDS.topk(4, dim=1)
    return Hits(rows, scores) if "hybrid" in kind else None


class ByHand:
    """All passages' scores in float64, and which of them compete and are read."""

    def __init__(self, rag, kind):
        batch = rag.batch(rag.examples(QUESTIONS, ANSWERS, hits_of(kind)), EVERYTHING)
        self.vectors = rag.encode_questions(batch).detach().double().requires_grad_()
        self.factors = rag.prior.log_factors.detach().double().requires_grad_()
        self.weights = [start * factor for start, factor in zip(WEIGHTS, self.factors.exp(), strict=True)]
        stored = rag.index.vectors.double()
        self.cross = self.lexical = None
        if "hybrid" in kind:
            words = WORDS.double()
            lowest = words.topk(4, dim=1).values[:, -1:]
            self.lexical = words.where(words >= lowest, lowest)
        crossed = torch.zeros(len(QUESTIONS), COUNT).double()
        if "reranked" in kind:
            self.cross = copy.deepcopy(rag.cross_encoder).double()
            every = torch.arange(COUNT).repeat(len(QUESTIONS))
            pairs = rag.reranker.encoder.pairs(batch.asked.repeated(COUNT), rag.reranker.tokens, every)
            ids, inside = pairs.packing.unpack(pairs.ids), pairs.packing.unpack(torch.ones_like(pairs.ids))
            crossed = self.cross(input_ids=ids + (1 - inside), attention_mask=inside).logits.view(-1, COUNT)
        self.live = self.ranking = self.scores(stored, crossed)
        if "refreshed" in kind:
            self.contexts = copy.deepcopy(rag.passage_encoder)
            every = self.contexts.vectors(torch.arange(COUNT)[None])[0]
            self.live = self.scores(every.double(), crossed)
        # of what is not read, missing ones included
        self.width = DEPTH - N_DOCS if "reranked" in kind else 2 * 4 - N_DOCS if "refreshed" in kind else 0
        self.pool = self.competing(kind, stored)
        self.read = [
            sorted(pool, key=lambda row: -self.ranking[question, row].item())[:N_DOCS]
            if "reranked" in kind else pool[:N_DOCS]
            for question, pool in enumerate(self.pool)
        ]  # fmt: skip

    def scores(self, passages, crossed):
        scale, weight, of_cross, temperature = self.weights
        scores = scale * (self.vectors @ passages.T) + of_cross * crossed
        return (scores if self.lexical is None else scores + weight * self.lexical) / temperature

    @torch.no_grad()
    def competing(self, kind, stored):
        """Each question's candidates, best first by the searches alone."""
        dense = self.vectors @ stored.T
        fused = WEIGHTS.score_scale * dense + (WEIGHTS.hybrid_weight * self.lexical if "hybrid" in kind else 0.0)
        pools = []
        for question in EVERYTHING:
            width = DEPTH if "reranked" in kind or kind == "dense" else 4
            pool = set(dense[question].topk(width).indices.tolist())
            if "hybrid" in kind:
                pool |= set(WORDS[question].topk(4).indices.tolist())
            pool = sorted(pool, key=lambda row: -fused[question, row].item())
            pools.append(pool[:DEPTH] if "reranked" in kind else pool)
        return pools

    def golds(self):
        """One that is read, one that is a candidate, one that is none, none at all, several."""
        golds = []
        for question, (read, pool) in enumerate(zip(self.read, self.pool, strict=True)):
            unread = [row for row in pool if row not in read]
            absent = [row for row in range(COUNT) if row not in pool]
            golds.append(
                [read[1:2], unread[-1:], absent[:1], [], [absent[0], *unread[:2]], read[:1] + absent][question % 6]
            )
        return golds

    def nll(self, golds):
        total = []
        for question, gold in enumerate(golds):
            if not gold:
                total.append(torch.zeros(()).double())
                continue
            read, pool = self.read[question], self.pool[question]
            ordered = sorted(pool, key=lambda row: -self.ranking[question, row].item())
            beside = [] if set(read) & set(gold) else [next((row for row in ordered if row in gold), gold[0])]
            members = [*pool, *beside]
            if self.width:  # a model scores them
                rest = [row for row in ordered if row not in read]
                members = [
                    *read,
                    *beside,
                    *(rest[at] for at in {int(x * self.width) for x in FURTHER} if at < len(rest)),
                ]
            score = {row: self.live[question, row] for row in members}
            chosen = torch.stack([score[row] for row in score if row in gold])
            total.append(torch.stack(list(score.values())).logsumexp(0) - chosen.logsumexp(0))
        return torch.stack(total)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    monkeypatch.setattr(ranked, "DENSE_CANDIDATES", DEPTH)


@KINDS
def test_loss_and_gradients_are_those_of_a_loop_over_all_candidates(kind):
    rag = rag_of(kind)
    expected = ByHand(rag, kind)
    golds = expected.golds()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS, hits_of(kind), golds), EVERYTHING)
    vectors = expected.vectors.detach().float().requires_grad_()
    rows, scores, nll = retrieve_with_golds(rag, vectors, batch)
    assert rows.tolist() == expected.read
    chosen = torch.stack([expected.live[question, rows[question]] for question in EVERYTHING])
    torch.testing.assert_close(scores.double(), chosen, rtol=1e-4, atol=1e-4)
    by_hand = expected.nll(golds)
    torch.testing.assert_close(nll.double(), by_hand, rtol=1e-4, atol=1e-4)
    assert by_hand[3] == 0 and (by_hand[[0, 1, 2, 4]] > 1e-3).all()

    nll.sum().backward()
    by_hand.sum().backward()
    torch.testing.assert_close(vectors.grad.double(), expected.vectors.grad, rtol=1e-3, atol=1e-4)
    assert not vectors.grad[3].any() and vectors.grad[[0, 1, 2, 4]].abs().amax(1).min() > 1e-3
    torch.testing.assert_close(rag.prior.log_factors.grad.double(), expected.factors.grad, rtol=1e-3, atol=1e-3)
    if "reranked" in kind:
        pairs = zip(rag.cross_encoder.named_parameters(), expected.cross.parameters(), strict=True)
        for (name, parameter), other in pairs:
            torch.testing.assert_close(
                parameter.grad.double(), other.grad, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert rag.cross_encoder.classifier.weight.grad.abs().max() > 1e-2
    if "refreshed" in kind:
        others = dict(expected.contexts.encoder.model.named_parameters())
        for name, parameter in rag.context_encoder.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-2, atol=1e-3)
        assert any(
            parameter.grad is not None and parameter.grad.any() for parameter in rag.context_encoder.parameters()
        )


@KINDS
def test_the_passages_read_and_their_prior_are_those_without_it(kind):
    rag = rag_of(kind)
    golds = ByHand(rag, kind).golds()
    examples = [rag.examples(QUESTIONS, ANSWERS, hits_of(kind), some) for some in (None, golds)]
    plain, taught = (rag(rag.batch(some, EVERYTHING), marginal="sequence") for some in examples)
    assert torch.equal(plain.rows, taught.rows) and plain.gold_nll is None
    torch.testing.assert_close(plain.nll, taught.nll)
    torch.testing.assert_close(plain.log_prior, taught.log_prior)
    together = {"marginal": "sequence", **TOGETHER}
    torch.testing.assert_close(rag(rag.batch(examples[1], EVERYTHING), **together).gold_nll, taught.gold_nll)


def test_the_cross_encoder_reads_no_candidate_twice_but_those_that_learn(monkeypatch):
    rag = rag_of("reranked")
    expected = ByHand(rag, "reranked")
    golds, read = expected.golds(), []
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS, None, golds), EVERYTHING)
    pairs = rag.reranker.encoder.pairs
    monkeypatch.setattr(
        rag.reranker.encoder,
        "pairs",
        lambda asked, *rest: read.append((len(asked.ids), torch.is_grad_enabled())) or pairs(asked, *rest),
    )
    retrieve_with_golds(rag, rag.encode_questions(batch), batch)
    few = len(QUESTIONS) * (N_DOCS + 1)
    assert read[0] == (DEPTH * len(QUESTIONS), False) and read[1][1] and len(read) == 2
    assert (
        few < read[1][0] < few + len(QUESTIONS)
    )  # those read, one further down, and a gold passage for some questions


def test_what_moves_all_scores_alike_has_no_gradient():
    """Or it would move them on and on: the head's bias changes no softmax."""
    rag = rag_of("reranked hybrid")
    golds = ByHand(rag, "reranked hybrid").golds()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS, hits_of("hybrid"), golds), EVERYTHING)
    retrieve_with_golds(rag, rag.encode_questions(batch), batch)[2].sum().backward()
    bias, weight = rag.cross_encoder.classifier.bias.grad, rag.cross_encoder.classifier.weight.grad
    assert abs(bias.item()) < 1e-5 and weight.abs().max() > 1e-2


def test_present_passages_alone_are_scored():
    rag = reranked_rag()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    rows = torch.randint(-1, COUNT, (len(QUESTIONS), 4), generator=torch.Generator().manual_seed(1))
    assert (rows < 0).any() and (rows[:, -1] >= 0).any()
    torch.testing.assert_close(
        rag.reranker.scores_of_present(batch.asked, rows), rag.reranker.scores(batch.asked, rows)
    )
    none = torch.full((2, 3), -1)
    assert torch.equal(
        rag.reranker.scores_of_present(Asked(*(part[:2] for part in batch.asked)), none), torch.zeros(2, 3)
    )


def test_one_gold_passage_comes_beside_those_read_where_these_hold_none():
    read, rest = torch.tensor([[1, 2]] * 5 + [[-1, -1]]), torch.tensor([[3, 4, -1]] * 5 + [[-1, -1, -1]])
    golds = torch.tensor([[2, 9, -1], [9, 4, 3], [9, 8, -1], [-1, -1, -1], [4, 1, -1], [7, -1, -1]])
    assert gold_beside(read, rest, golds).flatten().tolist() == [-1, 3, 9, -1, -1, 7]
    assert gold_beside(read, rest[:, :0], golds).flatten().tolist() == [-1, 9, 9, -1, -1, 7]


@pytest.mark.parametrize("kind", ["dense", "reranked"])
def test_where_little_or_nothing_is_found_every_gradient_is_finite(kind, monkeypatch):
    few = rag_of(kind, passages=2)
    few.n_docs = 4
    golds = [[index % 2] for index in EVERYTHING]
    output = few(few.batch(few.examples(QUESTIONS, ANSWERS, None, golds), EVERYTHING), marginal="sequence")
    output.gold_nll.sum().backward()
    assert (output.gold_nll > 0).any() and (output.rows[:, 2:] < 0).all()
    rag = rag_of(kind)
    monkeypatch.setattr(rag.index, "search", lambda questions, wanted: torch.full((len(questions), wanted), -1))
    output = rag(rag.batch(rag.examples(QUESTIONS, ANSWERS, None, [[0], *[[]] * 8]), EVERYTHING), marginal="sequence")
    (output.nll + output.gold_nll).sum().backward()
    assert not output.gold_nll.any() and (output.log_prior[:, 0] == 0).all()
    for one in (few, rag):
        assert all(torch.isfinite(p.grad).all() for p in one.parameters() if p.grad is not None)
