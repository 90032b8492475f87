"""Rows of JSON files: a row a line, an array of rows of any length, or rows one after the other; all streamed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from stages.reading.text_files import lines, texts

LONGEST_ROW = 2**28  # characters: a row of a .json file that is longer is taken for a damaged one
WRAPPERS = (
    "data",
    "Data",
    "questions",
    "Questions",
    "rows",
    "examples",
)  # {"version": ..., "data": [rows]}, as in SQuAD
ROW_KEYS = ("question", "input", "query", "id", "_id", "text")  # an object with one of these is a row itself
ENDS = tuple(",:]} \t\n\r")  # what stands behind a value
BLANK = re.compile(r"[ \t\n\r]*")

Rows = Iterator[tuple[int, dict]]


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


class Broken(Exception):
    """Why a value is none, and where in the text that shows."""

    def __init__(self, reason: str, position: int):
        super().__init__(reason)
        self.position = position


def _value(text: str, start: int) -> tuple[object, int]:
    """The value that begins at `start` and the position after it. Raises Broken."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        column = error.pos - (text.rfind("\n", 0, error.pos) + 1) + 1
        raise Broken(f"not valid JSON: {error.msg} (column {column})", error.pos) from None
    except RecursionError:
        raise Broken("not valid JSON: nested too deeply", start) from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise Broken(f"not valid JSON: {str(error).partition(';')[0]}", start) from None


def _row(path: Path, line: int, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{line}: a row must be a JSON object, this is {type(value).__name__}")
    return value


def json_lines(path: Path) -> Rows:
    """Raises ValueError with file and line; for the other forms of JSON it says what to call the file."""
    first, end_of_name = True, ".json.gz" if path.name.lower().endswith(".gz") else ".json"
    for number, text in lines(path):
        start = BLANK.match(text).end()
        if start == len(text):
            continue
        remedy = f"name the file {end_of_name}, where rows may take several lines"
        try:
            value, end = _value(text, start)
        except Broken as error:
            if first and text[start] in "[{" and error.position >= len(text.rstrip()):
                what = "a JSON array begins here" if text[start] == "[" else "an object over several lines begins here"
                raise ValueError(
                    f"{path}:{number}: {what}, but {path.name} should hold a row a line; {remedy}"
                ) from None
            raise ValueError(f"{path}:{number}: {error}") from None
        if first and isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            raise ValueError(f"{path}:{number}: a JSON array, but {path.name} should hold a row a line; {remedy}")
        if BLANK.match(text, end).end() != len(text):
            raise ValueError(f"{path}:{number}: more than one JSON value (column {end + 1})")
        first = False
        yield number, _row(path, number, value)


class _Reader:
    """A place in a file's text, of which only what one row needs is held."""

    def __init__(self, path: Path):
        self.path, self.pieces = path, texts(path)
        self.text, self.position = "", 0
        self.line, self.counted = 1, 0  # line of the position `counted`
        self.ended = False

    def more(self) -> bool:
        """Reads at least as much again as is held, so that reading on is linear in the length of a row. False at the end."""
        parts = [self.text[self.position :]]
        held = wanted = len(parts[0])
        self.line += self.text.count("\n", self.counted, self.position)
        while wanted >= 0 and not self.ended:
            part = next(self.pieces, None)
            self.ended = part is None
            parts.append(part or "")
            wanted -= len(part or "")
        self.text, self.position, self.counted = "".join(parts), 0, 0
        return len(self.text) > held

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            self.position = BLANK.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def take(self) -> str:
        character = self.peek()
        self.position += len(character)
        return character

    def expect(self, character: str, where: str) -> None:
        if self.peek() != character:
            raise ValueError(f"{self.path}:{self.here()}: not valid JSON: expected {character!r} {where}")
        self.position += 1

    def here(self) -> int:
        """The line of the position."""
        self.line += self.text.count("\n", self.counted, self.position)
        self.counted = self.position
        return self.line

    def value(self) -> tuple[int, object]:
        """The next value and its line. Raises ValueError with file and line."""
        self.peek()
        line = self.here()
        while True:
            try:
                value, end = _value(self.text, self.position)
            except Broken as error:
                # What looks broken may only be cut off.
                if len(self.text) - self.position > LONGEST_ROW or not self.more():
                    raise ValueError(f"{self.path}:{line}: {error}, in the row that begins here") from None
                continue
            if self.text[end : end + 1] not in ENDS and self.more():  # a number may go on
                continue
            self.position = end
            return line, value


def json_values(path: Path) -> Rows:
    """An array of objects, also as one key of an object (SQuAD's "data"), or objects one after the other."""
    if reader := _within_wrapper(path):
        yield from _array(reader)
        while reader.peek() == ",":  # what else the object holds
            reader.take()
            reader.value()
            reader.expect(":", "after a key")
            reader.value()
        reader.expect("}", "at the end of the object")
    else:
        reader = _Reader(path)
        if reader.peek() != "[":
            while reader.peek():
                line, value = reader.value()
                yield line, _row(path, line, value)
            return
        reader.take()
        yield from _array(reader)
    if reader.peek():
        raise ValueError(f"{path}:{reader.here()}: not valid JSON: something follows the closing ']'")


def _array(reader: _Reader) -> Rows:
    """The rows of the array whose '[' is taken."""
    if reader.peek() != "]":
        while True:
            line, value = reader.value()
            yield line, _row(reader.path, line, value)
            if reader.peek() != ",":
                break
            reader.take()
    reader.expect("]", "or ',' after a row")


def _within_wrapper(path: Path) -> _Reader | None:
    """A reader at the first row of an array that stands in an object under one of WRAPPERS; None where there is none."""
    reader = _Reader(path)
    try:
        if reader.take() != "{":
            return None
        while reader.peek() == '"':
            _, key = reader.value()
            reader.expect(":", "after a key")
            if key in WRAPPERS and reader.peek() == "[":
                reader.take()
                return reader if reader.peek() == "{" else None
            reader.value()
            if key in ROW_KEYS or reader.take() != ",":
                return None
    except ValueError:  # told where the rows are read
        return None
    return None
