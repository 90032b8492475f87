"""The formats of the field, by the form of their rows: what their fields are called, and how nested ones unfold.

data/README.md shows each with an excerpt; the tests run that table.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

HTML = re.compile(r"</?[A-Za-z][^>]*>")
NO_ANSWER = "No Answer Present."  # MS MARCO's


class Format(NamedTuple):
    """What a file's first row shows and what follows from it."""

    name: str
    marks: tuple[tuple[str, ...], ...]  # paths that a row of the format has, one tuple or another
    fields: dict[str, str] = {}  # what its rows, unfolded, call things, as data.fields would say
    unfold: Callable[[dict], Iterator[dict]] | None = None
    sparse: bool = False  # questions without an answer are part of it
    distinct: bool = False  # passages come again with each of their questions


def at(row, path: str):
    """What stands under a key or, where no key is called so, a dotted path; lists on the way are gone through.

    None where nothing is there.
    """
    if isinstance(row, dict) and path in row:
        return row[path]
    here = row
    parts = path.split(".")
    for number, part in enumerate(parts):
        if isinstance(here, list) and not part.isdecimal():
            rest = ".".join(parts[number:])
            found = [at(item, rest) for item in here]
            return [one for some in found if some is not None for one in (some if isinstance(some, list) else [some])]
        if isinstance(here, list):
            here = here[int(part)] if int(part) < len(here) else None
        elif isinstance(here, dict) and part in here:
            here = here[part]
        else:
            return None
    return here


def has(row, path: str) -> bool:
    """Whether the row has the key or the path, whatever stands there."""
    if isinstance(row, dict) and path in row:
        return True
    first, _, rest = path.partition(".")
    if isinstance(row, list):
        return not row or any(has(item, path) for item in row)
    return bool(rest) and isinstance(row, dict) and first in row and has(row[first], rest)


def recognised(row: dict, formats: Iterable[Format]) -> Format | None:
    """The first format whose marks the row bears."""
    return next((some for some in formats if any(all(has(row, path) for path in marks) for marks in some.marks)), None)


def _articles(row: dict) -> Iterator[tuple[str, dict]]:
    """(title, paragraph) of SQuAD's nested form, of one article or of a whole file."""
    for article in _dicts(row.get("data", [row])):
        for paragraph in _dicts(article.get("paragraphs")):
            yield article.get("title"), paragraph


def _dicts(value) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _squad(row: dict) -> Iterator[dict]:
    for title, paragraph in _articles(row):
        for asked in _dicts(paragraph.get("qas")):
            flat = asked | {"title": title, "context": paragraph.get("context"), "answers": at(asked, "answers.text")}
            yield from _squad_rows(flat)


def _squad_rows(row: dict) -> Iterator[dict]:
    yield row | {"positive_ids": [{"title": row.get("title"), "text": row.get("context")}]}


def _squad_contexts(row: dict) -> Iterator[dict]:
    for title, paragraph in _articles(row):
        yield {"title": title, "text": paragraph.get("context")}


def _mrqa(row: dict) -> Iterator[dict]:
    for asked in _dicts(row.get("qas")):  # the file's first row, a header, has none
        yield asked | {"positive_ids": [{"text": row.get("context")}]}


def _context(row: dict) -> Iterator[dict]:
    if "header" not in row:
        yield {"title": row.get("title"), "text": row.get("context")}


def _natural_question(row: dict) -> Iterator[dict]:
    words = row.get("document_text")
    words = words.split(" ") if isinstance(words, str) else at(row, "document_tokens.token") or []
    answers = []
    for annotation in _dicts(row.get("annotations")):
        for span in _dicts(annotation.get("short_answers")):
            first, last = span.get("start_token"), span.get("end_token")
            if isinstance(first, int) and isinstance(last, int) and 0 <= first < last:
                answers.append(" ".join(word for word in words[first:last] if not HTML.fullmatch(str(word))))
        answers += _yes_or_no(annotation.get("yes_no_answer"))
    yield row | {"answers": answers}


