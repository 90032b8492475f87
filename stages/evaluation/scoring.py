"""Exact match and F1 of predictions, as SQuAD's evaluation script defines them (Rajpurkar et al. 2016).

For other languages than English as MLQA's does (Lewis et al. 2020): corpus/answers.py.
"""

from collections import Counter
from collections.abc import Iterable

from stages.corpus.answers import answer_words, normalize_answer


def exact_match(prediction: str, answers: Iterable[str], language: str = "en") -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0."""
    predicted = normalize_answer(prediction, language)
    return float(any(predicted == normalize_answer(answer, language) for answer in answers))


def f1(prediction: str, answers: Iterable[str], language: str = "en") -> float:
    """The best token F1 of the prediction against any gold answer, in [0, 1].

    Two empty strings agree (1.0); one empty string against anything else scores 0.0, as in SQuAD 2.0's script.
    """
    predicted = answer_words(prediction, language)
    best = 0.0
    for answer in answers:
        gold = answer_words(answer, language)
        if not predicted or not gold:
            best = max(best, float(predicted == gold))
            continue
        shared = sum((Counter(predicted) & Counter(gold)).values())
        if shared:
            best = max(best, 2 * shared / (len(predicted) + len(gold)))
    return best
