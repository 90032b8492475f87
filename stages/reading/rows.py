"""From a file's rows to questions and passages: formats, field names, what counts as usable.

A row that merely cannot be used goes into the report and is left out; a missing field stops the run.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from stages.reading.files import Table
from stages.reading.formats import PASSAGES, QUESTIONS, Format, at, has, recognised
from stages.reading.passage_ids import PassageIds
from stages.reading.unusable_rows import Report
from stages.reading.values import Cells, Positive, Unusable, answers_of, digests, needed, positives_of, text_of
from stages.settings.data import Fields

SHIPPED = {"question": "question", "id": "id", "positive_ids": "positive_ids", "passage_id": "id", "title": "title"}
# What a field is called where params.yaml says null or what is shipped, in the order of preference.
USUAL = {
    "question": ("question", "query"),
    "answers": ("answers", "answer", "short_answers", "golden_answers", "target"),
    "id": ("id", "_id", "qid", "query_id", "question_id"),
    "positive_ids": ("positive_ids", "positive_ctxs"),
    "passage_id": ("id", "_id", "docid", "pid", "passage_id"),
    "title": ("title", "wikipedia_title"),
    "text": ("text", "contents", "passage"),
}
REQUIRED = {"question", "answers", "text"}
UNFOLDED = {
    "context",
    "document_text",
    "document_tokens",
    "wikipedia_id",
    "target",
}  # what formats read beside their marks
Names = dict[str, tuple[str, ...]]


def read_questions(
    tables: Iterable[Table], fields: Fields, split: str, report: Report, *, separator: str | None = None,
    unanswerable: str | None = None, patterns: bool = False, judged: dict[str, list[Positive]] | None = None,
) -> list[dict]:  # fmt: skip
    """The usable questions of a split's files: {id, question, answers, positives} and, for messages, {file, line}.

    Ids are made up where there are none. Answers may be missing, as a field, where positives are named. `unanswerable`:
    the answer of questions without one. `patterns`: answers are regular expressions. `judged`: positives by question id;
    only questions that it names are kept.
    """
    questions, told, counts = [], Told(), Counter()
    for table in tables:
        file, cells, first = table.name, Cells(separator) if table.of_cells else None, len(questions)
        form: Format | None = None
        rows = unanswered = 0
        for line, row, form, new in _unfolded(table, QUESTIONS):
            counts["rows"] += 1
            rows += 1
            if new:
                names = names_of(fields, ("id", "question", "answers", "positive_ids"), form)
                answered = _check_questions(table, line, row, fields, names, form, judged is not None)
                told.line(table, form, names, row)
            try:
                given = text_of(_value(row, names["id"]), "id", cells)
                if judged is not None and given not in judged:
                    counts["unjudged"] += 1
                    continue
                question = needed(text_of(_value(row, names["question"]), "question"), "question")
                answers = answers_of(_value(row, names["answers"]), cells, patterns)
                if not answers and unanswerable:
                    answers = [unanswerable]
                elif not answers and answered and form and form.sparse:
                    unanswered += 1
                    continue
                elif not answers and answered:
                    raise Unusable("no answer")
                positives = positives_of(_value(row, names["positive_ids"]), cells) if judged is None else judged[given]
            except Unusable as reason:
                report.add(file, line, str(reason))
                continue
            questions.append(
                {
                    "id": given or f"{split}-{counts['rows']:06d}",
                    "question": question,
                    "answers": answers,
                    "positives": positives,
                    "file": file,
                    "line": line,
                }
            )
        report.check(file, rows)
        counts["unanswered"] += unanswered
        if unanswered and len(questions) == first:
            raise ValueError(f"{file}: none of its {rows} questions has an answer; data.unanswerable can give them one")
    if counts["unanswered"]:
        print(f"{counts['unanswered']} of {counts['rows']} {split} questions have no answer and are left out")
    if judged is not None:
        print(
            f"{split}: {len(questions)} of {counts['rows']} questions have a positive judgement, the others are left out"
        )
    return questions


def read_passages(tables: Iterable[Table], fields: Fields, ids: PassageIds, report: Report) -> Iterator[dict]:
    """The usable passages {id, title, text} of all files, streamed. Without ids the row's number, from 1, is the id.

    `ids` is told of made-up ids: questions mean others. Raises ValueError, as read_questions does, for a missing field and
    for too many unusable rows.
    """
    count, told, seen = 0, Told(), set()
    for table in tables:
        file, rows = table.name, 0
        cells = Cells() if table.of_cells else None
        for line, row, form, new in _unfolded(table, PASSAGES):
            if new:
                names, with_ids = _passage_names(table, line, row, fields, form, ids)
                told.line(table, form, names, row)
            if form and form.distinct:
                key = digests(str(row.get("title") or ""), str(row.get("text") or ""))[0]
                if key in seen:
                    continue
                seen.add(key)
            count += 1
            rows += 1
            try:
                passage_id = str(count)
                if with_ids:
                    passage_id = needed(text_of(_value(row, names["passage_id"]), "id", cells), "id")
                title = text_of(_value(row, names["title"]), "title")
                text = needed(text_of(_value(row, names["text"]), "text"), "text")
            except Unusable as reason:
                report.add(file, line, str(reason))
                continue
            yield {"id": passage_id, "title": title, "text": text}
        report.check(file, rows)


def named_passages(tables: Iterable[Table], fields: Fields) -> Iterator[tuple[str, int, str, str]]:
    """File, line, id and the id as the file has it, of every passage that has one."""
    for table in tables:
        cells = Cells() if table.of_cells else None
        for line, row, form, _ in _unfolded(table, PASSAGES):
            value = _value(row, names_of(fields, ("passage_id",), form)["passage_id"])
            try:
                passage_id = text_of(value, "id", cells)
            except Unusable:
                continue
            if passage_id:
                yield table.name, line, passage_id, repr(value)


def _unfolded(table: Table, formats: tuple[Format, ...]) -> Iterator[tuple[int, dict, Format | None, bool]]:
    """(line, row, the file's format, whether it is the file's first row), nested rows one by one."""
    form, first, looked = None, True, False
    for line, row in table.read():
        if not looked:
            form, looked = recognised(row, formats), True
        for one in form.unfold(row) if form and form.unfold else (row,):
            yield line, one, form, first
            first = False


class Told:
    """Says once for all files of a kind what they were taken for."""

    def __init__(self):
        self.last = ""

    def line(self, table: Table, form: Format | None, names: Names, row: dict) -> None:
        used = {key: next((name for name in some if has(row, name)), None) for key, some in names.items()}
        fields = ", ".join(key if key == name else f"{key} from {name}" for key, name in used.items() if name)
        said = f"read as {form.name + ', ' if form else ''}{table.found + ', ' if table.found else ''}with {fields}"
        if said != self.last:
            print(f"{table.name}: {said}")
        self.last = said


def names_of(fields: Fields, keys: Iterable[str], form: Format | None = None) -> Names:
    """Field names to look for, by key of data.fields: what params.yaml says, else the format's, else the usual ones."""
    names = {}
    for key in keys:
        name = getattr(fields, key)
        if name != SHIPPED.get(key):
            names[key] = (name,)
        else:
            of_format = (form.fields[key],) if form and key in form.fields else ()
            names[key] = of_format + USUAL[key]
    return names


