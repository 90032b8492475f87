"""The files that params.yaml names, as rows one after the other: JSON lines, JSON, CSV, TSV, Parquet, Arrow.

Damage stops the reading with one ValueError that names file and line. What the rows mean is not known here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.reading.arrow_rows import arrow_rows, parquet_rows
from stages.reading.json_rows import Rows, json_lines, json_values
from stages.reading.tables import layout_of, table_rows
from stages.settings.data import Files, Qrels, Tables
from stages.storage.outside_files import OutsideFile, find_files

TEXT = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_values}
CELLS = (".csv", ".tsv")
COLUMNS = {".parquet": parquet_rows, ".arrow": arrow_rows}
KINDS = (*TEXT, *CELLS, *COLUMNS)
PACKED = tuple(f"{kind}.gz" for kind in (*TEXT, *CELLS))
LEFT_OPEN = Tables(delimiter=None, question_columns=None, passage_columns=None, quoting=None, separator=None)


@dataclass(frozen=True)
class Table:
    """One file: what messages call it, a function that reads its rows from the beginning, what it was taken for.

    `of_cells`: every value is a text, as a spreadsheet wrote it.
    """

    name: str
    read: Callable[[], Rows]
    found: str = ""
    of_cells: bool = False


def open_tables(files: Files, qrels: Qrels, tables: Tables, columns: set[str]) -> dict[str, list[Table]]:
    """The files of each split that `data.files` names and of "passages". ValueError for a missing one and an unknown kind.

    `columns`: names that may be read, which is all that is needed of Parquet and Arrow.
    """
    opened, asked = {}, {}
    for split, names in files.model_dump().items():
        if not names:
            continue
        key = f"data.files.{split}"
        headers = tables.passage_columns if split == "passages" else tables.question_columns
        found = find_files(names, key, KINDS + PACKED)
        if split != "passages":
            for file in found:
                _refuse_twice(file, split, asked.setdefault(file.path.resolve(), split), qrels)
        opened[split] = [open_table(file, key, columns, tables, headers) for file in found]
    return opened


def _refuse_twice(file: OutsideFile, split: str, other: str, qrels: Qrels) -> None:
    judged = getattr(qrels, split) and getattr(qrels, other) and getattr(qrels, split) != getattr(qrels, other)
    if split != other and not judged:
        raise ValueError(
            f"data.files.{split}: {file.name} is the file of data.files.{other} too; what is trained on cannot be what is "
            "measured on"
        )


def open_table(
    file: OutsideFile, key: str, columns: set[str], tables: Tables = LEFT_OPEN, headers: list[str] | None = None
) -> Table:
    """A file as a table. `headers`: names of the columns of a table without a header, where params.yaml has them."""
    kind = kind_of(file.path, key)
    name = str(file.path)
    if kind in CELLS:
        layout = layout_of(file.path, kind, tables, headers, columns)
        return Table(name, partial(_some, name, partial(table_rows, file.path, layout)), layout.found, True)
    if kind in COLUMNS:
        return Table(name, partial(_some, name, partial(COLUMNS[kind], file.path, columns)), f"{kind[1:]} file")
    return Table(name, partial(_some, name, partial(TEXT[kind], file.path)), "JSON")


def kind_of(path: Path, key: str) -> str:
    """The extension that names the format, without .gz. Raises ValueError for an unknown one."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in KINDS or (kind in COLUMNS and name.endswith(".gz")):
        raise ValueError(
            f"{key}: {path} has an unknown extension; known are {', '.join(KINDS)}, and .gz of all but {', '.join(COLUMNS)}"
        )
    return kind


def _some(name: str, read: Callable[[], Rows]) -> Rows:
    empty = True
    for line, row in read():
        empty = False
        yield line, row
    if empty:
        raise ValueError(f"{name}: holds no rows")
