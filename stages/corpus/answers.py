"""Answers as text: normalised, and looked for in a passage."""

import re
import string
from collections.abc import Iterable

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-cased `text` without ASCII punctuation and English articles, spaces collapsed.

    The order (lower, punctuation, articles, spaces) is that of the SQuAD 1.1 evaluation script: 'U.S.' becomes 'us'.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether any normalised gold answer stands in the normalised text as whole words (DPR's `has_answer`)."""
    padded = f" {normalize_answer(text)} "
    return any((gold := normalize_answer(answer)) and f" {gold} " in padded for answer in answers)
