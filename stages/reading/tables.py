"""Rows of .csv and .tsv files as people have them: any delimiter and line ends, with a header or without, quoted or not."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.reading.text_files import LONGEST_LINE, head, lines
from stages.settings.data import Tables

DELIMITERS = ("\t", ",", ";", "|")
NAMES = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars (|)"}
SAMPLED_ROWS = 50
EXCEL_HINT = re.compile(r'"?sep=(.)"?\s*$')  # Excel's own first line
LIST = re.compile(r"\s*\[.*\]\s*$", re.DOTALL)


class Layout(NamedTuple):
    """How a table is read: the names of its columns are None where its first row has them."""

    delimiter: str
    columns: list[str] | None
    quoting: bool | None
    skipped: int  # lines before the first row
    found: str  # for the line that says what a file was taken for


def layout_of(path: Path, kind: str, tables: Tables, columns: list[str] | None, known: set[str]) -> Layout:
    """How the table is to be read. `kind`: .csv or .tsv; `known`: column names that headers are likely to hold."""
    sample = head(path).splitlines(keepends=True)[:SAMPLED_ROWS]
    hint = EXCEL_HINT.match(sample[0]) if sample else None
    sample = sample[bool(hint) :]
    usual = "\t" if kind == ".tsv" else ","
    delimiter = tables.delimiter or (hint[1] if hint else _delimiter_of(sample, usual, known))
    columns = columns or _columns_of(_cells(sample, delimiter), known)
    found = f"a table separated by {NAMES.get(delimiter, repr(delimiter))}"
    found += f" without a header: {', '.join(columns)}" if columns else ""
    return Layout(delimiter, columns, tables.quoting, int(bool(hint)), found)


def _cells(sample: list[str], delimiter: str) -> list[list[str]]:
    """The sample's rows but for the last one, which may be cut off; none where they cannot be told apart."""
    try:
        rows = [cells for cells in csv.reader(sample, delimiter=delimiter) if any(map(str.strip, cells))]
    except csv.Error:
        return []
    return rows[:-1] if len(rows) > 2 else rows


def _delimiter_of(sample: list[str], usual: str, known: set[str]) -> str:
    """That under which the header holds known names, else that of a known form, else that of rows of equally many cells.

    Tabs before commas, which prose holds; where nothing tells, the one that is usual under the file's extension.
    """

    def merit(delimiter: str) -> tuple:
        rows = _cells(sample, delimiter)
        if not rows or len(rows[0]) < 2:
            return (-1,)
        names = sum(cell.strip() in known for cell in rows[0])
        even = all(len(cells) == len(rows[0]) for cells in rows)
        return names, _columns_of(rows, known) is not None, even, -DELIMITERS.index(delimiter)

    best = max(DELIMITERS, key=merit)
    return best if merit(best) > (-1,) else usual


def _columns_of(rows: list[list[str]], known: set[str]) -> list[str] | None:
    """Names for the columns of two forms that go without a header: MS MARCO's (id, text) and DPR's (question, answers)."""
    if len(rows) < 2 or any(len(cells) != 2 for cells in rows) or any(cell.strip() in known for cell in rows[0]):
        return None
    if all(cells[0].strip().isdecimal() and len(cells[1].split()) > 1 for cells in rows):
        return ["_id", "text"]
    if all(LIST.match(cells[1]) for cells in rows):
        return ["question", "answers"]
    return None


def table_rows(path: Path, layout: Layout) -> Iterator[tuple[int, dict]]:
    """Pairs (line, row) of texts by column. Raises ValueError with file and line for whatever does not fit the header.

    Rows without any text are passed over, and so are empty cells beyond the last column.
    """
    # The library's own limit of 131,072 characters is for the whole process; long passages need more.
    csv.field_size_limit(LONGEST_LINE)
    numbered = lines(path)
    for _ in range(layout.skipped):
        next(numbered)
    recent: list[str] = []  # lines of the row that is read

    def watched() -> Iterator[str]:
        for _, text in numbered:
            recent.append(text)
            yield text

    quoting = csv.QUOTE_NONE if layout.quoting is False else csv.QUOTE_MINIMAL
    reader = csv.reader(watched(), delimiter=layout.delimiter, strict=True, quoting=quoting)
    header = layout.columns or []
    while True:
        line = reader.line_num + 1 + layout.skipped
        recent.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: {error}; look for an unclosed or stray quote in the row that begins here, or set "
                "data.tables.quoting to false where quotes are text"
            ) from None
        if not any(map(str.strip, cells)):
            continue
        if not header:
            header = [name.strip() for name in cells]
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise ValueError(f"{path}:{line}: the header names a column twice: {', '.join(header)[:200]!r}")
            continue
        if len(cells) > len(header) and not any(map(str.strip, cells[len(header) :])):
            cells = cells[: len(header)]
        if len(cells) != len(header):
            where = "data.tables names" if layout.columns else "the header has"
            raise ValueError(f"{path}:{line}: {len(cells)} cells where {where} {len(header)}")
        if layout.quoting is None and len(recent) > 1 and _swallows(recent, layout.delimiter, len(header)):
            raise ValueError(
                f"{path}:{line}: a quoted cell takes in {len(recent)} lines that look like rows of their own; close the "
                "quote, or set data.tables.quoting to false where quotes are text, to true where the cell is meant so"
            )
        yield line, dict(zip(header, cells, strict=True))


def _swallows(row: list[str], delimiter: str, columns: int) -> bool:
    """Whether each line of a row over several lines would be a row by itself.

    Prose holds commas, so for other delimiters than tabs all lines must begin with a number, or be three and more without
    a blank behind a delimiter.
    """
    parts = [line.rstrip("\r\n").split(delimiter) for line in row]
    if columns < 2 or any(len(cells) != columns for cells in parts):
        return False
    numbered = all(cells[0].strip('" ').isdecimal() for cells in parts)
    dense = len(row) > 2 and not any(cell.startswith(" ") for cells in parts for cell in cells[1:])
    return delimiter == "\t" or numbered or dense