def _natural_question_of_the_hub(row: dict) -> Iterator[dict]:
    said = at(row, "annotations.yes_no_answer")
    said = said if isinstance(said, list) else [said]
    answers = at(row, "annotations.short_answers.text") or []
    yield row | {"answers": [*answers, *(word for one in said for word in _yes_or_no(one))]}


def _yes_or_no(value) -> list[str]:
    known = {"YES": "yes", "NO": "no", "1": "yes", "0": "no"}
    return [known[str(value)]] if str(value) in known else []


def _ms_marco(row: dict) -> Iterator[dict]:
    texts, selected = at(row, "passages.passage_text") or [], at(row, "passages.is_selected") or []
    answers = row.get("answers")
    answers = [one for one in answers if one != NO_ANSWER] if isinstance(answers, list) else answers
    yield row | {
        "answers": answers,
        "positive_ids": [{"text": text} for text, one in zip(texts, selected, strict=False) if one],
    }


def _trivia(row: dict) -> Iterator[dict]:
    answer = {key.lower(): value for key, value in (row.get("answer") or row.get("Answer") or {}).items()}
    yield row | {"answers": [answer.get("value"), *(answer.get("aliases") or [])]}


def _kilt_page(row: dict) -> Iterator[dict]:
    title, paragraphs = row.get("wikipedia_title"), row.get("text")
    if isinstance(paragraphs, dict):
        paragraphs = paragraphs.get("paragraph")
    if not isinstance(paragraphs, list):
        yield row
        return
    for number, text in enumerate(paragraphs):
        if isinstance(text, str) and text.strip() not in ("", title) and not text.startswith("Section::::"):
            page = row.get("wikipedia_id", row.get("_id"))
            yield {"id": f"{page}_{number}", "title": title, "text": text}


SQUAD, SQUAD_ROWS = (("paragraphs",), ("data",)), (("question", "context", "answers.text"),)
QUESTIONS = (
    Format("SQuAD", SQUAD, {}, _squad, sparse=True),
    Format("MRQA", (("context", "qas"), ("header",)), {"id": "qid"}, _mrqa),
    Format("SQuAD's rows", SQUAD_ROWS, {"answers": "answers.text"}, _squad_rows, sparse=True),
    Format("DPR's training questions", (("question", "positive_ctxs"),), {"positive_ids": "positive_ctxs"}),
    Format("FiD's questions, without their retrieved ctxs", (("question", "ctxs"),)),
    Format(
        "KILT", (("input", "output"),),
        {"question": "input", "answers": "output.answer", "positive_ids": "output.provenance"},
    ),
    Format(
        "Natural Questions, simplified", (("question_text", "annotations"),),
        {"question": "question_text", "id": "example_id"}, _natural_question, sparse=True,
    ),
    Format(
        "Natural Questions", (("question.text", "annotations.short_answers"),), {"question": "question.text"},
        _natural_question_of_the_hub, sparse=True,
    ),
    Format(
        "MS MARCO's rows", (("query", "passages.passage_text"),), {"question": "query", "id": "query_id"}, _ms_marco,
        sparse=True,
    ),
    Format("TriviaQA", (("question", "answer.aliases"),), {"id": "question_id"}, _trivia),
    Format("TriviaQA", (("Question", "Answer.Aliases"),), {"question": "Question", "id": "QuestionId"}, _trivia),
    Format("FlashRAG", (("question", "golden_answers"),), {"answers": "golden_answers"}),
    Format("queries (BEIR, MS MARCO)", (("_id", "text"),), {"question": "text", "id": "_id"}),
)  # fmt: skip
PASSAGES = (
    Format("SQuAD's contexts", SQUAD, {}, _squad_contexts, distinct=True),
    Format("MRQA's contexts", (("context", "qas"), ("header",)), {}, _context, distinct=True),
    Format("SQuAD's contexts", SQUAD_ROWS, {}, _context, distinct=True),
    Format("KILT's pages, a passage a paragraph", (("wikipedia_title", "text"),), {}, _kilt_page),
)
