"""Arrow files: streamed, whole or absent, the same bytes each time."""

import pytest
from datasets import Dataset

from stages.corpus.arrow import (
    PASSAGES,
    QUESTIONS,
    batches,
    gold_rows,
    positions_of,
    read_rows,
    replacing,
    row_reader,
    write_rows,
)

ROWS = [{"id": f"p{i}", "title": f"Título {i}", "text": "x" * i} for i in range(2700)]


def test_round_trip_from_a_generator(tmp_path):
    assert write_rows(tmp_path / "a" / "passages.arrow", PASSAGES, (row for row in ROWS)) == 2700
    rows = read_rows(tmp_path / "a" / "passages.arrow")
    assert list(rows) == ROWS and positions_of(rows)["p1234"] == 1234
    row = row_reader(tmp_path / "a" / "passages.arrow")
    assert [row(place) for place in (0, 999, 1000, 2699)] == [ROWS[place] for place in (0, 999, 1000, 2699)]


def test_questions_keep_their_lists(tmp_path):
    rows = [
        {"id": "1", "question": "Who?", "answers": ["a", "b"], "positive_ids": [], "grades": None},
        {"id": "2", "question": "Où?", "answers": ["c"], "positive_ids": ["p1", "p2"], "grades": [2.0, 0.5]},
    ]
    write_rows(tmp_path / "q.arrow", QUESTIONS, rows)
    assert list(read_rows(tmp_path / "q.arrow")) == rows


def test_the_same_rows_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_rows(tmp_path / name, PASSAGES, iter(ROWS))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path):
    path = tmp_path / "passages.arrow"

    def broken():
        yield from ROWS[:1500]
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError):
        write_rows(path, PASSAGES, broken())
    assert not path.exists()
    write_rows(path, PASSAGES, ROWS[:2])
    with pytest.raises(RuntimeError):
        write_rows(path, PASSAGES, broken())
    assert list(read_rows(path)) == ROWS[:2]


def test_rows_are_streamed_not_collected(tmp_path):
    """A generator that looks at the file while it runs sees earlier rows on the disk already."""
    path, sizes = tmp_path / "passages.arrow", []

    def watching():
        for i, row in enumerate(ROWS):
            if i % 1000 == 500:
                sizes.append(path.with_name("passages.arrow.unfinished").stat().st_size)
            yield row

    write_rows(path, PASSAGES, watching())
    assert sizes[0] < sizes[1] < sizes[2]


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="none.arrow: not found.*prepare"):
        read_rows(tmp_path / "none.arrow")
    path = tmp_path / "passages.arrow"
    path.write_bytes(b"not arrow at all")
    with pytest.raises(ValueError, match="passages.arrow: damaged"):
        row_reader(path)
    with pytest.raises(ValueError, match="passages.arrow: damaged") as error:
        read_rows(path)
    assert "\n" not in str(error.value)


def test_batches():
    assert list(batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]] and list(batches([], 3)) == []


def test_folders_are_replaced_whole_or_not_at_all(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    (one / "old").write_text("old")
    with pytest.raises(KeyError), replacing(one, two) as (new_one, _):
        (new_one / "new").write_text("new")
        raise KeyError
    assert [file.name for file in tmp_path.rglob("*")] == ["one", "old"]
    with replacing(one, two) as (new_one, new_two):
        (new_one / "new").write_text("new")
        (new_two / "new").write_text("new")
        assert (one / "old").exists()
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "one",
        "one/new",
        "two",
        "two/new",
    ]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ValueError, match="file/one.unfinished: cannot be written: Not a directory"),
        replacing(tmp_path / "file" / "one"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_positions_of_the_wanted_ids_alone(tmp_path):
    write_rows(tmp_path / "passages.arrow", PASSAGES, ROWS)
    rows = read_rows(tmp_path / "passages.arrow")
    assert positions_of(rows, {"p2699", "p0", "nobody"}) == {"p0": 0, "p2699": 2699}
    assert positions_of(rows, set()) == {} and len(positions_of(rows)) == 2700
    assert positions_of(rows.select([5, 3]), {"p3"}) == {"p3": 1}


@pytest.mark.parametrize("change", ["cut", "byte"])
def test_an_arrow_file_that_was_altered_is_named(tmp_path, change):
    path = tmp_path / "passages.arrow"
    write_rows(path, PASSAGES, ROWS)
    content = path.read_bytes()
    path.write_bytes(content[:-8] if change == "cut" else content.replace(b"T\xc3\xadtulo 7", b"Titulo 77", 1))
    with pytest.raises(ValueError, match="passages.arrow: damaged.*dvc repro --force prepare") as error:
        read_rows(path)
    assert "\n" not in str(error.value)


def test_gold_rows_leave_out_what_is_not_in_the_corpus():
    passages = Dataset.from_list([{"id": name} for name in "abc"])
    questions = Dataset.from_list([{"positive_ids": names} for names in (["c", "a"], [], ["x"], ["b", "x"])])
    assert gold_rows(questions, passages) == [[2, 0], [], [], [1]]
