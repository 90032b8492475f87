"""Every format reads back what was written, from plain and packed files; any bytes at all parse or are a ValueError."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.reading import text_files
from stages.reading.files import KINDS, LEFT_OPEN, open_table, open_tables
from stages.settings.data import Files, Qrels
from stages.storage.outside_files import OutsideFile

ROWS = [
    {"id": "1", "question": "Où est-il?", "answers": '["a", "b"]'},
    {"id": "2", "question": 'He said "so",\nthen\tleft', "answers": "c"},
    {"id": "3", "question": "x" * 200_000, "answers": "d"},
]

NO_QRELS = Qrels(train=None, validation=None, test=None)
NAMED = {"id", "question", "answers", "text", "title"}


def read_file(path: Path, columns: set[str] = NAMED):
    return open_table(OutsideFile(str(path), path), "file", columns).read()


def table(delimiter: str, **options) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "question", "answers"], delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet(rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows, writer) -> bytes:
    sink, content = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with writer(sink, content.schema) as stream:
        stream.write_table(content)
    return sink.getvalue().to_pybytes()


WRITTEN = {
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "blank lines.jsonl": ("\n\n".join(map(json.dumps, ROWS)) + "\n \n").encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "rows.ndjson": "\n".join(map(json.dumps, ROWS)).encode(),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "compact.json": json.dumps(ROWS, ensure_ascii=False, separators=(",", ":")).encode(),
    "one after the other.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "rows.csv": table(","),
    "rows.tsv": table("\t"),
    "all quoted.tsv": table("\t", quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "UPPER.CSV": table(","),
    "tabs under.csv": table("\t"),
    "semicolons.csv": table(";", quoting=csv.QUOTE_ALL),
    "bars.csv": table("|", lineterminator="\n"),
    "bom.csv": b"\xef\xbb\xbf" + table(";"),
    "excel.csv": b"sep=;\r\n" + table(";"),
    "array.arrow": arrow(ROWS, pa.ipc.new_stream),
    "file format.arrow": arrow(ROWS, pa.ipc.new_file),
    "rows.parquet": parquet(ROWS),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("packed", [False, True])
def test_what_was_written_is_read(tmp_path, name, packed):
    if packed and name.endswith((".parquet", ".arrow")):
        pytest.skip("packs itself")
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(WRITTEN[name]) if packed else WRITTEN[name])
    assert [row for _, row in read_file(path)] == ROWS


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("rows.jsonl", [1, 2, 3]), ("blank lines.jsonl", [1, 3, 5]), ("array.json", [2, 7, 12]),
        ("one after the other.json", [1, 6, 11]), ("rows.csv", [2, 3, 5]), ("rows.parquet", [1, 2, 3]),
    ],
)  # fmt: skip
def test_lines_are_those_where_a_row_begins(tmp_path, name, lines):
    path = tmp_path / name
    path.write_bytes(WRITTEN[name])
    assert [line for line, _ in read_file(path)] == lines


def test_only_the_wanted_columns_of_parquet_are_read(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet([{"id": "1", "text": "a", "embeddings": [0.5] * 768}]))
    assert list(read_file(path, {"id", "text", "title"})) == [(1, {"id": "1", "text": "a"})]


def test_files_are_streamed(tmp_path):
    """The first rows come before damage further on is seen."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 200_000)[:-9])
    rows = read_file(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(ValueError, match=r"rows.jsonl.gz:\d+: the gzip file is cut short"):
        list(rows)


@pytest.mark.parametrize("form", ["[{}, ", '{"version": "1.1", "data": [{}, ', "{} "])
def test_json_of_any_size_is_streamed(tmp_path, monkeypatch, form):
    """Rows larger than what is read at once, and the first ones before damage further on is seen."""
    monkeypatch.setattr(text_files, "PIECE", 1000)
    row = json.dumps({"question": "é" * 1500, "n": 12345, "answers": [{"a": "]}"}] * 20}, ensure_ascii=False, indent=1)
    path = tmp_path / "rows.json"
    path.write_text(form.replace("{}", row, 1) + row + "\n, {broken", encoding="utf-8")
    rows = read_file(path)
    assert next(rows) == (1, json.loads(row)) and next(rows)[1] == json.loads(row)
    with pytest.raises(ValueError, match=r"rows.json:\d+: "):
        list(rows)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_line_ends_at_the_edge_of_what_is_read_at_once(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(text_files, "PIECE", piece)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\r{"a": 3}\n\r\n\n{"a": 4}')
    assert list(read_file(path)) == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3}), (6, {"a": 4})]
    path = tmp_path / "rows.json"
    path.write_bytes('{"version": 2.5, "data": [{"é": 12},\n {"a": []}], "more": {"data": [1]}}\n'.encode())
    assert list(read_file(path)) == [(1, {"é": 12}), (2, {"a": []})]


