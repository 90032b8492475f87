"""Text files, plain or as .gz: lines with any line ends, and text in pieces; what is wrong with one in a line."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

LONGEST_LINE = 16 * 2**20  # bytes; bounds the memory where line ends or closing quotes are missing
PIECE = 2**20  # bytes read at once
HEAD = 2**18
UNREADABLE = (OSError, EOFError, zlib.error)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Numbers from 1 and lines with their ends, \n, \r\n or \r alone. Raises ValueError with file and line."""
    number, rest = 0, b""
    try:
        for piece in _pieces(path):
            found = (rest + piece).splitlines(keepends=True)
            # What has no end yet, or perhaps half of one, waits for the next piece.
            rest = found.pop() if piece and not found[-1].endswith(b"\n") else b""
            for raw in found:
                number += 1
                _check_length(path, number, raw)
                yield number, decoded(path, number, raw)
            _check_length(path, number + 1, rest)
    except UNREADABLE as error:
        raise ValueError(_unreadable(path, number + 1, error)) from None


def _check_length(path: Path, line: int, raw: bytes) -> None:
    if len(raw) > LONGEST_LINE:
        raise ValueError(f"{path}:{line}: longer than {LONGEST_LINE:,} bytes; is a line end missing?")


def texts(path: Path) -> Iterator[str]:
    """The text in pieces, without a BOM. Raises ValueError with file and line."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        for piece in _pieces(path):
            text = decoder.decode(piece, final=not piece)
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                raise ValueError(_holds_nul(path, line))
            line += text.count("\n")
            yield text
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise ValueError(_not_utf8(path, line, error.object[error.start])) from None
    except UNREADABLE as error:
        raise ValueError(_unreadable(path, line, error)) from None


def head(path: Path, size: int = HEAD) -> str:
    """What the file begins with, for a look at its form: damage is left to the reading itself."""
    try:
        with open_bytes(path) as file:
            raw = file.read(size)
    except UNREADABLE:
        return ""
    return raw.decode("utf-8-sig", errors="replace")


def open_bytes(path: Path):
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _pieces(path: Path) -> Iterator[bytes]:
    """Pieces of the unpacked file and at last an empty one."""
    first = True
    with open_bytes(path) as file:
        while piece := file.read(PIECE):
            if first and piece.startswith(b"\x1f\x8b"):
                raise ValueError(f"{path}:1: is packed with gzip; give it a name that ends in .gz")
            first = False
            yield piece
    yield b""


def _unreadable(path: Path, line: int, error: Exception) -> str:
    if isinstance(error, EOFError):
        return f"{path}:{line}: the gzip file is cut short; fetch or pack it again"
    if isinstance(error, gzip.BadGzipFile | zlib.error):
        return f"{path}:{line}: not a sound gzip file ({error}); fetch or pack it again"
    return f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"


def decoded(path: Path | str, line: int, raw: bytes) -> str:
    """A line of bytes as text, the first one without a BOM. Raises ValueError for other encodings and for NUL."""
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, line, raw[error.start])) from None
    if "\0" in text:
        raise ValueError(_holds_nul(path, line))
    return text


def _holds_nul(path: Path | str, line: int) -> str:
    return f"{path}:{line}: holds a NUL byte; it is damaged or not UTF-8 text"


def _not_utf8(path: Path | str, line: int, byte: int) -> str:
    return f"{path}:{line}: not UTF-8 (byte 0x{byte:02x}); convert it, e.g. with iconv -f latin1 -t utf-8"
