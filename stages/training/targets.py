"""What training and validation aim at: answers as questions have them, or what their patterns match."""

from pathlib import Path

from datasets import Dataset

from stages.corpus.arrow import own_rows, read_rows
from stages.corpus.patterns import first_match
from stages.settings.data import Data

PREPARED, POSITIVES = Path("data/prepared"), Path("data/positives")


def has_answers(questions: Dataset) -> bool:
    """Whether the questions have answers to train a generator on: all of them, or none (reading/splits.py)."""
    return any(map(len, questions["answers"]))


def aimed(data: Data, split: str, rows: dict[str, Dataset]) -> tuple[Dataset, list[int]]:
    """The questions of a split that have a text to aim at, as their `answers`, and their rows within the split.

    Where answers are patterns: what the first of them matches first in each passage of the question's own, as named or as
    the stage `positives` found it (Lewis et al. 2020, appendix D, take the most frequent match among those retrieved). Questions
    without such a passage are left out, in a line. Raises ValueError where none is left.
    """
    questions, file = rows[split], PREPARED / f"{split}.arrow"
    assert all(map(len, questions["answers"][:])), file
    if data.answers_are == "text":
        return questions, list(range(len(questions)))
    passages = rows["passages"]
    own = own_rows(questions, read_rows(POSITIVES / f"{split}.arrow"), passages)
    texts = [
        list(answers) if answers == [data.unanswerable] else matches(answers, passages[some])
        for answers, some in zip(questions["answers"], own, strict=True)
    ]
    kept = [row for row, some in enumerate(texts) if some]
    if not kept:
        raise ValueError(
            f"{file}: no answer pattern matches in a passage of its question's own, so that there is nothing to generate; name "
            "such passages in data.fields.positive_ids or raise data.positives.depth"
        )
    if len(kept) < len(texts):
        print(
            f"{len(texts) - len(kept)} of {len(texts)} {split} questions have no passage with a match and are left out"
        )
    chosen = questions.select(kept)
    return chosen.remove_columns("answers").add_column("answers", [texts[row] for row in kept]), kept


def matches(patterns: list[str], passages: dict[str, list[str]]) -> list[str]:
    """The different texts that match, one a passage; of the title where the text has none."""
    found = [
        first_match(patterns, text) or first_match(patterns, title)
        for title, text in zip(passages["title"], passages["text"], strict=True)
    ]
    return list(dict.fromkeys(filter(None, found)))
