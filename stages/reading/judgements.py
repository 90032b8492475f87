"""Relevance judgements: which passages answer a question, by ids (TREC's qrels, MS MARCO's, BEIR's)."""

import math
from collections.abc import Iterator

from stages.reading.files import COLUMNS, TEXT, open_table
from stages.reading.formats import at
from stages.reading.text_files import lines
from stages.reading.values import Positive, Unusable, text_of
from stages.storage.outside_files import OutsideFile, find_files

QUESTION, PASSAGE, SCORE = ("query-id", "query_id", "qid"), ("corpus-id", "corpus_id", "docid", "doc_id"), ("score",)
ANY_END = ("",)  # qrels go by any extension


def read_judgements(names: list[str], key: str) -> dict[str, list[Positive]]:
    """Positives by question id: the passages with a score above 0, their grade.

    Read are TREC's four columns (question, 0, passage, score), BEIR's three under a header or not, and such rows as JSON
    lines, Parquet or Arrow. Raises ValueError for lines that are no judgement.
    """
    judged: dict[str, dict[str, Positive]] = {}
    for file in find_files(names, key, ANY_END):
        for line, question, passage, score in _judgements(file, key):
            try:
                ids, grade = (text_of(question, "id"), text_of(passage, "id")), float(score)
            except (Unusable, ValueError, TypeError):
                ids, grade = ("", ""), 0.0
            if not all(ids) or not math.isfinite(grade):
                raise ValueError(
                    f"{file.path}:{line}: no judgement; a line is question, 0, passage, score (TREC) or question, passage, "
                    "score (BEIR)"
                )
            if grade > 0:
                judged.setdefault(ids[0], {})[ids[1]] = Positive((ids[1],), (), repr(passage), grade=grade)
    if not judged:
        raise ValueError(f"{key}: {', '.join(names)} holds no judgement with a score above 0")
    return {question: list(passages.values()) for question, passages in judged.items()}


def _judgements(file: OutsideFile, key: str) -> Iterator[tuple[int, object, object, object]]:
    if file.path.name.lower().removesuffix(".gz").endswith((*TEXT, *COLUMNS)):
        for line, row in open_table(file, key, {*QUESTION, *PASSAGE, *SCORE}).read():
            yield (
                line,
                *(next((at(row, name) for name in some if name in row), None) for some in (QUESTION, PASSAGE, SCORE)),
            )
        return
    for line, text in lines(file.path):
        parts = text.replace(",", " ").split() if file.path.suffix == ".csv" else text.split()
        if parts and not (line == 1 and not _is_number(parts[-1])):
            yield line, parts[0], parts[-2] if len(parts) in (3, 4) else None, parts[-1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
