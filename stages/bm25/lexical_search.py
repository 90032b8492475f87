"""BM25 over all passages (Robertson & Zaragoza 2009) by the library bm25s, in shards that bound the memory.

Words are the language's stems without its stop words, as Lucene's analysers have them, where the libraries know them: of
1,000 questions about 200,000 Wikipedia passages, English stems found the gold passage among the first five for 82.0 %,
plain words for 80.0 %. Chinese, Japanese and Thai are read in pairs of characters (corpus/words.py). Frequencies are those
of the shard: at a hundred thousand passages they differ little from those of the whole.
"""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import Stemmer
from tqdm import tqdm

# bm25s imports JAX where it is installed, and JAX would take three quarters of the GPU's memory for nothing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
import bm25s  # noqa: E402

from stages.corpus import words as scripts  # noqa: E402

if TYPE_CHECKING:
    from datasets import Dataset  # to ask a question takes no second for it

SHARD = 100_000  # passages of one index: about 1 GB while it is made, at 100 words each
SHARDS_AT_ONCE = 4  # made beside each other at most
QUESTIONS_A_TASK = 256

# By the language's code in ISO 639-1; Snowball and bm25s know no others.
STEMMERS = {
    "ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english",
    "eo": "esperanto", "es": "spanish", "et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish", "fr": "french",
    "ga": "irish", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian",
    "lt": "lithuanian", "nb": "norwegian", "ne": "nepali", "nl": "dutch", "nn": "norwegian", "no": "norwegian",
    "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sr": "serbian", "sv": "swedish", "ta": "tamil",
    "tr": "turkish", "yi": "yiddish",
}  # fmt: skip
STOP_WORDS = {
    **{code: code for code in ("da", "de", "en", "es", "fr", "it", "ko", "nl", "no", "pt", "ru", "sv", "tr")},
    "nb": "no", "nn": "no",
}  # fmt: skip
_index: bm25s.BM25 | None = None  # what forked processes share


def words_of(texts: list[str], return_ids: bool = True, language: str = "en"):
    """Stems of each text: as ids with their vocabulary, which an index is made of, or as lists of strings."""
    stemmer = Stemmer.Stemmer(STEMMERS[language]) if STEMMERS.get(language) in Stemmer.algorithms() else None
    texts = [scripts.paired(text) for text in texts]
    plain = np.array([scripts.is_plain(text) for text in texts], dtype=bool)
    rows, vocabularies = [None] * len(texts), []
    for some, pattern in ((plain, scripts.PLAIN_PATTERN), (~plain, scripts.PATTERN)):
        chosen = np.flatnonzero(some).tolist()
        words = bm25s.tokenize(
            [texts[row] for row in chosen], stopwords=STOP_WORDS.get(language), stemmer=stemmer, token_pattern=pattern,
            return_ids=return_ids, show_progress=False,
        )  # fmt: skip
        vocabularies.append(words.vocab if return_ids else {})
        for row, found in zip(chosen, words.ids if return_ids else words, strict=True):
            rows[row] = found
    if not return_ids:
        return rows
    # The library numbers stems in the order of a set, which is another one in every process.
    new_ids = {word: number for number, word in enumerate(sorted(set().union(*vocabularies)))}
    for some, vocabulary in zip((plain, ~plain), vocabularies, strict=True):
        renumbered = np.empty(len(vocabulary), dtype=np.int64)
        renumbered[list(vocabulary.values())] = [new_ids[word] for word in vocabulary]
        for row in np.flatnonzero(some).tolist():
            rows[row] = renumbered[rows[row]].tolist()
    return bm25s.tokenization.Tokenized(ids=rows, vocab=new_ids)