def test_an_object_that_holds_rows_and_one_that_is_a_row(tmp_path):
    path = tmp_path / "rows.json"
    for content, rows in {
        '{"id": 1, "data": [{"x": 1}]}': [{"id": 1, "data": [{"x": 1}]}],
        '{"a": 1, "data": []}': [{"a": 1, "data": []}],
        '{"a": 1, "data": [1, 2]} {"a": 2}': [{"a": 1, "data": [1, 2]}, {"a": 2}],
        ' {"a": 1, "data": [{"x": 1}, {"x": 2}], "b": 2} ': [{"x": 1}, {"x": 2}],
    }.items():
        path.write_text(content)
        assert [row for _, row in read_file(path)] == rows
    for content in (
        '{"data": [{"x": 1}]',
        '{"data": [{"x": 1}]} 7',
        '{"data": [{"x": 1} {"x": 2}]}',
        '{"data": [{"x": 1}], 7}',
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match="rows.json:1: not valid JSON"):
            list(read_file(path))


def test_paths_count_from_here_and_in_a_temporary_run_from_the_repository(tmp_path, monkeypatch):
    there, here = tmp_path / "repository", tmp_path / "copy"
    for folder in (there, here):
        folder.mkdir()
    (there / "train.jsonl").write_text('{"a": 1}')
    files = Files(train="train.jsonl", validation=None, test=None, passages=None)
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="data.files.train: train.jsonl not found"):
        open_tables(files, NO_QRELS, LEFT_OPEN, {"a"})
    monkeypatch.setenv("DVC_ROOT", str(there))
    assert list(open_tables(files, NO_QRELS, LEFT_OPEN, {"a"})["train"][0].read()) == [(1, {"a": 1})]
    (here / "train.jsonl").write_text('{"a": 2}')
    assert list(open_tables(files, NO_QRELS, LEFT_OPEN, {"a"})["train"][0].read()) == [(1, {"a": 2})]


def parsed_or_refused(path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        for line, row in read_file(path):
            assert isinstance(line, int) and isinstance(row, dict)
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError and message.startswith(str(path)) and "\n" not in message


fuzz = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(content=st.binary(max_size=300))
def test_any_bytes_parse_or_are_refused_in_one_line(tmp_path, kind, content):
    parsed_or_refused(tmp_path / f"rows{kind}", content)
    if kind not in (".parquet", ".arrow"):
        parsed_or_refused(tmp_path / f"rows{kind}.gz", content)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
@fuzz
@given(content=st.text(alphabet='{}[]",:\n\r\t\\u0 ad1eE-.\ufeff\0é', max_size=120))
def test_any_text_of_the_format_s_own_characters(tmp_path, kind, content):
    parsed_or_refused(tmp_path / f"rows{kind}", content.encode())


@pytest.mark.parametrize("name", [name for name in WRITTEN if name.startswith(("rows", "array"))])
@pytest.mark.parametrize("packed", [False, True])
@fuzz
@given(where=st.floats(0, 1), byte=st.integers(0, 255), cut=st.floats(0.5, 1))
def test_a_flipped_byte_and_a_cut_end(tmp_path, name, packed, where, byte, cut):
    few = {"rows.parquet": parquet(ROWS[:2]), "array.arrow": arrow(ROWS[:2], pa.ipc.new_stream)}
    sound = few.get(name, WRITTEN[name][:400])
    content = bytearray(gzip.compress(sound) if packed else sound)
    content[int(where * (len(content) - 1))] = byte
    packs_itself = name.endswith((".parquet", ".arrow"))
    parsed_or_refused(tmp_path / f"{name}{'.gz' * (packed and not packs_itself)}", bytes(content))
    parsed_or_refused(tmp_path / name, bytes(content[: int(cut * len(content))]))
