"""What MLflow hands over as questions, and what is told where a folder cannot answer."""

import numpy as np
import pandas as pd
import pytest

from stages.evaluation.pyfunc import _load_pyfunc, questions_of


@pytest.mark.parametrize(
    "given",
    [
        ["who?", "where?"],
        pd.DataFrame(["who?", "where?"]),
        pd.DataFrame({"question": ["who?", "where?"]}),
        pd.DataFrame({"id": [1, 2], "question": ["who?", "where?"]}),
        pd.Series(["who?", "where?"]),
        np.array(["who?", "where?"], dtype=object),
    ],
)
def test_questions_come_as_a_list_or_as_a_column(given):
    assert questions_of(given) == ["who?", "where?"]
    assert questions_of("who?") == ["who?"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (pd.DataFrame({"id": ["7", "8"]}), "begins with 'id'"),  # all that MLflow leaves of (id, question)
        (pd.DataFrame(), "must have a column `question`"),
        (["who?", None], "question 1 is no text: None"),
        ([3], "question 0 is no text: 3"),
    ],
)
def test_what_is_no_question_is_not_answered(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        questions_of(given)


def test_the_weights_alone_say_why_they_do_not_answer(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="tracking.model_gigabytes"):
        _load_pyfunc(str(tmp_path))
