"""Verdicts on an evaluation: is EM what it should be, and does the generator read its passages."""

from stages.settings.runs import Signs
from stages.verdicts.sign import Sign, Verdicts


def evaluation_signs(metrics: dict[str, float], limits: Signs) -> Verdicts:
    """Verdicts from an evaluation's metrics.

    Whether passages are read shows on the questions that name a gold passage, with it and without; where none does, on
    nothing. Of questions without answers only whether passages were found is judged.
    """
    signs = _of_answers(metrics, limits) if "em" in metrics else [Sign("em", None, "EM: no question has an answer", "")]
    if count := metrics.get("questions_without_passages"):
        answered = " and were answered from themselves alone" if "em" in metrics else ""
        signs.append(
            Sign(
                "finds_passages", False,
                f"{count} of {metrics['questions']} questions found no passage{answered}",
                "raise index.nprobe or index.ef_search, or take index.factory: Flat",
            )
        )  # fmt: skip
    return Verdicts(signs)


def _of_answers(metrics: dict[str, float], limits: Signs) -> list[Sign]:
    em = metrics["em"]
    recall = "recall_at_5" if "recall_at_5" in metrics else "answer_recall_at_5"
    causes = (
        f"compare oracle_em (reading) with {recall} (retrieval) in metrics/eval.json: the lower one is the cause"
        if "oracle_em" in metrics
        else f"look at {recall} (retrieval) in metrics/eval.json: where it is high, reading is the cause"
    )
    signs = [Sign("em", em >= limits.exact_match, f"EM {em:.1f} (at least {limits.exact_match:g})", causes)]
    remedy = "the generator ignores its passages: train longer, or start from another generator"
    if "oracle_em" in metrics:
        given, closed = metrics["oracle_em"], metrics["closed_book_em_of_oracle_questions"]
        finding = f"EM with the gold passage {given:.1f}, with none {closed:.1f}"
        signs.append(Sign("reads_passages", given > closed, finding, remedy))
    else:
        signs.append(Sign("reads_passages", None, "EM with the gold passage: no question names one", remedy))
    return signs
