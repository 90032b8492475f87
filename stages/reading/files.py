"""Rows of a user's file, one after the other: JSON lines, JSON, CSV, TSV and Parquet, text kinds also as .gz.

Damage stops the reading with one ValueError that names file and line. What the rows mean is not known here.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.params import Files
from stages.storage.outside_files import find_file

LONGEST_LINE = 16 * 2**20  # bytes; bounds the memory where line ends or closing quotes are missing
LONGEST_JSON = 2**30  # bytes: a .json file is one value and is read whole
ROWS_A_BATCH = 1000
BLANK = re.compile(r"[ \t\n\r]*")

Rows = Iterator[tuple[int, dict]]


@dataclass(frozen=True)
class Table:
    """What messages call it, and a function that reads its rows from the beginning."""

    name: str
    read: Callable[[], Rows]


def open_tables(files: Files, columns: set[str]) -> dict[str, Table]:
    """The files that `data.files` names, by split.

    Raises ValueError for a missing one, an unknown kind and a file named twice, however its path is spelled.

    `columns`: all that is needed of a Parquet file.
    """
    tables: dict[str, Table] = {}
    splits: dict[Path, str] = {}
    for split, name in files.model_dump().items():
        if name:
            key = f"data.files.{split}"
            path = find_file(name, key)
            if (other := splits.setdefault(path.resolve(), split)) != split:
                raise ValueError(
                    f"{key}: {name} is the file of data.files.{other} too; what is trained on cannot be what is measured on"
                )
            if kind_of(path, key) == ".json" and split == "passages":
                raise ValueError(f"{key}: {path} cannot be streamed; use JSON lines, CSV, TSV or Parquet")
            tables[split] = Table(str(path), partial(read_file, path, columns))
    return tables


def kind_of(path: Path, key: str) -> str:
    """The extension that names the format, without .gz. Raises ValueError for an unknown one."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in READERS or (kind == ".parquet" and name.endswith(".gz")):
        known = ", ".join(READERS)
        raise ValueError(f"{key}: {path} has an unknown extension; known are {known}, and .gz of all but .parquet")
    return kind


def read_file(path: Path, columns: set[str] | None = None) -> Rows:
    """Pairs (line, row), streamed. `columns`: what is needed of a Parquet file, where a line is the row's number.

    Raises ValueError in one line, with path and line, for whatever is wrong with the file.
    """
    read = READERS[kind_of(path, "file")]
    empty = True
    for line, row in read(path, columns) if read is _parquet else read(path):
        empty = False
        yield line, row
    if empty:
        raise ValueError(f"{path}: holds no rows")


def _open(path: Path):
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(raw) > LONGEST_LINE:
                    raise ValueError(f"{path}:{number}: longer than {LONGEST_LINE:,} bytes; is a line end missing?")
                yield number, _decoded(path, number, raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(_unreadable(path, number + 1, error)) from None


def _unreadable(path: Path, line: int, error: Exception) -> str:
    if isinstance(error, EOFError):
        return f"{path}:{line}: the gzip file is cut short; fetch or pack it again"
    if isinstance(error, gzip.BadGzipFile | zlib.error):
        return f"{path}:{line}: not a sound gzip file ({error}); fetch or pack it again"
    return f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"


def _decoded(path: Path, line: int, raw: bytes) -> str:
    if line == 1 and raw.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path}:1: is packed with gzip; give it a name that ends in .gz")
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); convert it, e.g. with iconv"
        ) from None
    if "\0" in text:
        line += text.count("\n", 0, text.index("\0"))
        raise ValueError(f"{path}:{line}: holds a NUL byte; it is damaged or not UTF-8 text")
    return text


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _json_value(text: str, start: int) -> tuple[object, int]:
    """The value that begins at `start` and the position after it; ValueError with a reason that names no file."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        column = error.pos - (text.rfind("\n", 0, error.pos) + 1) + 1
        raise ValueError(f"not valid JSON: {error.msg} (column {column})") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise ValueError(f"not valid JSON: {str(error).partition(';')[0]}") from None


def _row(path: Path, line: int, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{line}: a row must be a JSON object, this is {type(value).__name__}")
    return value


def _json_lines(path: Path) -> Rows:
    for number, text in _lines(path):
        start = BLANK.match(text).end()
        if start == len(text):
            continue
        try:
            value, end = _json_value(text, start)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if BLANK.match(text, end).end() != len(text):
            raise ValueError(f"{path}:{number}: more than one JSON value (column {end + 1})")
        yield number, _row(path, number, value)


def _json(path: Path) -> Rows:
    """An array of objects, or objects one after the other."""
    try:
        with _open(path) as file:
            raw = file.read(LONGEST_JSON + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(_unreadable(path, 1, error)) from None
    if len(raw) > LONGEST_JSON:
        raise ValueError(f"{path}: larger than {LONGEST_JSON:,} bytes; use JSON lines")
    text = _decoded(path, 1, raw)
    position = BLANK.match(text).end()
    in_array = text[position : position + 1] == "["
    position, line, counted = position + in_array, 1, 0
    closed = first = True
    while True:
        position = BLANK.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if in_array:
            closed = text[position : position + 1] == "]"
            if closed:
                position = BLANK.match(text, position + 1).end()
                break
            if not first:
                if text[position : position + 1] != ",":
                    raise ValueError(f"{path}:{line}: not valid JSON: expected ',' or ']' after a row")
                position = BLANK.match(text, position + 1).end()
                line, counted = line + text.count("\n", counted, position), position
        elif position == len(text):
            return
        try:
            value, position = _json_value(text, position)
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}, in the row that begins here") from None
        first = False
        yield line, _row(path, line, value)
    if position != len(text):
        raise ValueError(f"{path}:{line}: not valid JSON: something follows the closing ']'")


def _table(delimiter: str):
    def read(path: Path) -> Rows:
        # The library's own limit of 131,072 characters is for the whole process; long passages need more.
        csv.field_size_limit(LONGEST_LINE)
        reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(
                    f"{path}:{line}: {error}; look for an unclosed or stray quote in the row that begins here"
                ) from None
            if not cells:
                continue
            if not header:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header):
                    raise ValueError(f"{path}:{line}: the header names a column twice: {', '.join(header)[:200]!r}")
                continue
            if len(cells) != len(header):
                raise ValueError(f"{path}:{line}: {len(cells)} cells where the header has {len(header)}")
            yield line, dict(zip(header, cells, strict=True))

    return read


def _parquet(path: Path, columns: set[str] | None) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if columns is None or name in columns]
            # A file without any wanted column still has rows: whoever asked says what is missing.
            for batch in file.iter_batches(ROWS_A_BATCH, columns=wanted or names):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}:{number + 1}: not a sound Parquet file: {reason}") from None


READERS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"),
    ".parquet": _parquet,
}  # fmt: skip