def shards_of(
    passages: "Dataset", k1: float = 1.5, b: float = 0.75, shard: int = SHARD, language: str = "en", processes: int = 1
) -> Iterator[tuple[int, bm25s.BM25]]:
    """(first row, index) of shards of equal size, Lucene's variant of BM25; a shard without any word is left out.

    More than one process: some shards are made beside each other by forks of this one.
    """
    pieces = max(1, -(-len(passages) // shard))
    bounds = [len(passages) * piece // pieces for piece in range(pieces + 1)]
    parts = [(first, passages.select(range(first, last))) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]
    at_once = min(processes, SHARDS_AT_ONCE, pieces)
    made = partial(_shard, k1=k1, b=b, language=language)
    with multiprocessing.get_context("fork").Pool(at_once) if at_once > 1 else nullcontext() as pool:
        for group in range(0, pieces, at_once):
            some = parts[group : group + at_once]
            for found in pool.map(made, some, chunksize=1) if pool else map(made, some):
                if found is not None:
                    yield found


def _shard(part: "tuple[int, Dataset]", k1: float, b: float, language: str) -> tuple[int, bm25s.BM25] | None:
    first, passages = part
    texts = [
        f"{title} {text}"
        for batch in passages.iter(1000)
        for title, text in zip(batch["title"], batch["text"], strict=True)
    ]
    words = words_of(texts, language=language)
    if not any(words.ids):
        return None
    index = bm25s.BM25(k1=k1, b=b)
    index.index(words, show_progress=False)
    return first, index


def search(
    shards: Iterable[tuple[int, bm25s.BM25]], questions: list[str], depth: int, processes: int = 1, language: str = "en"
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 and scores fp32 [Q, depth] of the best passages, best first; -1 and 0 where fewer share a word.

    The shards' hits are merged by score. More than one process: the questions are dealt out to forks of this one.
    """
    rows = np.full((len(questions), depth), -1, dtype=np.int64)
    scores = np.zeros((len(questions), depth), dtype=np.float32)
    if not questions:
        return rows, scores
    words = words_of(questions, return_ids=False, language=language)
    tasks = [(words[at : at + QUESTIONS_A_TASK], depth) for at in range(0, len(words), QUESTIONS_A_TASK)]
    # One question at a time (ask) needs no bar.
    for first, index in tqdm(shards, desc="search by BM25", unit=" shards", disable=len(questions) == 1):
        hits, of_hits = (np.concatenate(parts) for parts in zip(*_hits_of_all(index, tasks, processes), strict=True))
        rows = np.concatenate([rows, np.where(hits < 0, -1, hits + first)], axis=1)
        scores = np.concatenate([scores, of_hits], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]  # the earlier passage wins a tie
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return np.where(scores > 0, rows, -1), scores


def save(shards: Iterable[tuple[int, bm25s.BM25]], folder: Path) -> Iterator[tuple[int, bm25s.BM25]]:
    """Passes shards on and keeps each in `folder`, for questions to come."""
    for first, index in shards:
        index.save(str(folder / f"{first:010d}"), show_progress=False)
        yield first, index


def load(folder: Path) -> Iterator[tuple[int, bm25s.BM25]]:
    """The shards that `save` kept, memory-mapped."""
    for kept in sorted(folder.iterdir()):
        yield int(kept.name), bm25s.BM25.load(str(kept), mmap=True, allow_pickle=False, show_progress=False)


def _hits_of_all(index: bm25s.BM25, tasks: list, processes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    global _index
    _index = index
    try:
        if processes == 1 or len(tasks) < 2:
            return [_hits(task) for task in tasks]
        # Forks share the index's memory; nothing here has threads of its own.
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            return pool.map(_hits, tasks, chunksize=1)
    finally:
        _index = None


def _hits(task: tuple[list[list[str]], int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores [questions, depth] of one shard, best first; -1 and 0 where fewer share a word."""
    questions, depth = task
    rows = np.full((len(questions), depth), -1, dtype=np.int64)
    scores = np.zeros((len(questions), depth), dtype=np.float32)
    for question, words in enumerate(questions):
        if words:  # not stop words alone
            every = _index.get_scores(words)
            best = _best(every, depth)
            rows[question, : len(best)], scores[question, : len(best)] = best, every[best]
    return rows, scores


def _best(scores: np.ndarray, depth: int) -> np.ndarray:
    """Rows of the at most `depth` highest scores above zero, best first.

    Most scores are zero; the library's own selection looks at all of them, which takes eighty times as long as scoring.
    """
    rows = np.flatnonzero(scores)
    if len(rows) > depth:
        rows = rows[np.argpartition(-scores[rows], depth - 1)[:depth]]
    return rows[np.lexsort((rows, -scores[rows]))]
