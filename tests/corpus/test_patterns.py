"""Answers that are regular expressions, held against Python's `re` as DPR and DrQA use it; time is bounded."""

import re
import time

import pytest
from datasets import Dataset

from stages.corpus import patterns
from stages.corpus.answers import hits_with_answers
from stages.corpus.patterns import begins, compiled, first_match, stands_in

TEXTS = ["He was born in New York\nin 1931.", "NEWYORK, NY", "the yorker", "1 , 931 people", "Ångström and e\u0301cole"]
PATTERNS = [r"New\s?York", r"^in \d{4}", r"\b\d[\d, ]*\d\b", r"york$", "ångström|Paris", "école", "(a|b", "[0-9"]


def as_dpr_does(pattern: str, text: str, how: str) -> bool:
    try:
        made = re.compile(pattern, re.IGNORECASE | re.UNICODE | re.MULTILINE)
    except re.error:
        return False
    return getattr(made, how)(text) is not None


@pytest.mark.parametrize("pattern", PATTERNS[:5])
def test_a_pattern_matches_as_dpr_and_drqa_have_it(pattern):
    for text in TEXTS:
        assert stands_in([pattern], text) == as_dpr_does(pattern, text, "search")
        assert begins(pattern, text) == as_dpr_does(pattern, text, "match")


def test_both_forms_of_unicode_match():
    assert stands_in(["école"], TEXTS[4]) and stands_in(["e\u0301cole"], "École")


@pytest.mark.parametrize("pattern", PATTERNS[6:])
def test_a_broken_pattern_is_told(pattern):
    with pytest.raises(ValueError, match="is no regular expression: "):
        compiled(pattern)


def test_the_first_match_that_is_not_empty():
    assert first_match(["x*", r"\d+"], "a 19 and 20") == "19"
    assert first_match([r"\bj\w+"], "A Jay and a jackdaw") == "Jay"
    assert first_match(["x*"], "nothing") is None and first_match([], "nothing") is None


def test_a_catastrophic_pattern_takes_its_time_once_and_matches_nothing(monkeypatch, capsys):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    slow, text = r"(a|aa|a?)*[dc]$", "a" * 50
    started = time.perf_counter()
    assert not stands_in([slow], text)
    assert 0.1 < time.perf_counter() - started < 10
    assert "takes over 0.2 s on one text" in capsys.readouterr().out
    started = time.perf_counter()
    assert not any(stands_in([slow], text) for _ in range(100)) and not begins(slow, text)
    assert time.perf_counter() - started < 0.1 and capsys.readouterr().out == ""


def test_hits_are_flagged_by_patterns_in_title_and_text():
    passages = Dataset.from_list([
        {"id": "a", "title": "Tower 12", "text": "It is 30 m high."}, {"id": "b", "title": "Bridge", "text": "twelve"},
    ])  # fmt: skip
    found = list(
        hits_with_answers(passages, [[0, 1, -1], [1, 0, -1]], [[r"tower \d+"], ["no", "TWELVE"]], patterns=True)
    )
    assert found == [[True, False, False], [True, False, False]]
