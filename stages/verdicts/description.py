"""A run in a few lines of Markdown, as MLflow shows them: losses, scores, verdicts."""

import math

from stages.verdicts.sign import Verdicts


def training_text(metrics: dict[str, float], verdicts: Verdicts) -> str:
    """Of a training's summary, which has no loss that was not finite."""
    names = ("val_loss_per_sequence", "val_loss_before_training", "last_val_loss_per_sequence")
    kept, before, last = (metrics.get(name, math.nan) for name in names)
    return (
        f"Validation loss {kept:.3f} nats a question at step {metrics['kept_step']:.0f}, "
        f"which is kept ({before:.3f} before training, {last:.3f} at the end); {metrics['steps']:.0f} steps, "
        f"{metrics['questions_seen']:.0f} questions, {metrics['training_seconds']:.0f} s.\n\n```\n{verdicts.text}\n```"
    )


def evaluation_text(metrics: dict[str, float], split: str, verdicts: Verdicts) -> str:
    """Of an evaluation; what was not measured is left out."""
    names = {
        "recall_at_1": "recall@1", "recall_at_5": "recall@5", "mrr_at_10": "MRR@10", "ndcg_at_10": "nDCG@10",
        "answer_recall_at_5": "answer recall@5", "has_ans_f1": "F1 of those with an answer", "no_ans_f1": "of those without",
        "dense_recall_at_5": "recall@5 of dense search alone", "bm25_recall_at_5": "recall@5 of BM25 alone",
        "oracle_em": "EM with the gold passage", "closed_book_em": "EM without a passage",
    }  # fmt: skip
    more = ", ".join(f"{said} {metrics[name]:.1f}" for name, said in names.items() if name in metrics)
    answers = f"EM {metrics['em']:.1f}, F1 {metrics['f1']:.1f}" if "em" in metrics else "Retrieval alone"
    return f"{answers} on {metrics['questions']:.0f} {split} questions; {more}.\n\n```\n{verdicts.text}\n```"
