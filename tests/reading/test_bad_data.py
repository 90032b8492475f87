"""Malformed questions, passages and data parameters through prepare: one clear line each, and nothing is touched.

Every case starts from a project that works, changes one thing, and finds the outputs of an earlier run unharmed.
"""

import gzip
import json
import os
import re
import resource
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from stages import inputs, prepare
from stages.machine.entry import run

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
QUESTION = {"question": "Where is it?", "answers": ["Oslo"], "positive_ids": ["p1"]}
PASSAGE = {"id": "p1", "title": "A", "text": "It is in Oslo."}


def lines(*rows) -> bytes:
    """JSON lines; bytes among the rows are taken as they are."""
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def questions(*odd, count: int = 40) -> bytes:
    """Sound questions with odd rows after the second one."""
    sound = [QUESTION | {"question": f"Where is number {i}?"} for i in range(count)]
    return lines(*sound[:2], *odd, *sound[2:])


def passages(*odd, count: int = 40) -> bytes:
    sound = [PASSAGE | {"id": f"p{i}", "text": f"Number {i} is in Oslo."} for i in range(count)]
    return lines(*sound[:2], *odd, *sound[2:])


def packed(rows: bytes) -> bytes:
    return gzip.compress(rows, mtime=0)


def parquet(**columns) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def arrow(**columns) -> bytes:
    sink, content = pa.BufferOutputStream(), pa.table(columns)
    with pa.ipc.new_stream(sink, content.schema) as stream:
        stream.write_table(content)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with sound data and the outputs of an earlier run; call it with changed keys of `data`."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "train.jsonl": questions(), "passages.jsonl": passages(), "data/prepared/kept": b"1", "data/tokens/kept": b"2",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)

    def write_params(changes: dict | None = None) -> None:
        values = json.loads(json.dumps(SHIPPED))
        for part in ("question_encoder", "context_encoder", "generator"):
            values["models"][part] = str(ROOT / values["models"][part])
        values["data"] |= {"source": "files"}
        values["data"]["files"] |= {"train": "train.jsonl", "passages": "passages.jsonl"}
        for key, value in (changes or {}).items():
            section, _, name = key.rpartition(".")
            target = values["data"][section] if section else values["data"]
            if value is KeyError:
                del target[name]
            else:
                target[name] = value
        Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    write_params()
    return write_params


def refused() -> str:
    """What prepare says as it ends, after checking that it is one line and that nothing was touched."""
    with pytest.raises(SystemExit) as end:
        run(prepare.main)
    message = str(end.value.code)
    assert message.startswith("error: ") and "\n" not in message and len(message) < 1000
    if Path("data").is_dir():
        kept = {str(file.relative_to("data")) for file in Path("data").rglob("*") if file.is_file()}
        assert kept - {"unusable.jsonl"} == {"prepared/kept", "tokens/kept"}
    return message


def test_the_project_that_every_case_starts_from_works(project):
    run(prepare.main)
    assert sorted(os.listdir("data")) == ["prepared", "tokens", "unusable.jsonl"]
    assert not Path("data/prepared/kept").exists() and Path("data/unusable.jsonl").read_text() == ""


