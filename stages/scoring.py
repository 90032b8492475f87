"""Exact match, F1 and recall@k, as the SQuAD and open-domain question-answering literature defines them."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-cased `text` without ASCII punctuation and English articles, spaces collapsed.

    The order (lower, punctuation, articles, spaces) is that of the SQuAD 1.1 evaluation script: 'U.S.' becomes 'us'.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0."""
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The best token F1 of the prediction against any gold answer, in [0, 1].

    Two empty strings agree (1.0); one empty string against anything else scores 0.0, as in SQuAD 2.0's script.
    """
    predicted = normalize_answer(prediction).split()
    best = 0.0
    for answer in answers:
        gold = normalize_answer(answer).split()
        if not predicted or not gold:
            best = max(best, float(predicted == gold))
            continue
        shared = sum((Counter(predicted) & Counter(gold)).values())
        if shared:
            best = max(best, 2 * shared / (len(predicted) + len(gold)))
    return best


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether any normalised gold answer stands in the normalised text as whole words (DPR's `has_answer`)."""
    padded = f" {normalize_answer(text)} "
    return any((gold := normalize_answer(answer)) and f" {gold} " in padded for answer in answers)


def recall_at(hits: Sequence[Sequence[bool]], k: int) -> float:
    """Percent of questions with at least one hit among their first k passages.

    `hits` holds, for each question, one flag a retrieved passage, best passage first.
    """
    return 100.0 * sum(any(row[:k]) for row in hits) / len(hits) if hits else 0.0
