"""Candidates' scores however many at once, and what is refused of the stage's folder."""

import pytest
import torch

from stages.corpus.token_store import TokenStore, write_tokens
from stages.encoders.reranker_warmup import asked_rows
from stages.rag.opening import open_rag
from stages.search import reranker_folder, reranking
from stages.search.candidates import fitted_weights
from stages.search.reranking import load_reranker
from stages.storage import manifest
from tests.tiny_rag import LENGTHS, QUESTIONS, TITLES, tiny_rag, tiny_reranker

CPU = torch.device("cpu")


@pytest.fixture
def asked():
    store = TokenStore.from_rows(tiny_reranker().encoder.question_rows(QUESTIONS, LENGTHS.question_tokens))
    return asked_rows(store, torch.arange(len(QUESTIONS)), CPU)


def test_scores_are_the_same_alone_together_and_in_pieces_and_nothing_for_a_missing_passage(asked, monkeypatch):
    reranker = tiny_reranker(dropout=0.5)
    rows = torch.stack([torch.arange(len(TITLES)).roll(shift)[:5] for shift in range(len(QUESTIONS))])
    rows[2, 3:] = -1
    reranker.encoder.model.train()  # candidates are scored without dropout all the same
    found = reranker.scores_of_all(asked, rows)
    assert reranker.encoder.model.training
    reranker.encoder.model.eval()
    monkeypatch.setitem(reranking.TOKENS_AT_ONCE, "cpu", 1)
    torch.testing.assert_close(reranker.scores_of_all(asked, rows), found, rtol=1e-5, atol=1e-5)
    with_gradient = reranker.scores(asked, rows)
    torch.testing.assert_close(with_gradient, found, rtol=1e-5, atol=1e-5)
    assert with_gradient.requires_grad and not found.requires_grad
    assert found[2, 3:].tolist() == [0.0, 0.0] and found[0].std() > 0.05


def test_what_the_stage_left_is_read_and_what_does_not_fit_is_named(tmp_path):
    assert load_reranker(tmp_path, None) is None
    with pytest.raises(ValueError, match="reranker.json: not found; run `dvc repro`"):
        load_reranker(tmp_path, "some/model")
    reranker = tiny_reranker()
    reranker.encoder.save(tmp_path / "model")
    rows = reranker.tokens
    lists = [rows.tokens[a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]
    write_tokens(tmp_path / "tokens", [lists], 7168)
    reranker_folder.record(tmp_path, "some/model")
    manifest.record_folder(tmp_path)
    again = load_reranker(tmp_path, "some/model")
    assert torch.equal(again.tokens.tokens.int(), rows.tokens.int())
    with pytest.raises(ValueError, match="made of some/model, but models.reranker is another; run `dvc repro --force"):
        load_reranker(tmp_path, "another")
    fewer = tiny_rag(passages=8)
    with pytest.raises(ValueError, match="data/reranker holds 9 passages, data/tokens 8; run `dvc repro`"):
        open_rag(fewer.encoder, fewer.generator, fewer.index, fewer.passages, 3, LENGTHS, CPU, reranker=again)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="dvc repro --force reranker"):
        load_reranker(tmp_path, "some/model")


def test_fitted_weights_are_those_that_made_the_gold_passages():
    """Gold passages drawn from a known prior over random scores: the fit finds its weights again."""
    random = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 8000, 6, generator=random)
    truth = torch.tensor([2.0, 0.5, 1.0])
    missing = torch.zeros(8000, 6, dtype=torch.bool)
    missing[:, 5] = True
    prior = (truth[:, None, None] * parts).sum(0).masked_fill(missing, float("-inf")).softmax(1)
    gold = torch.zeros(8000, 6, dtype=torch.bool).scatter(1, prior.multinomial(1, generator=random), True)
    torch.testing.assert_close(fitted_weights(parts, gold, missing), truth, rtol=0.1, atol=0.1)