STRUCTURE = {
    "broken JSON": ("train.jsonl", questions(b'{"question": "Where?", "answers": ["a"]\n'), "train.jsonl:3: not valid JSON"),
    "JSON cut in the middle": ("train.jsonl", questions() + b'{"question": "Wh', "train.jsonl:41: not valid JSON"),
    "empty file": ("train.jsonl", b"", "train.jsonl: holds no rows"),
    "only blank lines": ("train.jsonl", b"\n  \n\r\n", "train.jsonl: holds no rows"),
    "only a BOM": ("train.jsonl", b"\xef\xbb\xbf", "train.jsonl: holds no rows"),
    "no question field": ("train.jsonl", lines({"q": "Where?", "answers": "a"}),
                          "train.jsonl:1: no field question or query; there are: q, answers; set data.fields.question"),
    "no answers field": ("train.jsonl", lines({"question": "Where?"}), "train.jsonl:1: no field answers or answer or short_"),
    "an array as a row": ("train.jsonl", questions(["Where?", "a"]), "train.jsonl:3: a row must be a JSON object.*list"),
    "a number as a row": ("train.jsonl", questions(7), "train.jsonl:3: a row must be a JSON object.*int"),
    "two values in a line": ("train.jsonl", questions(b"{} {}\n"), "train.jsonl:3: more than one JSON value"),
    "NaN": ("train.jsonl", questions(b'{"question": NaN}\n'), "train.jsonl:3: not valid JSON: NaN"),
    "a number of 5,000 digits": ("train.jsonl", questions(b'{"id": ' + b"1" * 5000 + b"}\n"), "train.jsonl:3: not valid JSON"),
    "nested too deeply": ("train.jsonl", questions(b"[" * 200_000 + b"\n"), "train.jsonl:3: not valid JSON: nested"),
    "UTF-16": ("train.jsonl", questions().decode().encode("utf-16"), "train.jsonl:1: not UTF-8"),
    "UTF-16 without a BOM": ("train.jsonl", questions().decode().encode("utf-16-le"), "train.jsonl:1: holds a NUL"),
    "mixed encodings": ("train.jsonl", questions('{"question": "Où?"}\n'.encode("latin-1")), "train.jsonl:3: not UTF-8.*0xf9"),
    "NUL bytes": ("train.jsonl", questions(b"\0\0\0\0\n"), "train.jsonl:3: holds a NUL byte"),
    "no line end in 17 MB": ("train.jsonl", b"x" * 17_000_000, "train.jsonl:1: longer than 16,777,216 bytes"),
    "gz under a plain name": ("train.jsonl", packed(questions()), "train.jsonl:1: is packed with gzip"),
    "plain text as .gz": ("train.jsonl.gz", questions(), "train.jsonl.gz:1: not a sound gzip file"),
    "gz cut short": ("train.jsonl.gz", packed(questions())[:-20], r"train.jsonl.gz:\d+: the gzip file is cut short"),
    "gz header cut short": ("train.jsonl.gz", packed(questions())[:5], "train.jsonl.gz:1: the gzip file is cut short"),
    "gz with a wrong checksum": ("train.jsonl.gz", packed(questions())[:-8] + b"\1" * 8, r"gz:\d+: not a sound gzip file"),
    "gz with a damaged block": ("train.jsonl.gz", packed(questions())[:12] + b"\xff" * 60, r"gz:\d+: not a sound gzip file"),
    "gz with something behind it": ("train.jsonl.gz", packed(questions()) + b"rest", r"gz:\d+: not a sound gzip file"),
    "empty gz": ("train.jsonl.gz", packed(b""), "train.jsonl.gz: holds no rows"),
    "JSON array broken": ("train.json", b'[{"question": "a", "answers": "b"},\n{"question" 1}]', "train.json:2: not valid JSON"),
    "JSON array not closed": ("train.json", b'[{"question": "a", "answers": "b"},\n', "train.json:2: not valid JSON"),
    "JSON array without a comma": ("train.json", b'[{"a": 1}\n{"a": 2}]', "train.json:1: no field|train.json:2: .*expected ','"),
    "JSON array of texts": ("train.json", b'["a", "b"]', "train.json:1: a row must be a JSON object.*str"),
    "JSON with a rest": ("train.json", b'[{"question": "a", "answers": "b"}]\nrest', "train.json:2: not valid JSON: something"),
    "JSON with no rows": ("train.json", b"[]", "train.json: holds no rows"),
    "CSV row too short": ("train.csv", b"question,answer\na,b\nc\n", "train.csv:3: 1 cells where the header has 2"),
    "CSV row too long": ("train.csv", b"question,answer\na,b,c\n", "train.csv:2: 3 cells where the header has 2"),
    "CSV quote not closed": ("train.csv", b'question,answer\na,b\n"c,d\ne,f\n', "train.csv:3: unexpected end of data.*quote"),
    "CSV stray quote": ("train.csv", b'question,answer\n"a"x,b\n', "train.csv:2: .*quote"),
    "CSV names a column twice": ("train.csv", b"question,question\na,b\n", "train.csv:1: the header names a column twice"),
    "CSV header over two lines": (
        "train.csv", b'"que\nstion",answer\na,b\n', "train.csv:3: no field question or query; there are: que stion,"),
    "CSV with only a header": ("train.csv", b"question,answer\n", "train.csv: holds no rows"),
    "TSV without a header": ("train.tsv", b"who is it\ta\nwho\tb\n",
                             "train.tsv:2: no field question or query; there are: who is it, a; .*data.tables.question_columns"),
    "one column": ("train.csv", b"question+answer\na+b\n", "one column in a table separated by commas.*data.tables.delimiter"),
    "a cell that swallows rows": ("train.tsv", b'question\tanswer\n"a\tb\nc\td\ne"\tf\n',
                                  "train.tsv:2: a quoted cell takes in 3 lines.*data.tables.quoting to false"),
    "a Git LFS pointer": ("train.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
                          "data.files.train: train.jsonl is a Git LFS pointer.*git lfs pull"),
    "a JSON array over several lines": ("train.jsonl", b'[\n{"question": "a"},\n', "jsonl:1: a JSON array.*name the file .json"),
    "a JSON array in a line": ("train.jsonl", b'[{"question": "a"}]\n', "jsonl:1: a JSON array.*name the file .json"),
    "objects over several lines": ("train.jsonl.gz", packed(b'{\n"question": "a"}\n'), "gz:1: an object over.*file .json.gz"),
    "Arrow cut short": ("train.arrow", arrow(question=["a"], answers=["b"])[:-60], "train.arrow:1: not a sound Arrow file"),
    "Arrow of other bytes": ("train.arrow", b"nothing of the kind", "train.arrow:1: not a sound Arrow file"),
    "Parquet cut short": ("train.parquet", parquet(question=["a"], answers=["b"])[:-30], "train.parquet:1: not a sound Parq"),
    "Parquet of other bytes": ("train.parquet", b"PAR1 nothing of the kind PAR1", "train.parquet:1: not a sound Parquet"),
    "Parquet without rows": ("train.parquet", parquet(question=pa.array([], pa.string())), "train.parquet: holds no rows"),
    "Parquet without the columns": ("train.parquet", parquet(q=["a"]), "train.parquet:1: no field question"),
    "an unknown extension": ("train.txt", questions(), "data.files.train: .*train.txt has an unknown ext.*known are .jsonl"),
    "no extension": ("train", questions(), "data.files.train: train has an unknown extension"),
    "packed Parquet": ("train.parquet.gz", b"", "data.files.train: train.parquet.gz has an unknown extension"),
    "passages: JSON": ("passages.json", b"[]", "passages.json: holds no rows"),
    "passages: an id twice": ("passages.jsonl", passages(PASSAGE | {"id": "p0"}),
                              "passages.jsonl:3: passage id 'p0' stands in line 1 already"),
    "passages: no text field": ("passages.jsonl", lines({"id": "p1", "body": "x"}),
                                "passages.jsonl:1: no field text or contents or passage; there are: id, body"),
    "passages: TSV cut short": ("passages.tsv.gz", packed(b"id\ttext\ttitle\n" + b"1\tx\ty\n" * 5000)[:-9],
                                r"passages.tsv.gz:\d+: the gzip file is cut short"),
    "passages: broken late": ("passages.jsonl", passages(count=3000) + b"{\n", "passages.jsonl:3001: not valid JSON"),
    "passages: no ids, positives named": ("passages.jsonl", lines({"text": "It is in Oslo."}),
                                          "no field id, but .* by id, e.g. 'p1'; there are: text; .* take the positives out"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRUCTURE)
def test_structural_damage_stops_at_once_with_file_and_line(project, case):
    name, content, says = STRUCTURE[case]
    Path(name).write_bytes(content)
    project({f"files.{name.partition('.')[0]}": name})
    assert re.search(says, refused())


UNUSABLE = {
    "empty question": ("train", QUESTION | {"question": "  "}, "empty question"),
    "no question": ("train", {"answers": ["a"]}, "empty question"),
    "question is null": ("train", QUESTION | {"question": None}, "empty question"),
    "question is a list": ("train", QUESTION | {"question": ["a"]}, "question is list, not text"),
    "question too long": ("train", QUESTION | {"question": "a" * 10_001}, "question of 10,001 characters"),
    "NUL in the question": ("train", QUESTION | {"question": "a\0b"}, "question holds a NUL"),
    "half a surrogate pair": ("train", QUESTION | {"question": "a\ud800"}, "question holds a NUL or half a surrogate"),
    "no answers": ("train", QUESTION | {"answers": []}, "no answer"),
    "blank answers": ("train", QUESTION | {"answers": ["", "  "]}, "no answer"),
    "answers is an object": ("train", QUESTION | {"answers": {"start": 3}}, "answers is dict"),
    "answers is an ambiguous list": (
        "train",
        QUESTION | {"answers": "['a' 'b', 'c']"},
        "answers is ambiguous: a list",
    ),
    "answers is true": ("train", QUESTION | {"answers": True}, "answers is bool"),
    "an answer is a list": ("train", QUESTION | {"answers": [["a"]]}, "answer is list, not text"),
    "answer too long": ("train", QUESTION | {"answers": ["a" * 1001]}, "answer of 1,001 characters"),
    "positive without an id": ("train", QUESTION | {"positive_ids": [{"title": "A"}]}, "a positive without passage_id"),
    "positive is a number in a list": ("train", QUESTION | {"positive_ids": [[1]]}, "id is list, not text"),
    "empty text": ("passages", PASSAGE | {"id": "x", "text": " "}, "empty text"),
    "no text": ("passages", {"id": "x", "title": "A"}, "empty text"),
    "a passage of 1 MB": ("passages", PASSAGE | {"id": "x", "text": "a" * 1_000_000}, "text of 1,000,000 characters"),
    "text is a number list": ("passages", PASSAGE | {"id": "x", "text": [1]}, "text is list, not text"),
    "empty id": ("passages", PASSAGE | {"id": ""}, "empty id"),
    "id is an object": ("passages", PASSAGE | {"id": {"a": 1}}, "id is dict, not text"),
    "title too long": ("passages", PASSAGE | {"id": "x", "title": "a" * 1001}, "title of 1,001 characters"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_too_many_unusable_rows_stop_the_run_with_the_first_of_them(project, case):
    table, row, reason = UNUSABLE[case]
    Path(f"{table}.jsonl").write_bytes((questions if table == "train" else passages)(row))
    message = refused()
    assert f"{table}.jsonl:3: {reason}" in message
    assert "1 of 41 rows cannot be used (data.max_unusable: 0.01), data/unusable.jsonl lists them" in message
    [listed] = [json.loads(line) for line in Path("data/unusable.jsonl").read_text().splitlines()]
    assert (listed["file"], listed["line"]) == (f"{table}.jsonl", 3) and listed["reason"].startswith(reason)


@pytest.mark.parametrize("case", UNUSABLE)
def test_few_unusable_rows_are_listed_and_left_out(project, case):
    table, row, reason = UNUSABLE[case]
    Path(f"{table}.jsonl").write_bytes((questions if table == "train" else passages)(row))
    project({"max_unusable": 0.03})
    run(prepare.main)
    [listed] = [json.loads(line) for line in Path("data/unusable.jsonl").read_text().splitlines()]
    assert listed["line"] == 3 and listed["reason"].startswith(reason)


VALUES = {
    "no train file": ({"files.train": None}, "params.yaml: data.files.train: missing"),
    "no passages file": ({"files.passages": None}, "params.yaml: data.files.passages: missing"),
    "an unknown split": ({"files.dev": "dev.jsonl"}, "data.files.dev: unknown key"),
    "a key left out": ({"files.test": KeyError}, "data.files.test: missing; copy its line"),
    "a path that is a number": ({"files.train": 7}, "data.files.train.0:.*string"),
    "an empty path": ({"files.train": ""}, "data.files.train"),
    "one file for two splits": ({"files.test": "./train.jsonl"}, "train.jsonl is the file of data.files.train too"),
    "one file twice": ({"files.train": ["train.jsonl", "t*.jsonl"]}, "data.files.train: train.jsonl is named twice"),
    "a glob of nothing": ({"files.train": "shard-*.jsonl"}, "data.files.train: no file matches shard-..jsonl"),
    "an empty list of files": ({"files.train": []}, "data.files.train"),
    "judgements of no questions": ({"qrels.test": "test.tsv"}, "data.qrels.test: test.tsv, but data.files.test names no"),
    "a language in words": ({"language": "German"}, "data.language"),
    "a delimiter of two": ({"tables.delimiter": "||"}, "data.tables.delimiter"),
    "a file that is not there": ({"files.train": "none.jsonl"}, "data.files.train: none.jsonl not found; relative paths"),
    "validation not there": ({"files.validation": "none.jsonl"}, "data.files.validation: none.jsonl not found"),
    "a folder": ({"files.passages": "data"}, "data.files.passages: data is a folder without any of"),
    "share of nothing": ({"shares.test": 0}, "data.shares.test:.*greater than 0"),
    "share of everything": ({"shares.validation": 1}, "data.shares.validation:.*less than 1"),
    "shares of more than there is": ({"shares.validation": 0.6, "shares.test": 0.6}, "data.shares: validation and test"),
    "shares that leave no rows": ({"shares.test": 0.01}, "data.shares.test: 0.01 of 40 training questions .* leaves none"),
    "share that is a word": ({"shares.test": "some"}, "data.shares.test:.*number.*'some'"),
    "max_unusable over 1": ({"max_unusable": 2}, "data.max_unusable:.*less than or equal to 1"),
    "negative depth": ({"positives.depth": -1}, "data.positives.depth:.*greater than or equal to 0"),
    "half a question": ({"positives.questions": 2.5}, "data.positives.questions:.*integer"),
    "a title that no passage has": ({"fields.title": "heading"}, "passages.jsonl:1: no field heading.*data.fields.title"),
    "ids that no question has": ({"fields.positive_ids": "ctxs"}, "train.jsonl:1: no field ctxs.*data.fields.positive_ids"),
    "an unknown source": ({"source": "web"}, "data.source:.*'sample', 'files' or 'nq'"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_parameters_of_data_that_cannot_be_right(project, case):
    changes, says = VALUES[case]
    project(changes)
    assert re.search(says, refused())


def test_questions_that_are_all_the_same_cannot_be_split(project):
    Path("train.jsonl").write_bytes(lines(*[QUESTION] * 20))
    assert "data.shares.validation: 0.05 of 20 training questions (1 different ones) leaves none" in refused()


def test_shares_that_leave_nothing_to_train_on(project):
    Path("train.jsonl").write_bytes(questions(count=2))
    project({"shares.validation": 0.49, "shares.test": 0.49})
    assert "data.shares: nothing is left of 2 training questions" in refused()


def test_no_usable_validation_question(project):
    Path("validation.jsonl").write_bytes(lines(QUESTION | {"answers": []}))
    project({"files.validation": "validation.jsonl", "max_unusable": 1})
    assert "validation.jsonl:1: no answer; 1 of 1 rows cannot be used" in refused()


def test_a_question_that_stays_usable_is_listed_and_counts_for_nothing(project, capsys):
    Path("train.jsonl").write_bytes(questions(QUESTION | {"positive_ids": ["p1", "p99"]}))
    project({"max_unusable": 0})
    run(prepare.main)
    [listed] = [json.loads(line) for line in Path("data/unusable.jsonl").read_text().splitlines()]
    assert listed["line"] == 3 and listed["reason"].startswith("unknown positive id 'p99'")
    assert "warning: train.jsonl:3: unknown positive id 'p99'; 1 questions are kept" in capsys.readouterr().out


def test_the_same_file_under_two_spellings_is_named_twice(project):
    Path("link.jsonl").symlink_to("train.jsonl")
    for other in ("./train.jsonl", str(Path("train.jsonl").resolve()), "link.jsonl"):
        project({"files.test": other})
        assert f"data.files.test: {other} is the file of data.files.train too" in refused()


def test_questions_trained_on_and_measured_on_are_counted(project, capsys):
    Path("test.jsonl").write_bytes(lines(*(QUESTION | {"question": f"where is  NUMBER {i}"} for i in range(35, 50))))
    project({"files.test": "test.jsonl", "shares.validation": 0.05})
    run(prepare.main)
    said = capsys.readouterr().out
    assert re.search(r"warning: [345] of 15 test questions are train questions too, the first is test.jsonl:\d", said)


def test_a_pipe_is_not_waited_for(project):
    os.mkfifo("pipe.jsonl")
    project({"files.train": "pipe.jsonl"})
    assert "data.files.train: pipe.jsonl is neither a file nor a folder" in refused()
    with pytest.raises(SystemExit, match="data.files.train: pipe.jsonl is neither a file nor a folder"):
        run(inputs.main)


def test_a_file_that_vanishes_between_the_stages(project):
    run(inputs.main)
    before = Path("data/inputs/data.json").read_bytes()
    Path("passages.jsonl").unlink()
    with pytest.raises(SystemExit, match="^error: data.files.passages: passages.jsonl not found"):
        run(inputs.main)
    assert Path("data/inputs/data.json").read_bytes() == before


def test_the_disk_is_full_while_passages_are_written(project):
    """A limit on the size of a file stands in for the disk: writes fail in the middle, as on a full one."""
    Path("passages.jsonl").write_bytes(passages(count=5000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        message = refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "data/prepared: cannot be written: File too large" in message


def test_a_disk_of_256_kilobytes(project):
    """The real thing, where the tests may mount: a tiny disk in place of `data`."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "data"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        for name in ("prepared", "tokens"):
            Path("data", name).mkdir()
            Path("data", name, "kept").write_bytes(b"1")
        Path("passages.jsonl").write_bytes(passages(count=5000))
        message = refused()
        assert sorted(os.listdir("data")) == ["prepared", "tokens", "unusable.jsonl"]
    finally:
        subprocess.run(["umount", "data"], check=True)
    assert "cannot be written: No space left on device" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_the_disk_is_full_while_the_report_is_written(project):
    Path("train.jsonl").write_bytes(questions(QUESTION | {"answers": []}))
    Path("data/unusable.jsonl").write_text("earlier\n")
    Path("data/unusable.jsonl.unfinished").symlink_to("/dev/full")
    project({"max_unusable": 0.5})
    assert "cannot be written: No space left on device" in refused()
    assert Path("data/unusable.jsonl").read_text() == "earlier\n"


def test_a_file_where_the_folder_should_be(project):
    for name in ("prepared", "tokens"):
        Path(f"data/{name}/kept").unlink()
        Path(f"data/{name}").rmdir()
    Path("data").rmdir()
    Path("data").write_text("mine")
    assert "data/prepared.unfinished: cannot be written: Not a directory" in refused()
    assert Path("data").read_text() == "mine"


def test_a_folder_where_the_report_should_be(project):
    Path("data/unusable.jsonl").mkdir()
    assert "cannot be written: Is a directory" in refused()
