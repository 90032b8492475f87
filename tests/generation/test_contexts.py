"""Contexts against a plain reference: passages are cut, questions never."""

import random

import numpy as np
import pytest
import torch

from stages.corpus.token_store import TokenStore, write_tokens
from stages.generation.contexts import assemble_contexts, assemble_together

PAD = 1


def reference(passage, question, limit, prefix, suffix):
    room = limit - len(prefix) - len(suffix) - len(question)
    return prefix + passage[:room] + question + suffix


@pytest.mark.parametrize(("prefix", "suffix"), [([0], [2]), ([], [2]), ([0, 7], [8, 2]), ([], [])])
@pytest.mark.parametrize("width", [None, 40])
def test_against_lists(prefix, suffix, width):
    random.seed(len(prefix) + (width or 0))
    passages = [[random.randint(10, 99) for _ in range(random.randint(0, 60))] for _ in range(20)]
    questions = [[random.randint(100, 199) for _ in range(random.randint(1, 12))] for _ in range(20)]
    rows = [random.choice([-1, *range(20)]) for _ in questions]
    asked = TokenStore.from_rows(questions)
    padded, lengths = asked.padded(torch.arange(20), 12, PAD)
    ids, mask = assemble_contexts(
        TokenStore.from_rows(passages), torch.tensor(rows), padded, lengths, limit=36, prefix=prefix, suffix=suffix,
        pad=PAD, width=width,
    )  # fmt: skip
    expected = [
        reference(passages[row] if row >= 0 else [], question, 36, prefix, suffix)
        for row, question in zip(rows, questions, strict=True)
    ]
    assert ids.shape[1] == (width or max(map(len, expected)))
    for found, real, row in zip(ids.tolist(), mask.tolist(), expected, strict=True):
        assert found == row + [PAD] * (len(found) - len(row))
        assert real == [1] * len(row) + [0] * (len(found) - len(row))


def together(passages, question, limit, prefix, separator, suffix):
    """Of the passages that are there, in their order."""
    room = limit - len(prefix) - len(suffix) - len(question)
    text = []
    for number, passage in enumerate(passages):
        text += (separator if number else []) + passage[:room]
    return prefix + text + question + suffix


@pytest.mark.parametrize(("prefix", "suffix"), [([0], [2]), ([], [2]), ([0, 7], [8, 2])])
@pytest.mark.parametrize("separator", [[], [5], [5, 6]])
@pytest.mark.parametrize("n_docs", [1, 2, 5])
def test_together_against_lists(prefix, suffix, separator, n_docs):
    random.seed(n_docs)
    passages = [[random.randint(10, 99) for _ in range(random.randint(0, 60))] for _ in range(20)]
    questions = [[random.randint(100, 199) for _ in range(random.randint(2, 12))] for _ in range(40)]
    rows = [[random.choice([-1, random.randrange(20)]) for _ in range(n_docs)] for _ in questions]
    rows[0] = [-1] * n_docs
    padded, lengths = TokenStore.from_rows(questions).padded(torch.arange(40), 12, PAD)
    store, frame = TokenStore.from_rows(passages), dict(limit=36, prefix=prefix, suffix=suffix, pad=PAD)
    ids, mask = assemble_together(store, torch.tensor(rows), padded, lengths, separator=separator, **frame)
    expected = [
        together([passages[row] for row in some if row >= 0], question, 36, prefix, separator, suffix)
        for some, question in zip(rows, questions, strict=True)
    ]
    assert ids.shape[1] == max(map(len, expected)) <= n_docs * 36
    assert ids.tolist() == [row + [PAD] * (ids.shape[1] - len(row)) for row in expected]
    assert mask.tolist() == [[1] * len(row) + [0] * (ids.shape[1] - len(row)) for row in expected]
    if n_docs == 1:
        alone = assemble_contexts(store, torch.tensor(rows)[:, 0], padded, lengths, **frame)
        assert all(torch.equal(one, other) for one, other in zip((ids, mask), alone, strict=True))


def test_a_question_that_cannot_fit_is_the_callers_mistake():
    with pytest.raises(AssertionError):
        assemble_contexts(
            TokenStore.from_rows([[5]]), torch.tensor([0]), torch.full((1, 9), 7), torch.tensor([9]), limit=10,
            prefix=[0], suffix=[2], pad=PAD,
        )  # fmt: skip


@pytest.mark.parametrize(("vocab", "dtype"), [(8192, torch.int16), (50265, torch.int32)])
def test_written_tokens_come_back_memory_mapped(tmp_path, vocab, dtype):
    rows = [[1, 2, vocab - 1], [], [4], list(range(50))]
    assert write_tokens(tmp_path, iter([rows[:2], [], rows[2:]]), vocab) == 4
    store = TokenStore.open(tmp_path)
    assert store.tokens.dtype == dtype and len(store) == 4
    ids, lengths = store.padded(torch.tensor([3, 1, 0]), 5, PAD)
    assert lengths.tolist() == [5, 0, 3]
    assert ids.tolist() == [[0, 1, 2, 3, 4], [PAD] * 5, [1, 2, vocab - 1, PAD, PAD]]
    assert isinstance(np.load(tmp_path / "tokens.npy", mmap_mode="r"), np.memmap)


def test_missing_and_cut_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokens.npy: not found"):
        TokenStore.open(tmp_path)
    write_tokens(tmp_path, [[[1, 2, 3]] * 100], 100)
    file = tmp_path / "tokens.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged"):
        TokenStore.open(tmp_path)
    file.write_bytes(content)
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 5]))
    with pytest.raises(ValueError, match="cut short"):
        TokenStore.open(tmp_path)
