"""Recall, MRR and nDCG against pytrec_eval, the reference of BEIR and MS MARCO."""

import random

import pytest
import pytrec_eval

from stages.corpus.ranking import ndcg, reciprocal_rank, retrieval_scores

DEPTHS = (1, 5, 20)


def made_up(seed: int, graded: bool) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Rankings of up to 30 of 60 passages, -1 behind a shorter one's end, and judgements some of which none finds."""
    draw = random.Random(seed)
    found, golds = [], []
    for _ in range(40):
        some = draw.sample(range(60), draw.randint(3, 30))
        found.append(some + [-1] * (30 - len(some)))
        judged = draw.sample(range(60), draw.choice([1, 1, 2, 5, 15]))
        golds.append({row: float(draw.randint(1, 3)) if graded else 1.0 for row in judged})
    return found, golds


@pytest.mark.parametrize("graded", [False, True])
def test_the_scores_are_trec_evals(graded):
    found, golds = made_up(1 + graded, graded)
    judged = {f"q{at}": {f"p{row}": int(grade) for row, grade in gold.items()} for at, gold in enumerate(golds)}
    run = {
        f"q{at}": {f"p{row}": 100.0 - place for place, row in enumerate(rows) if row >= 0}
        for at, rows in enumerate(found)
    }
    measures = {"success.1,5", "recall.1,5,20", "ndcg_cut.10"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    # trec_eval cuts no reciprocal rank: MS MARCO's MRR@10 is that of the first ten alone.
    first_ten = {name: dict(list(scores.items())[:10]) for name, scores in run.items()}
    ranks = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first_ten)

    def mean(name: str, of: dict = theirs) -> float:
        return 100 * sum(scores[name] for scores in of.values()) / len(of)

    ours = retrieval_scores(found, golds, DEPTHS)
    assert ours["ndcg_at_10"] == pytest.approx(mean("ndcg_cut_10"), abs=1e-9)
    assert ours["mrr_at_10"] == pytest.approx(mean("recip_rank", ranks), abs=1e-9)
    for k in DEPTHS:
        assert ours[f"recall_of_all_at_{k}"] == pytest.approx(mean(f"recall_{k}"), abs=1e-9)
    for k in (1, 5):
        assert ours[f"recall_at_{k}"] == pytest.approx(mean(f"success_{k}"), abs=1e-9)


def test_only_questions_with_gold_passages_count_and_one_gold_passage_needs_one_recall():
    found, golds = [[4, 7], [7, 4], [1, 2]], [{7: 1.0}, {7: 1.0}, {}]
    scores = retrieval_scores(found, golds, (1,))
    assert scores == {
        "recall_at_1": 50.0,
        "mrr_at_10": 75.0,
        "ndcg_at_10": pytest.approx(50 * (1 + 0.6309297535714575)),
    }
    assert retrieval_scores(found, [{}] * 3, (1,)) == {} == retrieval_scores([], [], (1,))


def test_what_comes_behind_the_tenth_counts_for_nothing():
    gold = {10: 3.0}
    assert reciprocal_rank(range(10), gold) == ndcg(range(10), gold) == 0.0
    assert reciprocal_rank(range(1, 11), gold) == pytest.approx(1 / 10) and ndcg(range(1, 11), gold) > 0
