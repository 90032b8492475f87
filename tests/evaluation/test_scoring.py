"""EM, F1 and recall on known edge cases, and against torchmetrics' SQuAD."""

import pytest

from stages.corpus.answers import contains_answer, normalize_answer
from stages.corpus.recall import recall_at
from stages.evaluation.scoring import exact_match, f1


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


def test_recall():
    hits = [[False, True, False], [True, False, False], [False, False, False]]
    assert [recall_at(hits, k) for k in (1, 2, 3)] == pytest.approx([100 / 3, 200 / 3, 200 / 3])
