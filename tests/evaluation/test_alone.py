"""Dense search and BM25 alone beside what was put together: against brute force; never a number for what was not searched."""

import pytest
import torch

from stages.bm25.hits import Hits
from stages.corpus.answers import hits_with_answers
from stages.evaluation.alone import flags_alone, recall_alone
from stages.evaluation.answering import evaluate
from stages.rag.prior import PriorWeights, Weights
from stages.reporting.page import score_table
from tests.evaluation.test_answering import ASKED, GOLD_ROWS, PASSAGES, SETTINGS
from tests.reporting.made_up import experiment
from tests.tiny_rag import ANSWERS, QUESTIONS, TITLES, reranked_rag, tiny_rag

WORDS = torch.rand(len(QUESTIONS), len(TITLES), generator=torch.Generator().manual_seed(2)) * 9


def hits(depth):
    scores, rows = WORDS.topk(depth, dim=1)
    return Hits(rows, scores)


def hybrid():
    rag = tiny_rag()
    rag.prior = PriorWeights(Weights(1.0, 5.0))
    return rag


def dense_order(rag):
    with torch.no_grad():
        batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), list(range(len(QUESTIONS))))
        return (rag.encode_questions(batch) @ rag.index.vectors.T).argsort(dim=1, descending=True)


def share(rows, k):
    return 100 * sum(bool({*rows[i, :k].tolist()} & {*gold}) for i, gold in enumerate(GOLD_ROWS) if gold) / 7


def test_each_search_has_its_own_recall_beside_the_hybrids():
    rag, some = hybrid(), hits(6)
    metrics, predictions = evaluate(rag, ASKED, PASSAGES, GOLD_ROWS, SETTINGS, "sequence", some)
    dense = dense_order(rag)
    assert not torch.equal(dense[:, 0], some.rows[:, 0])
    for k in (1, 5):
        assert metrics[f"dense_recall_at_{k}"] == pytest.approx(share(dense, k))
        assert metrics[f"bm25_recall_at_{k}"] == pytest.approx(share(some.rows, k))
    assert metrics["dense_recall_at_20"] == 100.0 and "bm25_recall_at_20" not in metrics, "six hits are no twenty"
    assert predictions[3]["alone"]["bm25_recall_at_1"] == (some.rows[3, 0].item() == 3)
    assert predictions[8]["alone"] == {}, "the question names no passage"


def test_dense_retrieval_is_its_own_line_and_has_none_of_bm25():
    metrics, predictions = evaluate(tiny_rag(), ASKED, PASSAGES, GOLD_ROWS, SETTINGS, "sequence")
    assert not [name for name in metrics if "bm25" in name or "dense" in name]
    assert all(row["alone"] == {} for row in predictions)


def test_a_reranker_over_dense_search_has_the_dense_line_alone():
    rag = reranked_rag()
    found = recall_alone(flags_alone(rag, rag.examples(QUESTIONS, ANSWERS), GOLD_ROWS, None, (1, 5), 4))
    assert found == {f"dense_recall_at_{k}": pytest.approx(share(dense_order(rag), k)) for k in (1, 5)}


def test_without_gold_passages_it_goes_by_the_answers_words():
    rag, some = hybrid(), hits(6)
    metrics, _ = evaluate(rag, ASKED, PASSAGES, [[]] * 9, SETTINGS, "sequence", some)
    first = [[row] for row in some.rows[:, 0].tolist()]
    words = [flags[0] for flags in hits_with_answers(PASSAGES, first, list(ASKED["answers"]))]
    assert metrics["bm25_answer_recall_at_1"] == pytest.approx(100 * sum(words) / 9)
    assert "dense_answer_recall_at_5" in metrics and "bm25_recall_at_1" not in metrics


def test_the_reports_table_has_the_lines_that_were_measured():
    made = experiment()
    assert not [line for line in score_table([made]) if "alone" in line["name"]]
    for number, row in enumerate(made.rows):
        row["alone"] = {"bm25_recall_at_1": number % 4 == 0, "dense_answer_recall_at_5": True}
    found = {line["name"]: line["intervals"][0].mean for line in score_table([made]) if "alone" in line["name"]}
    assert found == {"BM25 alone, recall@1": 25.0, "dense alone, recall@5": 100.0}
