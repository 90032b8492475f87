"""Hard negatives: what is found, what is no negative after all, what a step draws."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from stages.corpus.answers import contains_answer
from stages.corpus.token_store import TokenStore
from stages.encoders import mining
from stages.encoders.mining import HardNegatives, best_hits, tokenize_passages, without_answers
from stages.encoders.own_passages import OwnPassages
from tests.tiny_rag import QUESTIONS, TEXTS, TITLES, tiny_rag

PASSAGES = Dataset.from_dict({"id": [f"p{i}" for i in range(len(TITLES))], "title": TITLES, "text": TEXTS})
CPU = torch.device("cpu")


class Known:
    """An encoder whose vectors are known, given in windows as a real one gives them."""

    def __init__(self, vectors: np.ndarray):
        self.all, self.dimension = vectors, vectors.shape[1]

    def vectors(self, store, batch_tokens, device, progress):
        for first in range(0, len(store), 7):
            yield first, self.all[first : first + 7]


@pytest.mark.parametrize("depth", [1, 5, 50])
def test_the_best_hits_are_those_of_brute_force(monkeypatch, depth):
    monkeypatch.setattr(mining, "QUESTIONS_A_SEARCH", 4)
    numbers = np.random.default_rng(0)
    questions, passages = (numbers.normal(size=(n, 8)).astype(np.float32) for n in (11, 40))
    stores = [TokenStore.from_rows([[1]] * n) for n in (11, 40)]
    hits = best_hits(Known(questions), Known(passages), *stores, depth, CPU)
    assert hits.tolist() == np.argsort(-(questions @ passages.T), axis=1)[:, :depth].tolist()


def test_real_encoders_search_with_the_vectors_that_training_scores_with():
    encoder = tiny_rag().encoder
    questions = TokenStore.from_rows(encoder.question_rows(QUESTIONS, 24))
    passages = tokenize_passages(encoder, PASSAGES, 48)
    vectors = [
        torch.cat([encoder.embed(row[None], torch.ones_like(row[None])) for row in rows_of(store)]).detach()
        for store in (questions, passages)
    ]
    hits = best_hits(encoder, encoder, questions, passages, 4, CPU)
    assert torch.equal(hits, (vectors[0] @ vectors[1].T).topk(4).indices)


def rows_of(store: TokenStore) -> list[torch.Tensor]:
    return [store.tokens[a:b].long() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


def test_chunks_do_not_show_in_the_tokens(monkeypatch):
    encoder = tiny_rag().encoder
    monkeypatch.setattr(mining, "PASSAGES_A_CHUNK", 4)
    store, expected = tokenize_passages(encoder, PASSAGES, 48), encoder.passage_rows(TITLES, TEXTS, 48)
    assert [row.tolist() for row in rows_of(store)] == expected


def texts(*contents: str) -> Dataset:
    return Dataset.from_list([{"id": f"p{i}", "title": f"T{i}", "text": text} for i, text in enumerate(contents)])


def test_every_positive_and_every_passage_with_an_answer_is_dropped():
    passages = texts("one", "It is The U.S., of course", "two", "usable", "three", "four")
    hits = torch.tensor([[3, 1, 0, 5, 4], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1]])
    answers = [["u.s."], ["nowhere", "T1", "two"], ["\u200b"]]  # the last has no word: it stands nowhere
    own = OwnPassages([[0, 4], [], [2]], TokenStore.from_rows([[row] for row in range(6)]))
    pool = without_answers(hits, answers, own, passages)
    assert pool.tolist() == [[3, 5, -1, -1, -1], [0, 3, 4, -1, -1], [5, 4, 3, 1, -1]]


def test_the_best_are_passed_over_only_among_negatives():
    hits = torch.tensor([[0, 1, 2, 3]])
    own = OwnPassages([[1]], TokenStore.from_rows([[row] for row in range(4)]))
    pool = without_answers(hits, [["one"]], own, texts("one", "two", "three", "four"), skip=1)
    assert pool.tolist() == [[3, -1, -1, -1]]


def test_no_passage_holds_the_answer_of_an_unanswerable_question():
    hits, own = torch.tensor([[0, 1], [0, 1]]), OwnPassages([[], []], TokenStore.from_rows([[0], [1]]))
    pool = without_answers(hits, [["none"], ["none", "one"]], own, texts("none of it", "one"), unanswerable="none")
    assert pool.tolist() == [[0, 1], [-1, -1]]


def test_an_answer_stands_in_a_passage_where_scoring_says_so():
    numbers = np.random.default_rng(1)
    words = ["the", "U.S.", "us", "An", "apple", "applesauce", "New", "York", "10", "10,000"]
    passages = texts(*(" ".join(numbers.choice(words, 6)) for _ in range(30)))
    answers = [[" ".join(numbers.choice(words, n)) for n in (1, 2)] for _ in range(40)]
    own = OwnPassages([[]] * 40, TokenStore.from_rows([[row] for row in range(30)]))
    pool = without_answers(torch.arange(30).repeat(40, 1), answers, own, passages)
    for kept, gold in zip(pool.tolist(), answers, strict=True):
        read = [f"{row['title']} {row['text']}" for row in passages]
        assert [row for row in kept if row >= 0] == [
            i for i, text in enumerate(read) if not contains_answer(text, gold)
        ]


def test_a_draw_is_of_different_passages_of_the_own_pool_and_all_where_there_are_fewer():
    pool = torch.tensor([[10, 11, 12, 13], [20, -1, -1, -1], [-1, -1, -1, -1], [30, 31, 32, -1]])
    drawn = HardNegatives(pool, 2).draw(torch.tensor([3, 1, 2, 0]), torch.Generator().manual_seed(0)).tolist()
    assert [row // 10 for row in drawn] == [3, 3, 2, 1, 1] and len(set(drawn)) == 5
    assert not len(HardNegatives(pool, 2).draw(torch.tensor([2]), torch.Generator()))
    assert HardNegatives(pool, 2).mean == 2.0


def test_draws_follow_the_seed_differ_from_step_to_step_and_reach_the_whole_pool():
    negatives, questions = HardNegatives(torch.arange(60).view(3, 20), 1), torch.arange(3)

    def draws(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [negatives.draw(questions, generator).tolist() for _ in range(300)]

    assert draws(1) == draws(1) != draws(2)
    assert {row for step in draws(1) for row in step} == set(range(60))


def test_a_copy_of_an_own_passage_is_no_negative():
    own = OwnPassages([[1]], TokenStore.from_rows([[5], [6], [6], [7]]))
    pool = without_answers(torch.tensor([[0, 1, -1, 2, 3]]), [["x"]], own, texts("one", "two", "two", "four"))
    assert pool.tolist() == [[0, 3, -1, -1, -1]]
