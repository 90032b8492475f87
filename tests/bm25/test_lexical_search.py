"""BM25 in shards and processes against the library's own ranking of the whole."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import bm25s
import numpy as np
import pytest
from datasets import Dataset

from stages import lexical
from stages.bm25 import lexical_search
from stages.bm25.lexical_search import search, shards_of, words_of
from stages.corpus.arrow import PASSAGES, QUESTIONS, write_rows

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
    index.index(words_of([f"T {text}" for text in passages["text"]]), show_progress=False)
    _, scores = index.retrieve(words_of(questions), k=10, show_progress=False)
    rows, found = search(shards_of(passages), questions, 10)
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    for question, hits, expected in zip(questions, rows, scores, strict=True):
        every = index.get_scores(question.split())
        np.testing.assert_allclose(every[hits], expected, rtol=1e-5)


def test_shards_find_nearly_the_same(passages, questions):
    whole, _ = search(shards_of(passages), questions, 10)
    parts, _ = search(shards_of(passages, shard=150), questions, 10)
    shared = [len(set(some) & set(others)) for some, others in zip(whole.tolist(), parts.tolist(), strict=True)]
    assert np.mean(shared) > 8 and parts.max() > 450 and parts.min() < 150


def test_fewer_hits_than_asked_for(passages):
    rows, scores = search(shards_of(passages.select(range(3))), ["nothing in common", "the of and", ""], 5)
    assert rows.shape == (3, 5) and (rows == -1).all() and not scores.any()
    rows, _ = search(shards_of(passages.select(range(3))), [passages[1]["text"]], 5)
    assert rows[0, 0] == 1 and sorted(rows[0])[:2] == [-1, -1]


def test_passages_without_a_single_word():
    passages = Dataset.from_dict({"id": ["a", "b"], "title": ["", ""], "text": ["!", "the"]})
    rows, scores = search(shards_of(passages), ["where is it", "tower"], 5)
    assert (rows == -1).all() and not scores.any()
    assert [found.shape for found in search(shards_of(passages), [], 5)] == [(0, 5), (0, 5)]


def test_processes_and_kept_shards_find_the_same(passages, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(lexical_search, "QUESTIONS_A_TASK", 7)
    expected = search(shards_of(passages, k1=0.9, b=0.4, shard=250), questions, 10)
    forked = search(
        lexical_search.save(shards_of(passages, k1=0.9, b=0.4, shard=250, processes=2), tmp_path),
        questions,
        10,
        processes=2,
    )
    kept = search(lexical_search.load(tmp_path), questions, 10)
    for found in (forked, kept):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    assert not list(tmp_path.rglob("*.pkl")) and len(list(tmp_path.iterdir())) == 3


def test_forms_of_a_word_are_one_word():
    passages = Dataset.from_dict(
        {"id": ["a", "b"], "title": ["", ""], "text": ["The engines were built.", "A garden."]}
    )
    rows, _ = search(shards_of(passages), ["Who is building an engine?"], 1)
    assert rows.tolist() == [[0]]


SAVED = """
import sys; from pathlib import Path; from datasets import Dataset; from stages.bm25 import lexical_search
texts = ["The engines of old ships were built here.", "A garden behind the oldest house.", "Ships sail past gardens."]
passages = Dataset.from_dict({"id": list("abc"), "title": ["One", "Two", "Three"], "text": texts})
list(lexical_search.save(lexical_search.shards_of(passages), Path(sys.argv[1])))
"""


def test_every_process_writes_the_same_index(tmp_path):
    found = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SAVED, str(tmp_path / seed)], check=True, env=environment)
        files = sorted(file for file in Path(tmp_path / seed).rglob("*") if file.is_file())
        found.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert found[0] == found[1] and len(found[0]) >= 4


def test_a_jax_that_is_installed_stays_off_the_gpu(tmp_path):
    package = tmp_path / "jax"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nprint('jax on', os.environ.get('JAX_PLATFORMS'))\n")
    (package / "lax.py").write_text("def top_k(scores, k): pass\n")
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", "import stages.bm25.lexical_search"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "jax on cpu" in done.stdout


def test_recall_is_by_answers_where_no_test_question_names_a_passage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data/prepared/passages.arrow", PASSAGES, [{"id": "a", "title": "", "text": "a tower"}])
    for split in ("train", "validation", "test"):
        row = {
            "id": "q",
            "question": "Which tower?",
            "answers": ["x" if split != "test" else "tower"],
            "positive_ids": [],
        }
        write_rows(tmp_path / f"data/prepared/{split}.arrow", QUESTIONS, [row])
    for number, (more, expected) in enumerate(
        [((), {"answer_recall_at_1": 100.0}), (("tower",), {}), ((None, True), {"answer_recall_at_1": 100.0})]
    ):
        (tmp_path / str(number)).mkdir()
        assert lexical.find_hits(tmp_path / str(number), 1, 1, "en", *more) == expected
