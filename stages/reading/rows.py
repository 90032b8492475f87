"""From a file's rows to questions and passages: field names, what counts as usable, which ids are known.

A row that merely cannot be used goes into the report and is left out; a missing field or an id twice stops the run.
"""

import ast
import json
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from stages.params import Fields
from stages.reading.files import Table
from stages.reading.unusable_rows import Report

# What a field is called where params.yaml says null, in the order of preference.
USUAL = {"answers": ("answers", "answer", "short_answers"), "text": ("text", "contents", "passage")}
SHIPPED = {"question": "question", "id": "id", "positive_ids": "positive_ids", "passage_id": "id", "title": "title"}
REQUIRED = {"question", "answers", "text"}
LONGEST = {"question": 10_000, "answer": 1_000, "id": 1_000, "title": 1_000, "text": 100_000}  # characters
ID_NAMES = ("passage_id", "psg_id", "id", "docid")  # where a positive is an object, as in DPR's positive_ctxs


class Unusable(Exception):
    """Why one row cannot be used."""


def read_questions(table: Table, fields: Fields, split: str, report: Report) -> list[dict]:
    """The usable questions of a file: {id, question, answers, positive_ids} and, for messages, {file, line}.

    Ids are made up where there are none.
    """
    names = names_of(fields, ("id", "question", "answers", "positive_ids"))
    file, questions, count = table.name, [], 0
    for line, row in table.read():
        count += 1
        if count == 1:
            _check_names(file, line, row, fields, names)
        try:
            given = text_of(_value(row, names["id"]), "id")
            question = needed(text_of(_value(row, names["question"]), "question"), "question")
            answers = [text_of(answer, "answer") for answer in list_of(_value(row, names["answers"]), "answers")]
            answers = list(dict.fromkeys(answer for answer in answers if answer))
            if not answers:
                raise Unusable("no answer")
            positives = [id_of(item) for item in list_of(_value(row, names["positive_ids"]), "positive_ids")]
        except Unusable as reason:
            report.add(file, line, str(reason))
            continue
        questions.append(
            {
                "id": given or f"{split}-{count:06d}",
                "question": question,
                "answers": answers,
                "positive_ids": list(dict.fromkeys(filter(None, positives))),
                "file": file,
                "line": line,
            }
        )
    report.check(file, count)
    return questions


def read_passages(table: Table, fields: Fields, ids_wanted: bool, report: Report) -> Iterator[dict]:
    """The usable passages {id, title, text} of a file, streamed. Without ids the row's number, from 1, is the id.

    `ids_wanted`: questions name positives, so that made-up ids would be wrong ones. Raises ValueError, as read_questions
    does, for a missing field and for too many unusable rows.
    """
    names = names_of(fields, ("passage_id", "title", "text"))
    file, with_ids, count = table.name, True, 0
    for line, row in table.read():
        count += 1
        if count == 1:
            _check_names(file, line, row, fields, names)
            with_ids = names["passage_id"][0] in row
            if ids_wanted and not with_ids:
                raise ValueError(
                    f"{file}:{line}: no field {names['passage_id'][0]}, but questions name positive passages; "
                    "set data.fields.passage_id"
                )
        try:
            passage_id = str(count)
            if with_ids:
                passage_id = needed(text_of(_value(row, names["passage_id"]), "id"), "id")
            title = text_of(_value(row, names["title"]), "title")
            text = needed(text_of(_value(row, names["text"]), "text"), "text")
        except Unusable as reason:
            report.add(file, line, str(reason))
            continue
        yield {"id": passage_id, "title": title, "text": text}
    report.check(file, count)


