"""Tables as spreadsheets, pandas and numpy leave them."""

from pathlib import Path

import pytest

from stages.reading.files import LEFT_OPEN, open_table
from stages.reading.literals import Ambiguous, parsed
from stages.settings.data import Tables
from stages.storage.outside_files import OutsideFile

KNOWN = {"id", "title", "text", "question", "answer", "answers"}
FIRST = {"question": "Where?", "answer": "Oslo"}


def read(path: Path, content: str, columns: list[str] | None = None, **changes) -> list[dict]:
    path.write_bytes(content.encode())
    tables = Tables(**(LEFT_OPEN.model_dump() | changes))
    return [row for _, row in open_table(OutsideFile(str(path), path), "file", KNOWN, tables, columns).read()]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_delimiters_line_ends_and_boms(tmp_path, end, delimiter, bom, extension):
    lines = [delimiter.join(row) for row in (("question", "answer"), ("Where?", "Oslo"), ("Who", "a b"))]
    rows = read(tmp_path / f"a.{extension}", bom + end.join(lines) + end * 3)
    assert rows == [FIRST, {"question": "Who", "answer": "a b"}]


def test_a_delimiter_is_not_found_in_prose(tmp_path):
    content = "title;text\nA;one, two, three\nB;four, five, six\n"
    assert read(tmp_path / "a.csv", content)[1] == {"title": "B", "text": "four, five, six"}
    content = "Name\tBody\nA\tone, two; three\nB\tfour, five; six\n"
    assert read(tmp_path / "a.csv", content)[1] == {"Name": "B", "Body": "four, five; six"}
    assert read(tmp_path / "a.csv", "text\none, two\nthree\n", delimiter="\t") == [
        {"text": "one, two"},
        {"text": "three"},
    ]


def test_what_spreadsheets_add(tmp_path):
    """A first line that names the delimiter, empty columns at the end, rows of delimiters alone."""
    content = "sep=;\r\nquestion;answer;;\r\nWhere?;Oslo;;\r\n;;;\r\n   \r\n"
    assert [{key: value for key, value in row.items() if key} for row in read(tmp_path / "a.csv", content)] == [FIRST]
    assert read(tmp_path / "a.csv", "question,answer\nWhere?,Oslo,,\n") == [FIRST]
    assert read(tmp_path / "a.csv", ",question,answer\n0,Where?,Oslo\n")[0] == {"": "0"} | FIRST


def test_columns_by_parameter_or_by_an_obvious_form(tmp_path):
    path = tmp_path / "a.tsv"
    assert read(path, "Where?\tOslo\n", ["question", "answer"]) == [FIRST]
    assert read(path, "0\tIt is in Oslo.\n1\tIt is not.\n")[0] == {"_id": "0", "text": "It is in Oslo."}
    assert read(path, "Where?\t['Oslo']\nWho?\t[\"a\", 'b']\n")[0] == {"question": "Where?", "answers": "['Oslo']"}
    with pytest.raises(ValueError, match="a.tsv:1: 2 cells where data.tables names 3"):
        read(path, "Where?\tOslo\n", ["id", "question", "answer"])


SWALLOWED = '1\t"Big Bang\n2\tx\n3\tthe end"\n'


def test_a_quote_that_swallows_rows(tmp_path):
    path = tmp_path / "a.tsv"
    with pytest.raises(ValueError, match="a.tsv:2: a quoted cell takes in 3 lines that look like rows"):
        read(path, "id\ttext\n" + SWALLOWED)
    with pytest.raises(ValueError, match="a.csv:2: a quoted cell takes in 3 lines"):
        read(tmp_path / "a.csv", ("id\ttext\n" + SWALLOWED).replace("\t", ","))
    with pytest.raises(ValueError, match="a.csv:2: a quoted cell takes in 2 lines"):
        read(tmp_path / "a.csv", 'id,text,title\n1,"Big,A\n2,Bang",B\n')
    assert len(read(path, "id\ttext\n" + SWALLOWED, quoting=True)) == 1
    assert read(path, "id\ttext\n" + SWALLOWED, quoting=False)[0] == {"id": "1", "text": '"Big Bang'}
    with pytest.raises(ValueError, match="data.tables.quoting to false where quotes are text"):
        read(path, 'id\ttext\n1\t"Big" Bang\n')


def test_cells_that_are_meant_to_hold_lines_and_delimiters(tmp_path):
    content = 'title,text\nA,"It rained, and then\nit snowed, at last.\n\nThe end"\nB,"one\ntwo"\n'
    rows = read(tmp_path / "a.csv", content)
    assert rows[0]["text"] == "It rained, and then\nit snowed, at last.\n\nThe end" and rows[1]["text"] == "one\ntwo"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['Tarn' 'the Tarn valley']", ["Tarn", "the Tarn valley"]),
        ("['Tarn'\n 'it\\'s' \"it's\"]", ["Tarn", "it's", "it's"]),
        ("['Tarn', 'the Tarn valley']", ["Tarn", "the Tarn valley"]),
        ('["Tarn", null]', ["Tarn", None]),
        ("array(['Tarn', 'b'], dtype=object)", ["Tarn", "b"]),
        ("np.array(['Tarn'], dtype='<U4')", ["Tarn"]),
        ("[10 11]", [10, 11]),
        ("[10. 11.5]", [10.0, 11.5]),
        ("[1984]", [1984]),
        ("('a', 'b')", ["a", "b"]),
        ("{'a', 'b'}", ["a", "b"]),
        (
            "{'text': array(['Tarn'], dtype=object), 'answer_start': array([3])}",
            {"text": ["Tarn"], "answer_start": [3]},
        ),
        ("[{'text': 'a'}, {'text': 'b'}]", [{"text": "a"}, {"text": "b"}]),
        ("[]", []),
        ("[sic]", "[sic]"),
        ("(1984)", "(1984)"),
        ("{so}", "{so}"),
        ("['a' and more", "['a' and more"),
        ("['a'] and ['b']", "['a'] and ['b']"),
        ("[" * 50_000 + "]" * 50_000, "[" * 50_000 + "]" * 50_000),
    ],
)
def test_lists_as_pandas_and_numpy_write_them(text, value):
    assert parsed(text) == value


@pytest.mark.parametrize("text", ["['a' 'b', 'c']", "['a''b']", "['a' 'b' ... 'y' 'z']", "['a', 'b', ..., 'z']"])
def test_lists_that_are_not_certain(text):
    with pytest.raises(Ambiguous):
        parsed(text)
