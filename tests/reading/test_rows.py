"""What rows mean: field names, kinds of values, the report, ids that are unknown or come twice, splits by a seed."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stages.params import Fields, Shares
from stages.reading.files import Table
from stages.reading.rows import (
    PassageIds,
    Unusable,
    columns_of,
    keep_known,
    list_of,
    read_passages,
    read_questions,
    text_of,
)
from stages.reading.splits import leaks, split_questions
from stages.reading.unusable_rows import Report

SHIPPED = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["data"]["fields"]


def fields(**changes) -> Fields:
    return Fields(**(SHIPPED | changes))


def table(*rows: dict, name: str = "rows.jsonl") -> Table:
    return Table(name, lambda: iter(enumerate(rows, 1)))


@pytest.fixture
def report(tmp_path):
    with Report(tmp_path / "unusable.jsonl", 0.5) as report:
        yield report


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": ["a", "b", "a", " "]}, ["a", "b"]),
        ({"answers": " a "}, ["a"]),
        ({"answer": "a"}, ["a"]),
        ({"answer": ["a"]}, ["a"]),
        ({"answer": 1984}, ["1984"]),
        ({"short_answers": ["a", "b"]}, ["a", "b"]),
        ({"answers": [], "short_answers": "a"}, ["a"]),
        ({"answers": '["a", "b"]'}, ["a", "b"]),
        ({"answers": "['it\\'s', \"b\"]"}, ["it's", "b"]),
        ({"answers": "[sic]"}, ["[sic]"]),
    ],
)
def test_answers_under_their_usual_names_and_in_any_form(report, row, answers):
    [question] = read_questions(table({"question": "Who?"} | row), fields(), "train", report)
    assert question["answers"] == answers and question["id"] == "train-000001" and question["positive_ids"] == []


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (["p1", "p2", "p1"], ["p1", "p2"]),
        ("p1", ["p1"]),
        (7, ["7"]),
        ([7, "8"], ["7", "8"]),
        ("[7, 8]", ["7", "8"]),
        (None, []),
        ("", []),
        ([{"passage_id": "11", "title": "A"}, {"psg_id": 12}], ["11", "12"]),
    ],
)
def test_positives_as_ids_or_objects_under_a_mapped_name(report, value, ids):
    row = {"question": "Who?", "answers": "a", "positive_ctxs": value}
    [question] = read_questions(table(row), fields(positive_ids="positive_ctxs"), "train", report)
    assert question["positive_ids"] == ids


def test_passages_without_titles_and_ids(report):
    passages = read_passages(table({"contents": "x"}, {"contents": "y"}), fields(), False, report)
    assert list(passages) == [{"id": "1", "title": "", "text": "x"}, {"id": "2", "title": "", "text": "y"}]


def test_mapped_names(report):
    row = {"docid": 3, "heading": "A", "passage": "x", "text": "not this"}
    mapped = fields(passage_id="docid", title="heading", text="passage")
    assert list(read_passages(table(row), mapped, True, report)) == [{"id": "3", "title": "A", "text": "x"}]
    assert columns_of(mapped) >= {"docid", "heading", "passage", "question", "answers", "answer", "short_answers"}


def test_a_missing_id_among_ids_is_not_made_up(report):
    rows = read_passages(
        table({"id": "a", "text": "x"}, {"text": "y"}, {"id": "c", "text": "z"}), fields(), False, report
    )
    assert [row["id"] for row in rows] == ["a", "c"] and report.counts == {"rows.jsonl": 1}


def test_the_report_lists_file_line_and_reason(tmp_path):
    path = tmp_path / "unusable.jsonl"
    rows = [{"question": "Who?", "answers": "a"}, {"question": "", "answers": "a"}, {"question": "Où\ud800?"}]
    with (
        pytest.raises(ValueError, match=r"^q:2: empty question; 2 of 3 rows.*max_unusable: 0.5"),
        Report(path, 0.5) as report,
    ):
        read_questions(table(*rows, name="q"), fields(), "train", report)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"file": "q", "line": 2, "reason": "empty question"},
        {"file": "q", "line": 3, "reason": "question holds a NUL or half a surrogate pair"},
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["unusable.jsonl"]


def test_unknown_positives_leave_the_question(report):
    rows = [{"question": f"{i}?", "answers": "a", "positive_ids": ["p1", f"p{i}"]} for i in range(4)]
    questions = read_questions(table(*rows), fields(), "train", report)
    keep_known(questions, {"p1", "p2", "p3"}, report)
    assert [question["positive_ids"] for question in questions] == [["p1"], ["p1"], ["p1", "p2"], ["p1", "p3"]]
    assert not report.counts  # a question that is used is no unusable row
    report.file.flush()
    [listed] = [json.loads(line) for line in report.unfinished.read_text().splitlines()]
    assert listed["line"] == 1 and listed["reason"] == "unknown positive id 'p0'; kept without it"


def test_a_file_none_of_whose_positives_is_known_has_other_ids(report):
    rows = [{"question": f"{i}?", "answers": "a", "positive_ids": [f"x{i}"]} for i in range(4)]
    questions = read_questions(table(*rows), fields(), "train", report)
    with pytest.raises(
        ValueError, match="^rows.jsonl:1: unknown positive id 'x0'; of 4 questions .* data.fields.passage_id"
    ):
        keep_known(questions, {"p1"}, report)


def test_questions_of_one_split_in_another_are_counted():
    def split(*texts: str) -> list[dict]:
        return [{"question": text, "file": "f", "line": line} for line, text in enumerate(texts, 1)]

    questions = {
        "train": split("Who is the mayor?", "Where is it?"), "validation": split("where  is it"),
        "test": split("New?", "Who is mayor", "who is the MAYOR ?", "???"),
    }  # fmt: skip
    [of_validation, of_test] = leaks(questions)
    assert of_validation.startswith("warning: 1 of 1 validation questions are train questions too, the first is f:1")
    assert of_test.startswith("warning: 2 of 4 test questions are train questions too, the first is f:2")
    assert leaks(questions | {"train": [], "validation": []}) == []


def test_only_wanted_ids_are_kept_and_one_that_comes_twice_is_found():
    rows = [{"id": f"p{i}", "text": "x"} for i in range(150_000)]
    ids = PassageIds(["p5", "p149999", "none"])
    assert sum(1 for _ in ids.watch(rows)) == 150_000
    assert ids.found == {"p5", "p149999"} and not ids.suspects()
    ids.check_unique(table(*rows), fields())
    ids = PassageIds([])
    rows.append({"id": "p7", "text": "y"})
    list(ids.watch(rows))
    with pytest.raises(ValueError, match="rows.jsonl:150001: passage id 'p7' stands in line 8 already"):
        ids.check_unique(table(*rows), fields())


def test_two_ids_that_only_hash_alike_are_not_one():
    ids = PassageIds([])
    list(ids.watch([{"id": "a"}, {"id": "b"}]))
    ids.suspects = lambda: {hash("a"), hash("b")}
    ids.check_unique(table({"id": "a"}, {"id": "b"}), fields())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_any_value_is_text_a_list_or_unusable(value):
    for parse in (lambda: text_of(value, "text"), lambda: list_of(value, "answers")):
        try:
            result = parse()
        except Unusable as reason:
            assert "\n" not in str(reason)
        else:
            assert isinstance(result, str | list)
            if isinstance(result, str):
                result.encode("utf-8")


def asked(count: int, same: int = 1) -> list[dict]:
    return [{"id": str(i), "question": f"Question {i // same}?"} for i in range(count)]


def test_shares_are_drawn_by_the_seed_and_keep_the_order():
    shares = Shares(validation=0.1, test=0.2)
    splits = split_questions({"train": asked(100)}, shares, seed=1)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 70, "validation": 10, "test": 20}
    numbers = {split: [int(row["id"]) for row in rows] for split, rows in splits.items()}
    assert sorted(sum(numbers.values(), [])) == list(range(100))
    assert all(some == sorted(some) for some in numbers.values())
    assert splits == split_questions({"train": asked(100)}, shares, seed=1)
    assert splits["test"] != split_questions({"train": asked(100)}, shares, seed=2)["test"]


def test_given_splits_stay_as_they_are():
    given = {"train": asked(50), "test": asked(5)}
    splits = split_questions(given, Shares(validation=0.1, test=0.5), seed=1)
    assert splits["test"] == given["test"] and len(splits["validation"]) == 5 and len(splits["train"]) == 45
    given["validation"] = asked(3)
    assert split_questions(given, Shares(validation=0.1, test=0.5), seed=1) == given


def test_the_same_question_is_never_in_two_splits():
    splits = split_questions({"train": asked(300, same=3)}, Shares(validation=0.2, test=0.2), seed=1)
    texts = [{row["question"] for row in rows} for rows in splits.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
