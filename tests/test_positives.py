"""BM25 against the whole at once, and positives that contain an answer."""

import bm25s
import numpy as np
import pytest
from datasets import Dataset

from stages.positives import best_hits, find_positives, lacking

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def passages():
    random = np.random.default_rng(5)
    texts = [" ".join(random.choice(WORDS, 12)) for _ in range(600)]
    return Dataset.from_dict({"id": [f"p{i}" for i in range(600)], "title": ["T"] * 600, "text": texts})


@pytest.fixture(scope="module")
def questions():
    random = np.random.default_rng(6)
    return [" ".join(random.choice(WORDS, 4)) for _ in range(30)]


def test_one_shard_is_the_library_s_own_ranking(passages, questions):
    index = bm25s.BM25()
    index.index(
        bm25s.tokenize([f"T {text}" for text in passages["text"]], stopwords="en", show_progress=False),
        show_progress=False,
    )
    _, scores = index.retrieve(
        bm25s.tokenize(questions, stopwords="en", show_progress=False), k=10, show_progress=False
    )
    rows = best_hits(passages, questions, 10)
    for question, hits, expected in zip(questions, rows, scores, strict=True):
        every = index.get_scores(question.split())
        np.testing.assert_allclose(every[hits], expected, rtol=1e-5)


def test_shards_find_nearly_the_same(passages, questions):
    whole, parts = best_hits(passages, questions, 10), best_hits(passages, questions, 10, shard=150)
    shared = [len(set(some) & set(others)) for some, others in zip(whole.tolist(), parts.tolist(), strict=True)]
    assert np.mean(shared) > 8 and parts.max() > 450 and parts.min() < 150


def test_fewer_hits_than_asked_for(passages):
    rows = best_hits(passages.select(range(3)), ["nothing in common", "the of and", ""], 5)
    assert rows.shape == (3, 5) and (rows == -1).all()
    rows = best_hits(passages.select(range(3)), [passages[1]["text"]], 5)
    assert rows[0, 0] == 1 and sorted(rows[0])[:2] == [-1, -1]


def test_the_positive_is_the_first_hit_with_an_answer():
    texts = [
        "The tower stands in a town.", "The tower of Oslo is high.", "The tower, the tower, the tower!", "Oslo has a park.",
    ]  # fmt: skip
    passages = Dataset.from_dict({"id": list("abcd"), "title": [""] * 4, "text": texts})
    rows = [
        {"question": "Where is the tower?", "answers": ["the OSLO!"], "positive_ids": []},
        {"question": "Where is the tower?", "answers": ["Bergen"], "positive_ids": []},
        {"question": "Where is the tower?", "answers": ["Slo"], "positive_ids": []},
    ]
    assert find_positives(passages, rows, depth=3) == 1
    assert [row["positive_ids"] for row in rows] == [["b"], [], []]
    assert find_positives(passages, [rows[0] | {"positive_ids": []}], depth=1) == 0


def test_questions_that_have_a_positive_and_test_questions_are_not_searched_for():
    def row(name, positives):
        return {"id": name, "positive_ids": positives}

    questions = {
        "train": [row("a", []), row("b", ["p"]), row("c", [])],
        "validation": [row("d", [])],
        "test": [row("e", [])],
    }
    assert [question["id"] for question in lacking(questions, None)] == ["a", "c", "d"]
    assert [question["id"] for question in lacking(questions, 1)] == ["a", "d"]


def test_passages_without_a_single_word():
    passages = Dataset.from_dict({"id": ["a", "b"], "title": ["", ""], "text": ["!", "the"]})
    assert (best_hits(passages, ["where is it", "tower"], 5) == -1).all()
