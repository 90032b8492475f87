"""Train, validation and test questions: as given, or cut off the training questions by a seed."""

import random
from collections import defaultdict

from stages.params import Shares


def split_questions(given: dict[str, list[dict]], shares: Shares, seed: int) -> dict[str, list[dict]]:
    """Questions by split; a split that is not among `given` is a share of the training questions, drawn by the seed.

    Questions of the same text stay together: none is asked in two splits. The order within a split is the file's.
    Raises ValueError where a share or what it leaves is no question at all.
    """
    asked: dict[str, list[int]] = defaultdict(list)
    for row, question in enumerate(given["train"]):
        asked[" ".join(question["question"].lower().split())].append(row)
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
