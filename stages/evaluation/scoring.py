"""Exact match and F1 of predictions, as SQuAD's evaluation script defines them (Rajpurkar et al. 2016).

For other languages than English as MLQA's does (Lewis et al. 2020): corpus/answers.py. For questions without an answer as
SQuAD 2.0's (Rajpurkar et al. 2018), for answers that are regular expressions as DrQA's (Chen et al. 2017).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stages.corpus import patterns
from stages.corpus.answers import answer_words, normalize_answer, sought


@dataclass(frozen=True)
class Rules:
    """How predictions compare with gold answers: data.language, data.unanswerable and whether answers are patterns."""

    language: str = "en"
    unanswerable: str | None = None
    patterns: bool = False

    def sought(self, answers: Sequence[str]) -> list[str]:
        """The answers to look for in passages: none of a question that is unanswerable."""
        return sought(answers, self.unanswerable)

    def exact_match(self, prediction: str, answers: Sequence[str]) -> float:
        """1.0 for a right prediction, else 0.0; of an unanswerable question such is `unanswerable` itself or nothing."""
        prediction, golds = self._with_nothing_for_unanswerable(prediction, answers)
        if self.patterns and golds != [""]:
            return float(any(patterns.begins(gold, prediction) for gold in golds))
        return exact_match(prediction, golds, self.language)

    def f1(self, prediction: str, answers: Sequence[str]) -> float:
        """F1 in [0, 1]; of a pattern, which has no words to share, its exact match."""
        prediction, golds = self._with_nothing_for_unanswerable(prediction, answers)
        if self.patterns and golds != [""]:
            return self.exact_match(prediction, answers)
        return f1(prediction, golds, self.language)

    def _with_nothing_for_unanswerable(self, prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
        """SQuAD 2.0's script knows a question without an answer, and a prediction that says so, as empty texts."""
        if self.unanswerable is None:
            return prediction, list(answers)
        says_none = normalize_answer(prediction, self.language) == normalize_answer(self.unanswerable, self.language)
        return "" if says_none else prediction, self.sought(answers) or [""]


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
