"""Answers that are regular expressions (CuratedTREC): what they match in passages and predictions, in bounded time.

Flags as DPR and DrQA set them, by the `regex` library, which understands what Python's `re` does and can be given a time.
"""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import regex

FLAGS = regex.VERSION0 | regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
SECONDS = 1.0  # for one text; a pattern that takes longer matches nothing from then on

_too_slow: set[str] = set()


@lru_cache(maxsize=100_000)
def compiled(pattern: str) -> regex.Pattern:
    """Raises ValueError, with what is wrong, for what is no regular expression."""
    try:
        return regex.compile(unicodedata.normalize("NFC", pattern), FLAGS, cache_pattern=False)
    except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{pattern[:100]!r} is no regular expression: {str(error) or type(error).__name__}") from None


def stands_in(patterns: Iterable[str], text: str) -> bool:
    """Whether any of them is found anywhere in the text: DPR's `regex_match` (Karpukhin et al. 2020)."""
    text = unicodedata.normalize("NFC", text)
    return any(_in_time(pattern, lambda one: one.search(text, timeout=SECONDS) is not None) for pattern in patterns)


def begins(pattern: str, prediction: str) -> bool:
    """Whether the pattern matches from the prediction's first character on: DrQA's `regex_match_score`, an exact match.

    As there the prediction may go on behind the match, unless the pattern ends in $.
    """
    prediction = unicodedata.normalize("NFC", prediction.strip())
    return bool(_in_time(pattern, lambda one: one.match(prediction, timeout=SECONDS) is not None))


def first_match(patterns: Iterable[str], text: str) -> str | None:
    """The text of the first match that is not empty, of the first pattern that has one."""
    text = unicodedata.normalize("NFC", text)

    def search(one: regex.Pattern) -> str | None:
        matches = (found[0].strip() for found in one.finditer(text, timeout=SECONDS))
        return next(filter(None, matches), None)

    return next(filter(None, (_in_time(pattern, search) for pattern in patterns)), None)


def _in_time(pattern: str, search):
    """What `search` makes of the compiled pattern; None where that took too long, now or before."""
    if pattern in _too_slow:
        return None
    try:
        return search(compiled(pattern))
    except TimeoutError:
        _too_slow.add(pattern)
        print(f"warning: the answer pattern {pattern[:100]!r} takes over {SECONDS:g} s on one text: it matches nothing")
        return None
