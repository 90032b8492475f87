"""Rows of Parquet and Arrow files; a line is the row's number."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_A_BATCH = 1000
UNSOUND = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, KeyError)


def parquet_rows(path: Path, columns: set[str] | None) -> Iterator[tuple[int, dict]]:
    """`columns`: what is needed; None: all. Raises ValueError with file and row for damage."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            wanted = _wanted(file.schema_arrow.names, columns)
            for batch in file.iter_batches(ROWS_A_BATCH, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except UNSOUND as error:
        raise ValueError(_unsound(path, number, "Parquet", error)) from None


def arrow_rows(path: Path, columns: set[str] | None) -> Iterator[tuple[int, dict]]:
    """As `parquet_rows`: Arrow's stream format, which `datasets` writes (save_to_disk), or its file format."""
    number = 0
    try:
        with pa.memory_map(str(path)) as file:
            for batch in _batches(file):
                batch = batch.select(_wanted(batch.schema.names, columns))
                batch.validate(full=True)  # reading takes offsets as they are
                for first in range(0, batch.num_rows, ROWS_A_BATCH):
                    for row in batch.slice(first, ROWS_A_BATCH).to_pylist():
                        number += 1
                        yield number, row
    except UNSOUND as error:
        raise ValueError(_unsound(path, number, "Arrow", error)) from None


def _batches(file) -> Iterator[pa.RecordBatch]:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)


def _wanted(names: list[str], columns: set[str] | None) -> list[str]:
    # A file without any wanted column still has rows: whoever asked says what is missing.
    return [name for name in names if columns is None or name in columns] or names


def _unsound(path: Path, rows: int, kind: str, error: Exception) -> str:
    return f"{path}:{rows + 1}: not a sound {kind} file: {' '.join(str(error).split())[:200]}"
