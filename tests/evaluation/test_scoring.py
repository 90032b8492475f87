"""EM, F1 and recall on known edge cases, and against torchmetrics' SQuAD."""

import unicodedata

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.corpus import answers as answers_module
from stages.corpus.answers import contains_answer, hits_with_answers, normalize_answer
from stages.corpus.recall import recall_at, recalls
from stages.evaluation.scoring import Rules, exact_match, f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S. Army!", "us army"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("Theodore", "theodore"),
        ("1,555 feet", "1555 feet"),
        ("São Paulo", "são paulo"),
        ("  \n", ""),
        ("the", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1_score"),
    [
        ("the Eiffel Tower", ["Eiffel tower"], 1, 1),
        ("Eiffel", ["Eiffel Tower"], 0, 2 / 3),
        ("in Paris France", ["Paris", "Paris, France"], 0, 4 / 5),
        ("red red blue", ["red blue blue"], 0, 2 / 3),
        ("", ["something"], 0, 0),
        ("the", ["a"], 1, 1),
        ("x", ["y", "x"], 1, 1),
        ("Zürich", ["Zurich"], 0, 0),
    ],
)
def test_scores_by_hand(prediction, answers, em, f1_score):
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(f1_score)


def test_scores_equal_torchmetrics():
    from torchmetrics.functional.text import squad

    cases = [
        ("the Normans", ["Normans", "The Norman people"]),
        ("10th and 11th centuries", ["in the 10th and 11th centuries", "10th"]),
        ("Denmark, Iceland", ["Denmark, Iceland and Norway"]),
        ("nothing", ["something else"]),
        ("U.S.", ["US"]),
    ]
    for prediction, answers in cases:
        theirs = squad(
            [{"prediction_text": prediction, "id": "1"}],
            [{"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "1"}],
        )
        assert 100 * exact_match(prediction, answers) == pytest.approx(theirs["exact_match"].item())
        assert 100 * f1(prediction, answers) == pytest.approx(theirs["f1"].item(), abs=1e-4)


def test_an_answer_is_found_as_whole_words():
    assert contains_answer("Born in New York, in 1931.", ["new york"])
    assert not contains_answer("The yorker magazine", ["York"])
    assert not contains_answer("1931", ["193"]) and not contains_answer("anything", ["the"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("London's mayor opened it.", "London"), ("The war of 1914-1918.", "1918"), ("Spider-Man returns", "Spider"),
        ("Jackson's “Thriller” sold well.", "Thriller"), ("“Thriller” sold well.", "thriller"), ("in the U.S. army", "U.S."),
        ("a café in Paris", "cafe\u0301"), ("by The Who, in 1969", "The Who"), ("$5,000 a year", "5,000"),
        ("a\u00a0blank that is none\u2003at all", "blank that is none at all"),
    ],
)  # fmt: skip
def test_an_answer_is_found_between_punctuation(text, answer):
    assert contains_answer(text, ["nowhere", answer])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("They told us so.", "U.S."), ("people who came", "The Who"), ("a cafe in Paris", "café"), ("Londoners", "London"),
        ("5 000 a year", "5,000"), ("19 18", "1918"), ("one two", "two one"), ("anything", " \u200b"), ("", "a"),
    ],
)  # fmt: skip
def test_an_answer_is_not_found_in_other_words(text, answer):
    assert not contains_answer(text, [answer])


def has_answer(text: str, answers: list[str]) -> bool:
    """DPR's, written out: the tokens of an answer stand in the text's, one after the other."""

    def tokens(text: str) -> list[str]:
        found, word = [], ""
        for letter in unicodedata.normalize("NFD", text):
            kind = unicodedata.category(letter)[0]
            if kind in "LNM":
                word += letter
                continue
            found += [word] if word else []
            word = ""
            found += [letter] if kind not in "ZC" else []
        return [token.lower() for token in [*found, *([word] if word else [])]]

    read = tokens(text)
    golds = [gold for answer in answers if (gold := tokens(answer))]
    return any(read[at : at + len(gold)] == gold for gold in golds for at in range(len(read)))


