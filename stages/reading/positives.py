"""Positives for questions that name none: the best BM25 hit that contains an answer (Karpukhin et al. 2020, section 4.1).

The warm-up of the retriever needs one for each of its questions. BM25 with Lucene's k1 1.5 and b 0.75 (lexical_search.py).
"""

from datasets import Dataset
from tqdm import tqdm

from stages.bm25 import lexical_search
from stages.corpus.answers import contains_answer


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
    rows, _ = lexical_search.search(
        lexical_search.shards_of(passages), [question["question"] for question in questions], depth
    )
    count = 0
    for question, hits in zip(tqdm(questions, desc="look for answers", unit=" questions"), rows, strict=True):
        for row in hits[hits >= 0].tolist():
            passage = passages[row]
            if contains_answer(f"{passage['title']} {passage['text']}", question["answers"]):
                question["positive_ids"] = [passage["id"]]
                count += 1
                break
    return count
