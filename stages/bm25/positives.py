"""Positives for questions that name none: the best BM25 hit that contains an answer (Karpukhin et al. 2020, section 4.1).

The warm-up of the retriever needs one for each of its questions. BM25 with Lucene's k1 1.5 and b 0.75 (lexical_search.py).
"""

import multiprocessing

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from stages.bm25 import lexical_search
from stages.corpus.answers import hits_with_answers

QUESTIONS_A_TASK = 1000

_passages: Dataset | None = None  # what forked processes share


def find_positives(
    passages: Dataset, questions: list[str], answers: list[list[str]], depth: int, processes: int = 1,
    language: str = "en", patterns: bool = False,
) -> np.ndarray:  # fmt: skip
    """For each of Q questions the row of its best hit, among `depth`, that contains an answer: int64 [Q], -1 for none.

    `patterns`: the answers are regular expressions.

    More than one process: the questions are dealt out to forks of this one.
    """
    global _passages
    shards = lexical_search.shards_of(passages, language=language, processes=processes)
    hits, _ = lexical_search.search(shards, questions, depth, processes, language)
    tasks = [
        (hits[at : at + QUESTIONS_A_TASK], answers[at : at + QUESTIONS_A_TASK], patterns)
        for at in range(0, len(hits), QUESTIONS_A_TASK)
    ]
    _passages = passages
    try:
        if processes == 1 or len(tasks) < 2:
            found = [_first_with_answer(task) for task in _progress(tasks, len(tasks))]
        else:
            with multiprocessing.get_context("fork").Pool(processes) as pool:
                found = list(_progress(pool.imap(_first_with_answer, tasks), len(tasks)))
    finally:
        _passages = None
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def _progress(tasks, count: int):
    return tqdm(tasks, desc="look for answers", total=count, unit=f" x {QUESTIONS_A_TASK} questions")


def _first_with_answer(task: tuple[np.ndarray, list[list[str]], bool]) -> np.ndarray:
    """The first row of each line of hits [Q, depth] that contains an answer, -1 where none does."""
    hits, answers, patterns = task
    found = np.full(len(hits), -1, dtype=np.int64)
    # Most answers stand in the first hits: the later ones are read for the other questions alone.
    first, width, waiting = 0, 1, np.arange(len(hits))
    while len(waiting) and first < hits.shape[1]:
        some = hits[waiting, first : first + width]
        flags = np.array(list(hits_with_answers(_passages, some.tolist(), [answers[at] for at in waiting], patterns)))
        has, place = flags.any(1), flags.argmax(1)
        found[waiting[has]] = some[has, place[has]]
        waiting, first, width = waiting[~has], first + width, 2 * width
    return found
