"""Verdicts on an evaluation: is EM what it should be, and does the generator read its passages."""

from stages.params import Signs
from stages.verdicts.sign import Sign, Verdicts


def evaluation_signs(metrics: dict[str, float], limits: Signs) -> Verdicts:
    """Verdicts from an evaluation's metrics."""
    em = metrics["em"]
    return Verdicts(
        [
            Sign(
                "em", em >= limits.exact_match, f"EM {em:.1f} (at least {limits.exact_match:g})",
                "compare oracle_em (reading) with recall_at_5 (retrieval) in metrics/eval.json: the lower one is the cause",
            ),
            Sign(
                "reads_passages", metrics["oracle_em"] > metrics["closed_book_em"],
                f"EM with the gold passage {metrics['oracle_em']:.1f}, with none {metrics['closed_book_em']:.1f}",
                "the generator ignores its passages: train longer, or start from another generator",
            ),
        ]
    )  # fmt: skip
