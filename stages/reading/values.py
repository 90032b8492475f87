"""Values of a row as texts, answers and positives: what is usable, and why one is not."""

import hashlib
import re
import unicodedata
from typing import NamedTuple

from stages.corpus.patterns import compiled
from stages.reading.literals import Ambiguous, parsed

LONGEST = {"question": 10_000, "answer": 1_000, "id": 1_000, "title": 1_000, "text": 100_000}  # characters
ID_NAMES = ("passage_id", "psg_id", "id", "docid", "_id", "pid", "doc_id")  # where a positive is an object, as in DPR's
ANSWER_NAMES = ("text", "answer", "value", "aliases")  # where an answer is one: SQuAD's, KILT's, TriviaQA's
WHOLE = re.compile(r"[-+]?\d+\.0")  # how spreadsheets and pandas write whole numbers of a column with gaps


class Unusable(Exception):
    """Why one row cannot be used."""


class Cells(NamedTuple):
    """How a table's texts are taken: `separator` between several things in one cell."""

    separator: str | None = None


class Positive(NamedTuple):
    """A passage that answers a question: ids it may go by, in this order, or the digest of its title and text.

    `shown`: as the file has it; `sure`: it must be in the corpus, while KILT's pages and contexts of other corpora need not;
    `grade`: how well it answers, above 0.
    """

    ids: tuple[str, ...] = ()
    keys: tuple[bytes, ...] = ()
    shown: str = ""
    sure: bool = True
    grade: float = 1.0


def text_of(value, what: str, cells: Cells | None = None) -> str:
    """A value as stripped text in Unicode's composed form (NFC), "" for none; numbers are written out, 10.0 as 10.

    `cells`: it comes from a table, where 10.0 is also text. Raises Unusable.
    """
    if value is None or value != value:  # NaN: what tables hold for nothing
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = (
            str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else str(value)
        )
    if not isinstance(value, str):
        raise Unusable(f"{what} is {type(value).__name__}, not text")
    if len(value) > LONGEST[what]:
        raise Unusable(f"{what} of {len(value):,} characters, more than {LONGEST[what]:,}")
    if "\0" in value or not _encodable(value):
        raise Unusable(f"{what} holds a NUL or half a surrogate pair")
    text = unicodedata.normalize("NFC", value.strip())
    return text[:-2] if cells and what in ("id", "answer") and WHOLE.fullmatch(text) else text


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def needed(text: str, what: str) -> str:
    if not text:
        raise Unusable(f"empty {what}")
    return text


def list_of(value, what: str, cells: Cells | None = None) -> list:
    """A list as it is, one thing as a list of one; text like '["a", "b"]' or "['a' 'b']", as tables hold it, is parsed.

    Raises Unusable, also for a text of which that is not certain.
    """
    if isinstance(value, str):
        try:
            found = parsed(value)
        except Ambiguous as reason:
            raise Unusable(f"{what} is ambiguous: {reason}") from None
        if found is value and cells and cells.separator and cells.separator in value:
            found = [part for part in value.split(cells.separator) if part.strip()]
        value = found
    if isinstance(value, bool):
        raise Unusable(f"{what} is {type(value).__name__}, not text or a list of texts")
    return value if isinstance(value, list) else [] if value is None else [value]


def answers_of(value, cells: Cells | None = None, patterns: bool = False) -> list[str]:
    """Different answers of a question: texts, numbers, objects that hold such (SQuAD's text, KILT's answer). Raises Unusable.

    `patterns`: they are regular expressions; "[ab]c" is then one of them, a list written as text only in a table.
    """
    texts: list[str] = []
    if patterns and isinstance(value, str) and cells is None:
        value = [value]
    for item in list_of(value, "answers", cells):
        if isinstance(item, dict):
            named = [item[name] for name in ANSWER_NAMES if name in item]
            if not named and "provenance" not in item:
                raise Unusable("answers is dict, not text or a list of texts")
            for one in named:
                texts += answers_of(one, None, patterns)
        else:
            texts.append(text_of(item, "answer", cells))
    texts = list(dict.fromkeys(filter(None, texts)))
    for text in texts if patterns else ():
        try:
            compiled(text)
        except ValueError as reason:
            raise Unusable(f"an answer: {reason}") from None
    return texts


def positives_of(value, cells: Cells | None = None) -> list[Positive]:
    """The passages that a question names: ids, or objects with an id, with title and text, or of KILT. Raises Unusable."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        rows = zip(*value.values(), strict=False)  # how `datasets` writes a list of objects
        value = [dict(zip(value, row, strict=True)) for row in rows]
    found = []
    for item in list_of(value, "positive_ids", cells):
        if not isinstance(item, dict):
            found.append(Positive((text_of(item, "id", cells),), (), repr(item)))
        elif "wikipedia_id" in item:
            page, paragraph = item["wikipedia_id"], item.get("start_paragraph_id")
            page = text_of(page, "id")
            ids = (f"{page}_{paragraph}", page) if paragraph is not None else (page,)
            found.append(Positive(ids, (), repr(item["wikipedia_id"]), sure=False))
        else:
            found.append(_described(item))
    return [positive for positive in dict.fromkeys(found) if any(positive.ids) or positive.keys]


def _described(item: dict) -> Positive:
    named = next((item[name] for name in ID_NAMES if item.get(name) not in (None, "")), None)
    title, text = item.get("title"), item.get("text")
    if named is None and not isinstance(text, str):
        raise Unusable(f"a positive without {' or '.join(ID_NAMES)} and without text")
    keys = digests(title if isinstance(title, str) else "", text) if isinstance(text, str) and text.strip() else ()
    if named is None:
        return Positive((), keys, repr(text.strip()[:60]), sure=False)
    return Positive((text_of(named, "id"),), keys, repr(named))


def digests(title: str, text: str) -> tuple[bytes, bytes]:
    """What a passage is known by where ids are missing: title and text, and text alone; spaces and NFC/NFD do not count."""
    title, text = (" ".join(unicodedata.normalize("NFC", part).split()) for part in (title, text))
    both, alone = f"{title}\0{text}", f"\0\0{text}"
    return tuple(
        hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=16).digest() for part in (both, alone)
    )
