"""Positives for questions that name none: the best BM25 hit that contains an answer (Karpukhin et al. 2020, section 4.1).

The warm-up of the retriever needs one for each of its questions. BM25 is the library bm25s (Lucene's variant, k1 1.5, b 0.75).
"""

import bm25s
import numpy as np
from datasets import Dataset
from tqdm import tqdm

from stages.scoring import contains_answer

SHARD = 100_000  # passages indexed at once: bounds the memory, about 1 GB at 100 words each


def lacking(questions: dict[str, list[dict]], most: int | None) -> list[dict]:
    """The training and validation questions without a positive, at most `most` of each (None: all).

    Test questions keep what they came with: recall and the oracle line are measured on passages that were given.
    """
    return [
        question
        for split in ("train", "validation")
        for question in [question for question in questions[split] if not question["positive_ids"]][:most]
    ]


def find_positives(passages: Dataset, questions: list[dict], depth: int) -> int:
    """Gives questions their best hit as `positive_ids`, in place, where one of `depth` hits contains an answer.

    Returns how many got one.
    """
    rows = best_hits(passages, [question["question"] for question in questions], depth)
    count = 0
    for question, hits in zip(tqdm(questions, desc="look for answers", unit=" questions"), rows, strict=True):
        for row in hits[hits >= 0].tolist():
            passage = passages[row]
            if contains_answer(f"{passage['title']} {passage['text']}", question["answers"]):
                question["positive_ids"] = [passage["id"]]
                count += 1
                break
    return count


def best_hits(passages: Dataset, questions: list[str], depth: int, shard: int = SHARD) -> np.ndarray:
    """Rows [Q, depth] of the passages with the highest BM25 scores, best first; -1 where fewer share a word.

    Passages are indexed in shards of equal size and the shards' hits merged by score. Word frequencies are those of the
    shard: at a hundred thousand passages they differ little from those of the whole.
    """
    rows = np.full((len(questions), depth), -1, dtype=np.int64)
    scores = np.zeros((len(questions), depth), dtype=np.float32)
    tokens = bm25s.tokenize(questions, stopwords="en", return_ids=False, show_progress=False)
    pieces = max(1, -(-len(passages) // shard))
    bounds = [len(passages) * piece // pieces for piece in range(pieces + 1)]
    for first, last in zip(tqdm(bounds[:-1], desc="search positives", unit=" shards"), bounds[1:], strict=True):
        texts = [
            f"{title} {text}"
            for batch in passages.select(range(first, last)).iter(1000)
            for title, text in zip(batch["title"], batch["text"], strict=True)
        ]
        words_of_passages = bm25s.tokenize(texts, stopwords="en", show_progress=False)
        if not any(words_of_passages.ids):
            continue
        index = bm25s.BM25()
        index.index(words_of_passages, show_progress=False)
        for question, words in enumerate(tokens):
            if not words:  # stop words alone
                continue
            every = index.get_scores(words)
            hits = _best(every, depth)
            both_rows = np.concatenate([rows[question], first + hits])
            both_scores = np.concatenate([scores[question], every[hits]])
            order = np.argsort(-both_scores, kind="stable")[:depth]  # the earlier passage wins a tie
            rows[question], scores[question] = both_rows[order], both_scores[order]
    return np.where(scores > 0, rows, -1)


def _best(scores: np.ndarray, depth: int) -> np.ndarray:
    """Rows of the at most `depth` highest scores above zero, best first.

    Most scores are zero; the library's own selection looks at all of them, which takes eighty times as long as scoring.
    """
    rows = np.flatnonzero(scores)
    if len(rows) > depth:
        rows = rows[np.argpartition(-scores[rows], depth - 1)[:depth]]
    return rows[np.lexsort((rows, -scores[rows]))]
