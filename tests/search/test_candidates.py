"""The fitted prior: likelier than where it began, right against another optimiser, the same that training starts from."""

import json

import pytest
import scipy.optimize
import torch

from stages.params import load_params
from stages.rag.prior import Weights, starting_prior
from stages.search.candidates import WEIGHTS, Candidates, fitted_prior, gold_nll, ranking_metrics, weighted
from stages.search.reranker_folder import FACTS
from stages.storage import manifest

N, C = 600, 8
START = {"score_scale": 20.0, "hybrid_weight": 0.3, "cross_weight": 1.0, "temperature": 1.0}
TRUTH = START | {"hybrid_weight": 0.1, "cross_weight": 2.0, "temperature": 3.0}


def drawn(truth=None, reranker=True, hybrid=True):
    """Candidates whose gold passage was drawn from the prior of the weights `truth`, with some missing."""
    random = torch.Generator().manual_seed(0)
    rows = torch.arange(N * C).view(N, C)
    rows[::3, -2:] = -1
    dense, lexical, crossed = (scale * torch.randn(N, C, generator=random) for scale in (0.3, 10.0, 2.0))
    found = Candidates(rows, dense, lexical if hybrid else torch.zeros(N, C))
    crossed = crossed if reranker else None
    prior = weighted(found, crossed, truth or TRUTH).masked_fill(rows < 0, float("-inf")).softmax(1)
    gold = torch.zeros(N, C, dtype=torch.bool).scatter(1, prior.multinomial(1, generator=random), True)
    gold[:50] = False  # not found
    return found, crossed, gold


@pytest.mark.parametrize(("reranker", "hybrid"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("start", [START, TRUTH], ids=["elsewhere", "at the truth"])
def test_a_fit_is_likelier_than_its_start_and_leaves_what_is_not_there(start, reranker, hybrid):
    found, crossed, gold = drawn(reranker=reranker, hybrid=hybrid)
    fitted, before, after = fitted_prior(found, crossed, gold, start)
    missing = found.rows < 0
    assert before == pytest.approx(gold_nll(weighted(found, crossed, start), gold, missing))
    assert after == pytest.approx(gold_nll(weighted(found, crossed, fitted), gold, missing))
    assert after <= before and (start is TRUTH or after < before - 0.05)
    assert fitted["score_scale"] == 20.0 and fitted["temperature"] != start["temperature"]
    assert reranker or fitted["cross_weight"] == start["cross_weight"]
    assert hybrid or fitted["hybrid_weight"] == start["hybrid_weight"]


def test_it_is_the_optimum_that_another_optimiser_finds_and_any_start_leads_there():
    found, crossed, gold = drawn()
    fitted = fitted_prior(found, crossed, gold, START)[0]

    def nll(values):
        weights = dict(zip(WEIGHTS, [20.0, *values.tolist()], strict=True))
        return gold_nll(weighted(found, crossed, weights), gold, found.rows < 0)

    others = scipy.optimize.minimize(nll, [0.3, 1.0, 1.0], method="Nelder-Mead").x
    assert [fitted[name] for name in WEIGHTS[1:]] == pytest.approx(others.tolist(), rel=0.1)
    assert [fitted[name] for name in WEIGHTS] == pytest.approx([TRUTH[name] for name in WEIGHTS], rel=0.25)
    again = fitted_prior(found, crossed, gold, TRUTH)[0]
    assert [again[name] for name in WEIGHTS] == pytest.approx([fitted[name] for name in WEIGHTS], rel=0.1)
    still = fitted_prior(found, crossed, gold, START | {"cross_weight": 0.0})[0]
    assert still["cross_weight"] == 0.0


def test_a_few_questions_that_are_all_ranked_right_leave_a_prior_that_can_still_learn():
    """Without its bounds the fit sharpened the prior of twelve such questions until no gradient was left."""
    found, crossed, _ = drawn()
    few = Candidates(found.rows[:12], found.dense[:12], found.lexical[:12])
    gold = torch.zeros(12, C, dtype=torch.bool)
    scores = weighted(few, crossed[:12], START).masked_fill(few.rows < 0, float("-inf"))
    gold[torch.arange(12), scores.argmax(1)] = True
    fitted, before, after = fitted_prior(few, crossed[:12], gold, START)
    assert after < before and 0.2 < fitted["temperature"] < 1


def test_the_table_has_every_search_and_none_that_was_not_made():
    found, crossed, gold = drawn()
    golds = [found.rows[row][some].tolist() for row, some in enumerate(gold)]
    settings = load_params().retriever.model_copy(update={name: START[name] for name in WEIGHTS})
    alone = {"dense": found.rows.gather(1, found.dense.argsort(1, descending=True)), "bm25": found.rows[:, :3]}
    metrics, fitted = ranking_metrics(found, alone, crossed, golds, settings, (1, 5, 20))
    for name in ("dense", "candidates", "reranker", "reranked", "fitted"):
        assert (
            0 < metrics[f"{name}_recall_at_1"] < metrics[f"{name}_recall_at_5"] <= metrics["candidates_recall"] == 100
        )
    assert "bm25_recall_at_1" in metrics and "bm25_recall_at_5" not in metrics and "dense_recall_at_20" not in metrics
    assert metrics["fitted_temperature"] == fitted["temperature"]
    plain, _ = ranking_metrics(found, {}, None, golds, settings, (1, 5))
    assert not [name for name in plain if name.startswith(("dense", "bm25", "rerank"))]
    assert {"fitted_recall_at_1", "fitted_hybrid_weight"} <= plain.keys() and "fitted_cross_weight" not in plain
    assert ranking_metrics(found, alone, crossed, [[]] * N, settings, (1, 5)) == ({}, None)


def test_training_starts_from_the_fit_where_weights_learn_and_from_the_parameters_where_not(tmp_path):
    settings = load_params().retriever
    frozen, learning = (settings.model_copy(update={"learn_weights": learn}) for learn in (False, True))
    named = Weights(**{name: getattr(settings, name) for name in WEIGHTS})

    def stage_left(facts):
        (tmp_path / FACTS).write_text(json.dumps(facts))
        manifest.record_folder(tmp_path)

    with pytest.raises(ValueError, match="reranker.json: not found; run `dvc repro`"):
        starting_prior(learning, tmp_path)
    stage_left({"model": None, "weights": TRUTH})
    assert starting_prior(frozen, tmp_path)() == named and not list(starting_prior(frozen, tmp_path).parameters())
    start = starting_prior(learning, tmp_path)
    assert start.numbers() == pytest.approx(TRUTH) and start.log_factors.requires_grad
    stage_left({"model": None, "weights": None})  # dense retrieval, or questions that name no passage
    start = starting_prior(learning, tmp_path)
    assert start.numbers() == pytest.approx(named._asdict()) and start.log_factors is not None
    stage_left({"model": None})
    with pytest.raises(
        ValueError, match="no weights for retriever.learn_weights to start from; run `dvc repro --force rer"
    ):
        starting_prior(learning, tmp_path)
