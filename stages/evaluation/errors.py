"""What went wrong with an answer: was it read wrong, ranked wrong, or not found."""

import math

NEAR = 0.5  # F1 from which a wrong answer is near
KINDS = {
    "right": "EM is 1",
    "near": f"F1 of {NEAR} and more: a word too many or too few",
    "read wrong": "the gold passage came first, the answer is another",
    "ranked wrong": "the gold passage was read, behind others",
    "not found": "the gold passage was not among those read",
}
FOUND_KINDS = {  # where questions have no answers
    "found first": "a gold passage came first",
    "found behind others": "a gold passage is among those that a reader would get",
    "not found": "no gold passage is among these",
    "not judged": "the question names no passage of the corpus",
}


def rank_of(flags: list[bool]) -> int | None:
    """The place, from 1, of the first passage that is flagged; None: there is none."""
    return flags.index(True) + 1 if any(flags) else None


def kind_of(em: float, f1: float, rank: int | None, n_docs: int) -> str:
    """One of KINDS. `rank`: of the gold passage, or of the first with an answer where no gold passage is known."""
    if em:
        return "right"
    if f1 >= NEAR:
        return "near"
    if rank is None or rank > n_docs:
        return "not found"
    return "read wrong" if rank == 1 else "ranked wrong"


def found_kind_of(rank: int | None, n_docs: int) -> str:
    """One of FOUND_KINDS, of a question that names a gold passage. `rank`: of the first such."""
    if rank is None or rank > n_docs:
        return "not found"
    return "found first" if rank == 1 else "found behind others"


def table_row(row: dict) -> dict:
    """A row of the predictions file as one of a table: the passage that the answer came from in place of all of them."""
    best = max(row["passages"], key=lambda passage: passage["posterior"], default={})
    return {
        "question": row["question"],
        "answers": " | ".join(row["answers"]),
        "prediction": row["prediction"],
        "kind": row["kind"],
        "em": row["em"],
        "f1": row["f1"],
        "probability": None if row["log_prob"] is None else math.exp(row["log_prob"]),
        "gold_rank": row["gold_rank"],
        "answer_rank": row["answer_rank"],
        **{f"best_passage_{name}": best.get(name) for name in ("title", "text", "prior", "posterior")},
    }