def columns_of(fields: Fields) -> set[str]:
    """Every field name that may be read: all that is needed of a Parquet file's columns."""
    paths = [name for names in names_of(fields, Fields.model_fields).values() for name in names]
    for form in (*QUESTIONS, *PASSAGES):
        paths += [*form.fields.values(), *(path for marks in form.marks for path in marks)]
    return {*paths, *(path.partition(".")[0] for path in paths), *UNFOLDED}


def _check_questions(
    table: Table, line: int, row: dict, fields: Fields, names: Names, form: Format | None, judged: bool
) -> bool:
    """Whether the file has answers. Raises ValueError for a field that is missing."""
    looked_for = dict(names)
    answered = any(has(row, name) for name in names["answers"]) or bool(form and "answers" in form.fields)
    if not answered and fields.answers is None and (judged or _value(row, names["positive_ids"]) is not None):
        del looked_for["answers"]
    if judged:
        del looked_for["positive_ids"]
    _check_names(table, line, row, fields, looked_for, form)
    return answered


def _passage_names(
    table: Table, line: int, row: dict, fields: Fields, form: Format | None, ids: PassageIds
) -> tuple[Names, bool]:
    names = names_of(fields, ("passage_id", "title", "text"), form)
    _check_names(table, line, row, fields, names, form)
    with_ids = any(has(row, name) for name in names["passage_id"])
    if not with_ids and not ids.dispensable():
        raise ValueError(
            f"{table.name}:{line}: no field {names['passage_id'][0]}, but questions name positive passages by id, e.g. "
            f"{ids.example}; there are: {', '.join(map(str, row))[:200]}; set data.fields.passage_id, or take the "
            "positives out of the questions where passages have no ids"
        )
    return names, with_ids


def _check_names(table: Table, line: int, row: dict, fields: Fields, names: Names, form: Format | None) -> None:
    for key, some in names.items():
        wanted = key in REQUIRED or getattr(fields, key) != SHIPPED.get(key)
        if not wanted or (form and form.fields.get(key) == some[0]) or any(has(row, name) for name in some):
            continue
        there = " ".join(", ".join(map(str, row)).split())[:200] or "none"
        there, remedy = f"there are: {there}", f"set data.fields.{key}"
        if table.of_cells:
            columns = "passage_columns" if key in ("passage_id", "title", "text") else "question_columns"
            remedy += f", or data.tables.{columns} where the first line is no header"
            if len(row) == 1:
                there += (
                    f", one column in {table.found}; is it separated by tabs or semicolons? set data.tables.delimiter"
                )
        raise ValueError(f"{table.name}:{line}: no field {' or '.join(some)}; {there}; {remedy}")


def _value(row: dict, names: tuple[str, ...]):
    present = (at(row, name) for name in names)
    return next((value for value in present if value not in (None, "", [])), None)