@given(
    st.lists(
        st.sampled_from(["the", "Who", "U.S.", "us", "é", "e\u0301", "İ", "ΟΔΟΣ", "Σ", "'s", "-", "1,0", "\n", "ж"])
    ),
    st.lists(st.sampled_from(["who", "U.S.", "é", "ΟΔΟΣ", "'", "s", "1", "ж", "Σ'", " "]), max_size=3),
    st.sampled_from(["", " "]),
)
@settings(max_examples=300, deadline=None)
def test_it_is_dprs_has_answer(text, answer, between):
    text, answer = between.join(text), between.join(answer)
    assert contains_answer(text, [answer]) == has_answer(text, [answer])


def test_hits_are_flagged_as_one_by_one_whatever_is_read_at_once(monkeypatch):
    passages = Dataset.from_list([{"title": f"T{i}", "text": f"number {i}'s"} for i in range(9)])
    hits = [[(i * 5 + j * 7) % 9 if j < 3 else -1 for j in range(4)] for i in range(20)]
    answers = [[str(i % 9), "T3"] for i in range(20)]
    expected = [
        [row >= 0 and contains_answer(f"T{row} number {row}'s", gold) for row in rows]
        for rows, gold in zip(hits, answers, strict=True)
    ]
    for at_once, kept in ((1, 1), (10, 5), (10, 1000), (1000, 1)):
        monkeypatch.setattr(answers_module, "HITS_A_READ", at_once)
        monkeypatch.setattr(answers_module, "KEPT", kept)
        assert list(hits_with_answers(passages, hits, answers)) == expected
    assert any(map(any, expected)) and list(hits_with_answers(passages, [], [])) == []


def test_recall():
    hits = [[False, True, False], [True, False, False], [False, False, False]]
    assert [recall_at(hits, k) for k in (1, 2, 3)] == pytest.approx([100 / 3, 200 / 3, 200 / 3])


def test_a_recall_of_no_question_is_absent_and_not_0():
    assert recalls([], (1, 5)) == {} and recalls([[False]], (1,), "answer_") == {"answer_recall_at_1": 0.0}


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1_score"),
    [
        ("No answer.", ["no answer"], 1, 1),  # the gold is none, the prediction says so
        ("", ["no answer"], 1, 1),
        ("the", ["no answer"], 1, 1),  # nothing is left of it, as in SQuAD 2.0's script
        ("an answer", ["no answer"], 0, 0),  # a word in common is no part of an answer
        ("no answer", ["answer one"], 0, 0),  # none, where there is one
        ("answer", ["answer one", "one"], 0, 2 / 3),
        ("one", ["answer one", "one"], 1, 1),
    ],
)
def test_unanswerable_questions_score_as_squad_2_has_them(prediction, answers, em, f1_score):
    for patterns in (False, True):
        rules = Rules("en", "no answer", patterns)
        assert rules.exact_match(prediction, answers) == em
        if not patterns:
            assert rules.f1(prediction, answers) == pytest.approx(f1_score)
    plain = Rules("en")
    assert plain.exact_match("no answer", ["no answer"]) == 1 and plain.exact_match("", ["no answer"]) == 0
    assert rules.sought(["no answer"]) == [] and plain.sought(["no answer"]) == ["no answer"]


def test_patterns_score_as_drqa_has_them():
    rules = Rules(patterns=True)
    assert rules.exact_match("New York City", [r"new\s?york"]) == rules.f1("New York City", [r"new\s?york"]) == 1
    assert rules.exact_match("in New York", [r"new\s?york", "york"]) == rules.f1("in New York", [r"new\s?york"]) == 0
    assert rules.exact_match("1931", [r"\d{4}$"]) == 1 and rules.exact_match("19312", [r"\d{4}$"]) == 0