def names_of(fields: Fields, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Field names to look for, by key of data.fields."""
    return {key: (name,) if (name := getattr(fields, key)) else USUAL[key] for key in keys}


def columns_of(fields: Fields) -> set[str]:
    """Every field name that may be read: all that is needed of a Parquet file's columns."""
    return {name for names in names_of(fields, Fields.model_fields).values() for name in names}


def _check_names(file: str, line: int, row: dict, fields: Fields, names: dict[str, tuple[str, ...]]) -> None:
    for key, some in names.items():
        wanted = key in REQUIRED or getattr(fields, key) != SHIPPED.get(key)
        if wanted and not any(name in row for name in some):
            there = " ".join(", ".join(map(str, row)).split())[:200] or "none"
            raise ValueError(f"{file}:{line}: no field {' or '.join(some)}; there are: {there}; set data.fields.{key}")


def _value(row: dict, names: tuple[str, ...]):
    present = [row[name] for name in names if name in row]
    return next((value for value in present if value not in (None, "", [])), None)


def text_of(value, what: str) -> str:
    """A value as stripped text, "" for none; numbers are written out. Raises Unusable."""
    if value is None or value != value:  # NaN: what tables hold for nothing
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise Unusable(f"{what} is {type(value).__name__}, not text")
    if len(value) > LONGEST[what]:
        raise Unusable(f"{what} of {len(value):,} characters, more than {LONGEST[what]:,}")
    if "\0" in value or not _encodable(value):
        raise Unusable(f"{what} holds a NUL or half a surrogate pair")
    return value.strip()


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


def list_of(value, what: str) -> list:
    """A list as it is, one thing as a list of one; text like '["a", "b"]', as tables hold it, is parsed. Raises Unusable."""
    if isinstance(value, str) and value[:1] == "[" and value.rstrip()[-1:] == "]" and len(value) <= 100_000:
        for parse in (json.loads, ast.literal_eval):  # DPR's question files hold Python lists
            try:
                parsed = parse(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            return parsed if isinstance(parsed, list) else [value]
    if isinstance(value, dict | bool):
        raise Unusable(f"{what} is {type(value).__name__}, not text or a list of texts")
    return value if isinstance(value, list) else [] if value is None else [value]


def id_of(item) -> str:
    """A positive's id: text, a number, or an object that holds it."""
    if isinstance(item, dict):
        item = next((item[name] for name in ID_NAMES if name in item), None)
        if item is None:
            raise Unusable(f"a positive without {' or '.join(ID_NAMES)}")
    return text_of(item, "id")


def keep_known(questions: Iterable[dict], known: set[str], report: Report) -> None:
    """Takes positives that are no passage's id out of the questions, in place, lists them in the report and warns.

    The questions stay usable, so they do not count for data.max_unusable. Raises ValueError where a file names positives
    and not one of them is known: its ids are those of other passages, or another field's.
    """
    named, without, first = Counter(), Counter(), {}
    some_known = set()
    for question in questions:
        file, line = question["file"], question["line"]
        kept = [name for name in question["positive_ids"] if name in known]
        named[file] += bool(question["positive_ids"])
        if kept:
            some_known.add(file)
        if len(kept) < len(question["positive_ids"]):
            unknown = next(name for name in question["positive_ids"] if name not in known)
            report.note(file, line, f"unknown positive id {unknown!r}; kept without it")
            first.setdefault(file, f"{file}:{line}: unknown positive id {unknown!r}")
            without[file] += 1
        question["positive_ids"] = kept
    for file, count in sorted(without.items()):
        if file not in some_known:
            raise ValueError(
                f"{first[file]}; of {named[file]} questions with positives none names a known passage: set "
                "data.fields.positive_ids and data.fields.passage_id, or take the positives out of the file"
            )
        print(f"warning: {first[file]}; {count} questions are kept without such, listed in {report.path}")


class PassageIds:
    """Watches the ids of streamed passages: which of the wanted ones occur, and whether one comes twice.

    Of every id a 64-bit hash is kept, 8 bytes: 168 MB for 21 million. The ids themselves are not.
    """

    def __init__(self, wanted: Iterable[str]):
        self.wanted, self.found = set(wanted), set()
        self.blocks: list[np.ndarray] = []

    def watch(self, passages: Iterable[dict]) -> Iterator[dict]:
        block: list[int] = []
        for passage in passages:
            if passage["id"] in self.wanted:
                self.found.add(passage["id"])
            block.append(hash(passage["id"]))
            if len(block) == 65536:
                self.blocks.append(np.array(block, dtype=np.int64))
                block = []
            yield passage
        self.blocks.append(np.array(block, dtype=np.int64))

    def suspects(self) -> set[int]:
        """Hashes that occur more than once: of two equal ids or, rarely, of two that only hash alike."""
        hashes = np.concatenate(self.blocks or [np.zeros(0, dtype=np.int64)])
        hashes.sort()
        return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    def check_unique(self, table: Table, fields: Fields) -> None:
        """Raises ValueError with both lines of an id that occurs twice; reads the file again only where it must."""
        if not (suspects := self.suspects()):
            return
        lines: dict[str, int] = {}
        names = names_of(fields, ("passage_id",))["passage_id"]
        for line, row in table.read():
            try:
                passage_id = text_of(_value(row, names), "id")
            except Unusable:
                continue
            if not passage_id or hash(passage_id) not in suspects:
                continue
            if passage_id in lines:
                raise ValueError(
                    f"{table.name}:{line}: passage id {passage_id!r} stands in line {lines[passage_id]} already"
                )
            lines[passage_id] = line
