"""Train, validation and test questions: as given, or cut off the training questions by a seed; what of them cannot go
together."""

import random
from collections import defaultdict

from stages.corpus.answers import normalize_answer
from stages.settings.data import Shares


def key_of(question: str) -> str:
    """What two spellings of one question have in common: words without articles and ASCII punctuation, in lower case."""
    return normalize_answer(question) or " ".join(question.lower().split())


def leaks(questions: dict[str, list[dict]]) -> list[str]:
    """A warning a pair of splits that share questions: what is trained or chosen by says little of what is measured."""
    keys = {split: [key_of(row["question"]) for row in rows] for split, rows in questions.items()}
    lines = []
    for measured, seen in (("validation", "train"), ("test", "train"), ("test", "validation")):
        known = set(keys[seen])
        shared = [row for row, key in zip(questions[measured], keys[measured], strict=True) if key in known]
        if shared:
            lines.append(
                f"warning: {len(shared)} of {len(keys[measured])} {measured} questions are {seen} questions too, the first is "
                f"{shared[0]['file']}:{shared[0]['line']}; scores on them are no scores on new questions"
            )
    return lines


def split_questions(given: dict[str, list[dict]], shares: Shares, seed: int) -> dict[str, list[dict]]:
    """Questions by split; a split that is not among `given` is a share of the training questions, drawn by the seed.

    Questions of the same text stay together: none is asked in two splits. The order within a split is the file's.
    Raises ValueError where a share or what it leaves is no question at all.
    """
    asked: dict[str, list[int]] = defaultdict(list)
    for row, question in enumerate(given["train"]):
        asked[key_of(question["question"])].append(row)
    groups = list(asked.values())
    random.Random(seed).shuffle(groups)

    splits, total = dict(given), len(given["train"])
    for split in ("test", "validation"):
        if split in given:
            continue
        share = getattr(shares, split)
        taken: list[int] = []
        while groups and len(taken) < round(share * total):
            taken += groups.pop()
        if not taken:
            raise ValueError(
                f"data.shares.{split}: {share:g} of {total} training questions ({len(asked)} different ones) leaves none; "
                f"raise it or set data.files.{split}"
            )
        splits[split] = [given["train"][row] for row in sorted(taken)]
    splits["train"] = [given["train"][row] for row in sorted(row for group in groups for row in group)]
    if not splits["train"]:
        raise ValueError(f"data.shares: nothing is left of {total} training questions; lower the shares")
    return {split: splits[split] for split in ("train", "validation", "test")}


def check_answers(questions: dict[str, list[dict]]) -> None:
    """Raises ValueError where questions without answers stand beside answered ones of their split, or validation's beside
    answered training questions: a generator needs an answer of each to learn, to be validated and to be scored.

    Where no training question has any, the retriever alone learns; a test split without any measures it alone.
    """
    without = {split: [row for row in rows if not row["answers"]] for split, rows in questions.items()}
    learns = len(without["train"]) < len(questions["train"])
    for split, rows in questions.items():
        if not without[split]:
            continue
        if len(without[split]) < len(rows):
            beside = "the others have some"
        elif split == "validation" and learns:
            beside = "the training questions have some"
        else:
            continue
        first = without[split][0]
        raise ValueError(
            f"{first['file']}:{first['line']}: {len(without[split])} of {len(rows)} {split} questions have no answer, this one "
            f"first, while {beside}, and a generator needs them all; leave them out of the files, set data.unanswerable, or take "
            "the answers out of all train, validation and test questions to train and measure retrieval alone"
        )
