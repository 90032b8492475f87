"""Answers as text: normalised for EM and F1, and looked for in passages."""

import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from datasets import Dataset  # to ask a question takes no second for it

from stages.corpus import patterns as answer_patterns
from stages.corpus.words import class_of, spaced

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Of MLQA's evaluation script, which has them for its languages alone; Arabic's is taken off wherever it stands.
ARTICLES_OF = {
    "ar": re.compile(r"\sال^|ال"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "en": ARTICLES,
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
}
UNICODE_PUNCTUATION = re.compile(f"[{class_of('P')}{re.escape(string.punctuation)}]")
WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
HITS_A_READ = 20_000  # passages read at once: 20 MB of a hundred words each
KEPT = 250_000  # passages whose words are kept for the questions to come: 250 MB


def normalize_answer(text: str, language: str = "en") -> str:
    """Lower-cased `text` without punctuation and articles, spaces collapsed; NFC and NFD are the same.

    English: ASCII punctuation and a, an, the, in the order (lower, punctuation, articles, spaces) of the SQuAD 1.1
    evaluation script: 'U.S.' becomes 'us'. Other languages: Unicode's punctuation and the language's articles, as MLQA's.
    """
    text = unicodedata.normalize("NFC", text).lower()
    if language == "en":
        return " ".join(ARTICLES.sub(" ", text.translate(PUNCTUATION)).split())
    text = UNICODE_PUNCTUATION.sub("", text)
    return " ".join((ARTICLES_OF[language].sub(" ", text) if language in ARTICLES_OF else text).split())


def answer_words(text: str, language: str = "en") -> list[str]:
    """The words that F1 counts: of the normalised text, characters where a script knows no spaces (as MLQA's scorer)."""
    return spaced(normalize_answer(text, language)).split()


def words_of(text: str) -> str:
    """The words of `text`, lower-cased, each between blanks, so that words follow words where text stands in text.

    A word is a run of letters, digits and marks, or any other one character that is neither blank nor control character,
    in Unicode's normal form D: DPR's SimpleTokenizer (Karpukhin et al. 2020, dpr/utils/tokenizers.py). Where a script knows
    no spaces, every character is a word (words.py).
    """
    return f" {' '.join(WORD.findall(unicodedata.normalize('NFD', spaced(text))))} ".lower()


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the words of any gold answer stand in the text one after the other: DPR's `has_answer`, articles and all.

    An answer without any word stands nowhere.
    """
    return _contains(words_of(text), _golds(answers))


def hits_with_answers(
    passages: "Dataset", hits: Sequence[Sequence[int]], answers: Sequence[Iterable[str]], patterns: bool = False
) -> Iterator[list[bool]]:
    """`contains_answer` of title and text for each question's hits, rows of `passages`; -1 is no passage, so False.

    `patterns`: the answers are regular expressions, found in the text as it is.

    Of many questions at once a passage is read and cut into words once, however many of them it is a hit of, as long as it
    is one of the last KEPT or so.
    """
    questions_a_read = max(1, HITS_A_READ // max(1, max(map(len, hits), default=1)))
    kept: dict[int, str] = {}
    for first in range(0, len(hits), questions_a_read):
        some = hits[first : first + questions_a_read]
        wanted = {row for of_one in some for row in of_one if row >= 0}
        if len(kept.keys() | wanted) > KEPT:
            kept.clear()
        rows = sorted(wanted - kept.keys())
        read = passages[rows]
        for row, title, text in zip(rows, read["title"], read["text"], strict=True):
            kept[row] = f"{title} {text}" if patterns else words_of(f"{title} {text}")
        for of_one, gold in zip(some, answers[first : first + questions_a_read], strict=True):
            if patterns:
                yield [row >= 0 and answer_patterns.stands_in(gold, kept[row]) for row in of_one]
            else:
                golds = _golds(gold)
                yield [row >= 0 and _contains(kept[row], golds) for row in of_one]


def sought(answers: Sequence[str], unanswerable: str | None) -> list[str]:
    """The answers of a question to look for in passages: none where it is data.unanswerable."""
    return [] if list(answers) == [unanswerable] else list(answers)


def with_an_answer(answers: Iterable[list[str]], unanswerable: str | None) -> dict[int, list[str]]:
    """By row, the answers of the questions that have some to look for; data.unanswerable stands for none."""
    return {row: found for row, some in enumerate(answers) if (found := sought(some, unanswerable))}


def _golds(answers: Iterable[str]) -> list[str]:
    return [words for words in map(words_of, answers) if words.strip()]


def _contains(words: str, golds: list[str]) -> bool:
    return any(gold in words for gold in golds)
