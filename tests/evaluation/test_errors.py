"""The kind of an answer, and a row of the table that MLflow shows."""

import pytest

from stages.evaluation.errors import KINDS, kind_of, rank_of, table_row


@pytest.mark.parametrize(
    ("em", "f1", "rank", "kind"),
    [
        (1.0, 1.0, None, "right"), (0.0, 0.5, 1, "near"), (0.0, 0.49, 1, "read wrong"), (0.0, 0.0, 2, "ranked wrong"),
        (0.0, 0.0, 5, "ranked wrong"), (0.0, 0.0, 6, "not found"), (0.0, 0.0, None, "not found"),
    ],
)  # fmt: skip
def test_the_kind_of_an_answer_by_its_scores_and_the_gold_passages_place(em, f1, rank, kind):
    assert kind_of(em, f1, rank, n_docs=5) == kind and kind in KINDS


def test_the_rank_is_the_first_flagged_place_from_one():
    assert (rank_of([False, True, True]), rank_of([True]), rank_of([False]), rank_of([])) == (2, 1, None, None)


def test_a_row_of_the_table_holds_the_passage_that_the_answer_came_from():
    row = {
        "question": "Where?", "answers": ["here", "there"], "prediction": "here", "kind": "right", "em": 1.0, "f1": 1.0,
        "log_prob": 0.0, "gold_rank": 2, "answer_rank": None,
        "passages": [
            {"title": "A", "text": "a", "prior": 0.9, "posterior": 0.2},
            {"title": "B", "text": "b", "prior": 0.1, "posterior": 0.8},
        ],
    }  # fmt: skip
    made = table_row(row)
    assert made["answers"] == "here | there" and made["probability"] == 1 and made["best_passage_title"] == "B"
    assert table_row({**row, "passages": []})["best_passage_title"] is None
