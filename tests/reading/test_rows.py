"""What rows mean: field names, kinds of values, the report, ids that are unknown or come twice, splits by a seed."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stages.reading.files import Table
from stages.reading.passage_ids import PassageIds, settle
from stages.reading.rows import columns_of, named_passages, read_passages, read_questions
from stages.reading.splits import check_answers, leaks, split_questions
from stages.reading.unusable_rows import Report
from stages.reading.values import Cells, Positive, Unusable, answers_of, digests, list_of, positives_of, text_of
from stages.settings.data import Fields, Shares

SHIPPED = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["data"]["fields"]


def fields(**changes) -> Fields:
    return Fields(**(SHIPPED | changes))


def table(*rows: dict, name: str = "rows.jsonl", of_cells: bool = False) -> list[Table]:
    return [Table(name, lambda: iter(enumerate(rows, 1)), of_cells=of_cells)]


def by_id(*names: str) -> PassageIds:
    return PassageIds([Positive((name,), (), repr(name)) for name in names])


def ids_of(question: dict) -> list[str]:
    return [positive.ids[0] for positive in question["positives"]]


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
    assert question["answers"] == answers and question["id"] == "train-000001" and question["positives"] == []


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
    assert ids_of(question) == ids


def test_passages_without_titles_and_ids(report):
    passages = read_passages(table({"contents": "x"}, {"contents": "y"}), fields(), by_id(), report)
    assert list(passages) == [{"id": "1", "title": "", "text": "x"}, {"id": "2", "title": "", "text": "y"}]


def test_mapped_names(report):
    row = {"docid": 3, "heading": "A", "passage": "x", "text": "not this"}
    mapped = fields(passage_id="docid", title="heading", text="passage")
    assert list(read_passages(table(row), mapped, by_id("3"), report)) == [{"id": "3", "title": "A", "text": "x"}]
    assert columns_of(mapped) >= {"docid", "heading", "passage", "question", "answers", "answer", "short_answers"}


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ({"text": ["a", "b"], "answer_start": [3, 4]}, ["a", "b"]),
        ({"value": "a", "aliases": ["b", "a"], "normalized_aliases": ["c"]}, ["a", "b"]),
        ([{"text": "a", "answer_start": 3}, {"answer": "b"}, {"provenance": []}], ["a", "b"]),
        ("{'text': array(['a'], dtype=object), 'answer_start': array([3])}", ["a"]),
        (10.0, ["10"]),
        ([2.5, 7.0, float("nan"), None], ["2.5", "7"]),
        ("10.0", ["10.0"]),
    ],
)
def test_answers_as_objects_and_numbers(value, answers):
    assert answers_of(value) == answers


def test_cells_of_a_table(report):
    """10.0 is 10 as an id and as an answer, in a list too; a separator parts what is no list."""
    rows = [
        {"id": "1.0", "question": "2.0?", "answers": "10.0", "positive_ids": "7.0"},
        {"id": "2", "question": "b?", "answers": "x; 3.0 ;y", "positive_ids": "7;8.0"},
        {"id": "3", "question": "c?", "answers": "['x; y']", "positive_ids": "[7.0, 8]"},
    ]
    read = read_questions(table(*rows, of_cells=True), fields(), "train", report, separator=";")
    assert [(row["id"], row["answers"], ids_of(row)) for row in read] == [
        ("1", ["10"], ["7"]), ("2", ["x", "3", "y"], ["7", "8"]), ("3", ["x; y"], ["7", "8"]),
    ]  # fmt: skip
    passages = read_passages(table({"id": "7.0", "text": "9.0"}, of_cells=True), fields(), by_id("7"), report)
    assert list(passages) == [{"id": "7", "title": "", "text": "9.0"}]
    assert text_of("1.10", "id", Cells()) == "1.10" and text_of("v2.0", "answer", Cells()) == "v2.0"


def test_positives_by_title_and_text_or_by_text_alone():
    named, described, alone = positives_of([{"id": 3, "text": "x"}, {"title": "T", "text": "a  b"}, {"text": "a b"}])
    assert named.ids == ("3",) and named.sure and not described.sure and described.keys == digests("T", "a b")
    assert described.keys[1] == alone.keys[1] and described.keys[0] != alone.keys[0]
    assert positives_of({"passage_id": ["a", "b"], "title": ["T", "U"]})[1].ids == ("b",)
    with pytest.raises(Unusable, match="a positive without passage_id"):
        positives_of([{"title": "T"}])


def test_unknown_ids_are_shown_as_the_file_has_them(tmp_path):
    with Report(tmp_path / "unusable.jsonl", 1.0) as report:
        questions = read_questions(
            table(*({"question": f"{i}?", "answers": "a", "positive_ids": value} for i, value in enumerate([[7], "7", 8.0]))),
            fields(), "train", report,
        )  # fmt: skip
        ids = PassageIds(positive for question in questions for positive in question["positives"])
        list(ids.watch([{"id": "1", "title": "", "text": ""}]))
        with pytest.raises(ValueError, match="unknown positive id 7;"):
            settle(questions, ids, report)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "unusable.jsonl").read_text().splitlines()]
    assert [reason.split()[3].rstrip(";") for reason in reasons] == ["7", "'7'", "8.0"]


def test_questions_without_answers_need_positives(report):
    asked = {"question": "Where?", "positive_ids": ["p1"]}
    assert read_questions(table(asked), fields(), "train", report)[0]["answers"] == []
    with pytest.raises(ValueError, match="no field answers"):
        read_questions(table({"question": "Where?"}), fields(), "train", report)
    [question] = read_questions(
        table({"question": "Where?", "answers": []}), fields(), "t", report, unanswerable="none"
    )
    assert question["answers"] == ["none"]


def test_a_missing_id_among_ids_is_not_made_up(report):
    rows = read_passages(
        table({"id": "a", "text": "x"}, {"text": "y"}, {"id": "c", "text": "z"}), fields(), by_id(), report
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
    ids = PassageIds(positive for question in questions for positive in question["positives"])
    list(ids.watch({"id": name, "title": "", "text": ""} for name in ("p1", "p2", "p3")))
    settle(questions, ids, report)
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
        settle(questions, by_id("p1"), report)


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


@pytest.mark.parametrize(
    ("train", "validation", "test", "refused"),
    [
        ("aa", "a", "aa", None),
        ("--", "-", "-", None),
        ("--", "a", "a", None),  # what passes through untrained may be scored
        ("aa", "a", "--", None),  # retrieval alone is measured
        (
            "aa",
            "--",
            "a",
            "validation:1: 2 of 2 validation questions have no answer, this one first, while the training questions have",
        ),
        ("aa-", "a", "a", "train:3: 1 of 3 train questions have no answer, this one first, while the others have some"),
        ("--", "a-", "a", "validation:2: 1 of 2 validation questions have no answer, this one first, while the others"),
        ("aa", "a", "-a-", "test:1: 2 of 3 test questions have no answer, this one first, while the others"),
    ],
)
def test_questions_without_answers_beside_answered_ones(train, validation, test, refused):
    marked = {"train": train, "validation": validation, "test": test}
    questions = {
        split: [{"answers": ["a"] if mark == "a" else [], "file": split, "line": line} for line, mark in enumerate(marks, 1)]
        for split, marks in marked.items()
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{refused}.*leave them") if refused else nullcontext():
        check_answers(questions)


def test_only_wanted_ids_are_kept_and_one_that_comes_twice_is_found():
    rows = [{"id": f"p{i}", "text": "x"} for i in range(150_000)]
    ids = by_id("p5", "p149999", "none")
    assert sum(1 for _ in ids.watch(rows)) == 150_000
    assert ids.found == {"p5", "p149999"} and not ids.suspects()
    ids.check_unique(named_passages(table(*rows), fields()))
    ids = by_id()
    rows.append({"id": "p7", "text": "y"})
    list(ids.watch(rows))
    with pytest.raises(ValueError, match="rows.jsonl:150001: passage id 'p7' stands in line 8 already"):
        ids.check_unique(named_passages(table(*rows), fields()))


def test_two_ids_that_only_hash_alike_are_not_one():
    ids = by_id()
    list(ids.watch([{"id": "a"}, {"id": "b"}]))
    ids.suspects = lambda: {hash("a"), hash("b")}
    ids.check_unique(named_passages(table({"id": "a"}, {"id": "b"}), fields()))


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
