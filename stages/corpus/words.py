"""Words by script: Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces between them.

Where such a text is matched or scored, each of its characters, with the marks it carries, is a word, as the scorer of MLQA
has it (Lewis et al. 2020); for BM25 it is each pair of neighbours, as in Lucene's CJKAnalyzer. Other text stays as it is.
"""

import re
import unicodedata

# Thai and Lao; Burmese; Khmer; kana, Bopomofo and their extensions; Han.
UNSPACED = (
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u1000-\u102a\u103f\u1050-\u1055"
    "\u1780-\u17b3\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)


LAST = 0x1F000  # no mark or punctuation that text is written with lies behind


def class_of(category: str) -> str:
    """The characters of a Unicode category, "M" for marks, as a regular expression's class holds them."""
    found, first = [], None
    for point in range(LAST + 1):
        if point < LAST and unicodedata.category(chr(point))[0] == category:
            first = point if first is None else first
        elif first is not None:
            found.append(f"\\U{first:08x}-\\U{point - 1:08x}")
            first = None
    return "".join(found)


MARKS = class_of("M")
CHARACTER = re.compile(f"[{UNSPACED}][{MARKS}]*")
RUN = re.compile(f"(?:[{UNSPACED}][{MARKS}]*)+")
SPECIAL = re.compile(f"[{UNSPACED}{MARKS}]")
# The words of bm25s, two characters and more; slower, with marks, which belong to their word, and characters by themselves.
PLAIN_PATTERN = r"(?u)\b\w\w+\b"
PATTERN = f"(?:\\w\\w+|\\w(?=[{MARKS}]))(?:[{MARKS}]+\\w*)*|[{UNSPACED}]"


def spaced(text: str) -> str:
    """The text with spaces around each character of scripts that are written without any; other text as it is."""
    return text if text.isascii() else CHARACTER.sub(r" \g<0> ", text)


def paired(text: str) -> str:
    """The text in lower case and normal form C, with such characters as overlapping pairs: 'abc' stands as 'ab bc'."""
    if text.isascii():
        return text
    # Turkish I with a dot becomes two code points in lower case.
    text = unicodedata.normalize("NFC", text).lower().replace("i\u0307", "i")
    return RUN.sub(_pairs, text)


def is_plain(text: str) -> bool:
    """Whether PLAIN_PATTERN finds the same words as PATTERN."""
    return text.isascii() or not SPECIAL.search(text)


def _pairs(run: re.Match) -> str:
    characters = CHARACTER.findall(run[0])
    pairs = map("".join, zip(characters, characters[1:], strict=False))
    return f" {' '.join(pairs) if len(characters) > 1 else run[0]} "
