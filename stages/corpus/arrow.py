"""Passages and questions as Arrow files: written once by prepare, memory-mapped by everyone else."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from stages.storage import manifest

if TYPE_CHECKING:  # a second that one question need not wait for
    from datasets import Dataset

PASSAGES = pa.schema([("id", pa.string()), ("title", pa.large_string()), ("text", pa.large_string())])
QUESTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("positive_ids", pa.list_(pa.string())),
        ("grades", pa.list_(pa.float64())),  # of the positives, above 0; null: each is 1
    ]
)
FOUND = pa.schema([("question", pa.int64()), ("passage", pa.int64())])  # rows of a split and of the passages
ROWS_A_BATCH = 1000
IDS_A_SCAN = 65536


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[dict]) -> int:
    """Streams rows into an Arrow file and returns their number; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    count = 0
    with open(unfinished, "wb") as file:
        with pa.ipc.new_stream(file, schema) as stream:
            for batch in batches(rows, ROWS_A_BATCH):
                stream.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                count += len(batch)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    manifest.record(path)
    return count


def read_rows(path: Path) -> "Dataset":
    """The rows of an Arrow file, memory-mapped."""
    from datasets import Dataset

    with _whole(path):
        return Dataset.from_file(str(path))


def row_reader(path: Path) -> Callable[[int], dict]:
    """A function from a row's number to the row: for a few of them, in place of `read_rows`."""
    with _whole(path):
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    return lambda row: table.slice(row, 1).to_pylist()[0]


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Around the reading of a file; raises ValueError in one line where it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: not found; run `dvc repro` (or python -m stages.prepare) first")
    problem = manifest.damage(path.parent, (path.name,))
    if problem:
        raise ValueError(f"{path}: damaged ({problem}); delete it and run `dvc repro --force prepare`")
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and run `dvc repro --force prepare`") from None


def positions_of(passages: "Dataset", wanted: set[str] | None = None) -> dict[str, int]:
    """The row of every passage id, or of the wanted ones: 21 million ids need 3 GB, those that questions name little."""
    ids = passages.select_columns("id").with_format("arrow")
    names = None if wanted is None else pa.array(sorted(wanted), pa.string())
    found, first = {}, 0
    for table in ids.iter(IDS_A_SCAN):
        column = table["id"].combine_chunks()
        rows = pa.array(range(len(column))) if names is None else pc.indices_nonzero(pc.is_in(column, value_set=names))
        found.update(zip(column.take(rows).to_pylist(), (first + row for row in rows.to_pylist()), strict=True))
        first += len(column)
    return found


def gold_rows(questions: "Dataset", passages: "Dataset") -> list[list[int]]:
    """Rows of the passages that each question names as its own, as far as they are in the corpus."""
    return [list(gold) for gold in gold_grades(questions, passages)]


def gold_grades(questions: "Dataset", passages: "Dataset") -> list[dict[int, float]]:
    """`gold_rows` with their grades, {row: grade above 0} for each question; 1 where judgements have none."""
    named = questions["positive_ids"][:]
    grades = questions["grades"][:] if "grades" in questions.column_names else [None] * len(named)
    position = positions_of(passages, {name for names in named for name in names})
    return [
        {
            position[name]: grade
            for name, grade in zip(names, some or [1.0] * len(names), strict=True)
            if name in position
        }
        for names, some in zip(named, grades, strict=True)
    ]


def own_rows(questions: "Dataset", found: "Dataset", passages: "Dataset") -> list[list[int]]:
    """What a warm-up reads: `gold_rows`, and for who names none the passage that was `found` by its answer, if any was."""
    by_answer = dict(zip(found["question"][:], found["passage"][:], strict=True))
    golds = gold_rows(questions, passages)
    return [gold or [by_answer[row]] if gold or row in by_answer else [] for row, gold in enumerate(golds)]


@contextmanager
def replacing(*folders: Path) -> Iterator[list[Path]]:
    """Empty folders to write into, which take the places of `folders` when the block ends without an error.

    With an error everything stays as it was; in a stage that DVC runs that is nothing, because DVC deletes outputs first.
    Raises ValueError in one line where the disk cannot be written.
    """
    unfinished = [folder.with_name(folder.name + ".unfinished") for folder in folders]
    try:
        for folder in unfinished:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield unfinished
        for file in (file for folder in unfinished for file in folder.rglob("*") if file.is_file()):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        for folder, new in zip(folders, unfinished, strict=True):
            manifest.put_in_place(new, folder)
    except OSError as error:
        raise ValueError(f"{error.filename or folders[0]}: cannot be written: {error.strerror or error}") from None
    finally:
        for folder in unfinished:
            shutil.rmtree(folder, ignore_errors=True)


def batches(rows: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of at most `size` rows."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
