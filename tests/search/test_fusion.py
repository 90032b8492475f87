"""Hybrid retrieval against a brute-force ranking of all passages, its gradient, and files that do not fit."""

import numpy as np
import pytest
import torch

from stages.bm25.hits import Hits, find_hits, read_hits
from stages.rag.prior import Weights
from stages.search.fusion import fuse
from stages.search.index_kinds import build_index
from stages.search.passage_index import PassageIndex
from stages.storage import manifest
from tests.tiny_rag import ANSWERS, QUESTIONS, TITLES, tiny_rag

PASSAGES, DIMENSION = 40, 6


@pytest.fixture
def setting():
    random = np.random.default_rng(3)
    vectors = random.normal(size=(PASSAGES, DIMENSION)).astype(np.float32)
    index = PassageIndex(build_index(vectors, "Flat"), torch.from_numpy(vectors))
    questions = torch.from_numpy(random.normal(size=(5, DIMENSION)).astype(np.float32))
    words = torch.from_numpy(random.gamma(1.0, 4.0, size=(5, PASSAGES)).astype(np.float32))
    return index, questions, words


def hits_of(words, depth):
    scores, rows = words.topk(depth, dim=1)
    return Hits(rows, scores)


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.3, 1e4])
def test_with_every_passage_a_candidate_it_is_the_ranking_by_the_sum(setting, weight):
    index, questions, words = setting
    every = index.search(questions, PASSAGES)
    rows, added = fuse(index, questions, every, hits_of(words, PASSAGES), 2.0, weight, 7)
    expected = 2.0 * questions @ index.vectors.T + weight * words
    torch.testing.assert_close(rows, expected.topk(7).indices)
    torch.testing.assert_close(added, words.gather(1, rows))


def test_candidates_of_both_and_no_passage_twice(setting):
    index, questions, words = setting
    dense, hits = index.search(questions, 6), hits_of(words, 4)
    rows, added = fuse(index, questions, dense, hits, 1.0, 0.5, 10)
    for question in range(5):
        found = [row for row in rows[question].tolist() if row >= 0]
        assert set(found) == set(dense[question].tolist()) | set(hits.rows[question].tolist())
        assert len(found) == len(set(found)) and rows[question, len(found) :].eq(-1).all()
        by_words = dict(zip(hits.rows[question].tolist(), hits.scores[question].tolist(), strict=True))
        lowest = min(by_words.values())
        expected = [by_words.get(row, lowest) for row in found]
        torch.testing.assert_close(added[question, : len(found)], torch.tensor(expected))


def test_a_list_that_is_not_full_adds_nothing_to_others(setting):
    index, questions, words = setting
    hits = hits_of(words, 4)
    hits.rows[:, 2:], hits.scores[:, 2:] = -1, 0.0
    hits.rows[0], hits.scores[0] = -1, 0.0  # no common word at all
    dense = index.search(questions, 6)
    rows, added = fuse(index, questions, dense, hits, 1.0, 0.5, 6)
    assert torch.equal(rows[0], dense[0]) and not added[0].any()
    outside = torch.tensor([[row not in hits.rows[q].tolist() for row in rows[q].tolist()] for q in range(5)])
    assert not added[outside].any() and (added[~outside] > 0).all()


def hybrid_rag(weight):
    rag = tiny_rag(n_docs=len(TITLES))
    rag.prior.start = Weights(hybrid_weight=weight)
    random = torch.Generator().manual_seed(2)
    words = torch.rand(len(QUESTIONS), len(TITLES), generator=random) * 9
    return rag, rag.batch(rag.examples(QUESTIONS, ANSWERS, hits_of(words, len(TITLES))), list(range(len(QUESTIONS))))


def test_the_prior_is_the_softmax_of_the_sum_and_its_gradient_is_prior_minus_posterior():
    rag, batch = hybrid_rag(0.4)
    vectors = rag.encode_questions(batch).detach().requires_grad_()
    rows, scores = rag.retrieve(vectors, batch.hits)
    ids, mask = rag.contexts(batch, rows)
    with torch.no_grad():
        answers = rag.token_log_probs(batch, ids, mask).masked_fill(~batch.target_mask[:, None], 0.0).sum(-1)
    (-(scores.log_softmax(-1) + answers).logsumexp(-1)).sum().backward()
    share = (scores.softmax(-1) - (scores + answers).softmax(-1)).detach()
    torch.testing.assert_close(vectors.grad, (share[..., None] * rag.index.gather(rows)).sum(1), rtol=1e-4, atol=1e-4)


def test_weight_zero_and_no_hits_are_dense_retrieval():
    rag, batch = hybrid_rag(0.0)
    rag.n_docs = 3
    plain = rag(batch._replace(hits=None), marginal="sequence")
    fused = rag(batch, marginal="sequence")
    assert torch.equal(plain.rows, fused.rows)
    torch.testing.assert_close(fused.nll, plain.nll)


@pytest.fixture
def lexical(tmp_path):
    np.save(tmp_path / "test_rows.npy", np.zeros((3, 2), dtype=np.int32))
    np.save(tmp_path / "test_scores.npy", np.ones((3, 2), dtype=np.float32))
    np.save(tmp_path / "train_rows.npy", np.zeros((9, 2), dtype=np.int32))
    manifest.write_json(tmp_path / "lexical.json", {"depth": 2})
    manifest.record_folder(tmp_path)
    return tmp_path


def test_hits_are_read_and_none_without_a_depth(lexical, tmp_path):
    hits = read_hits(lexical, "test", 2, questions=3, passages=1)
    assert hits.rows.dtype == torch.int64 and hits.rows.shape == hits.scores.shape == (3, 2)
    assert read_hits(tmp_path / "nowhere", "test", 0, 3, 1) is None and find_hits(tmp_path, ["a"], 0) is None


@pytest.mark.parametrize(
    ("depth", "questions", "message"),
    [(4, 3, "depth of 2, but retriever.hybrid_depth is 4"), (2, 5, "there are 5 questions")],
)
def test_hits_of_something_else_are_refused(lexical, depth, questions, message):
    with pytest.raises(ValueError, match=message):
        read_hits(lexical, "test", depth, questions, passages=1)


def test_damaged_and_missing_hits_are_named(lexical, tmp_path):
    with pytest.raises(ValueError, match="lexical.json: not found; run"):
        read_hits(tmp_path / "nowhere", "test", 2, 3, 1)
    (lexical / "train_rows.npy").unlink()  # what is not read need not be there
    assert read_hits(lexical, "test", 2, 3, 1) is not None
    file = lexical / "test_scores.npy"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="test_scores.npy is missing or cut short.*force lexical"):
        read_hits(lexical, "test", 2, 3, 1)
