"""Exact search: the same passages as FAISS in fp32, also where bf16 alone would be wrong."""

import faiss
import numpy as np
import pytest
import torch

from stages.compute import exact_search
from stages.compute.exact_search import ExactSearch, exact_scan, fp32_scores

CPU = torch.device("cpu")


def by_faiss(questions, vectors, k):
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())
    return torch.from_numpy(index.search(questions.numpy(), k)[1])


def some(count, dimension, seed=0):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("passages", "dimension", "k"), [(5000, 64, 5), (3000, 768, 20), (40, 8, 5), (300, 16, 300)])
def test_the_same_rows_as_faiss(passages, dimension, k):
    vectors, questions = some(passages, dimension), some(32, dimension, 1)
    assert torch.equal(ExactSearch(vectors, CPU).search(questions, k), by_faiss(questions, vectors, k))
    assert torch.equal(exact_scan(questions, vectors, k)[1], by_faiss(questions, vectors, k))


def test_bf16_alone_would_be_wrong_here():
    """Scores that differ by less than bf16 resolves: the scan sees ties, more than it proposes at first."""
    base = some(1, 64)[0]
    vectors = (
        base
        * (1 + torch.linspace(0, 1e-3, 3000))[torch.randperm(3000, generator=torch.Generator().manual_seed(2))][:, None]
    )
    questions = torch.stack([base, -base, base * 2])
    rows = ExactSearch(vectors, CPU).search(questions, 5)
    rounded = (questions.bfloat16().float() @ vectors.bfloat16().float().T).topk(5).indices
    assert not torch.equal(rounded, rows)
    assert torch.equal(rows, by_faiss(questions, vectors, 5))


def test_all_passages_alike_still_answer():
    vectors = torch.ones(2000, 16)
    rows = ExactSearch(vectors, CPU).search(torch.ones(3, 16), 5)
    assert all(len(set(row)) == 5 for row in rows.tolist())


def test_chunks_change_nothing(monkeypatch):
    vectors, questions = some(3000, 32), some(7, 32, 1)
    whole = exact_scan(questions, vectors, 10)
    monkeypatch.setattr(exact_search, "SCORES_A_CHUNK", 7 * 64)
    chunked = exact_scan(questions, vectors, 10)
    assert torch.equal(whole[1], chunked[1])
    torch.testing.assert_close(whole[0], chunked[0])
    assert torch.equal(ExactSearch(vectors, CPU).search(questions, 10), whole[1])


def test_fewer_passages_than_wanted():
    assert ExactSearch(some(3, 8), CPU).search(some(2, 8, 1), 5).shape == (2, 3)


def test_autocast_and_precision_settings_are_left_alone():
    vectors, questions = some(500, 32), some(4, 32, 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        rows = ExactSearch(vectors, CPU).search(questions, 5)
        exact_scan(questions, vectors, 5)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)
    assert torch.equal(rows, by_faiss(questions, vectors, 5))


def test_scores_are_inner_products():
    questions, passages = some(4, 8), some(12, 8, 1).view(4, 3, 8)
    np.testing.assert_allclose(
        fp32_scores(questions, passages), torch.einsum("bd,bkd->bk", questions, passages), rtol=1e-5
    )


def test_vectors_that_are_bf16_already_are_searched_without_a_copy():
    vectors, questions = some(3000, 32).bfloat16(), some(6, 32, 1)
    search = ExactSearch(vectors, CPU)
    assert search.scan.data_ptr() == vectors.data_ptr() and search.error == 0
    assert torch.equal(search.search(questions, 5), exact_scan(questions, vectors.float(), 5)[1])
