"""Stage 5: retrieve, generate, score. EM, F1 and recall go to metrics/eval.json and into the training's MLflow run.

    python -m stages.evaluate                       # reads data/model, index, tokens, prepared
    dvc exp run -S evaluate.num_samples=20 -S evaluate.decoding=fast

data/predictions/predictions.jsonl holds a row a question with its kind of error and its passages, whole. Of questions
without answers the retrieval alone is measured.
"""

import json
import time
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import root_folder, run
from stages.machine.stage_params import stage_params

DATA, MODEL = Path("data"), Path("data/model")
PREPARED, LEXICAL = Path("data/prepared"), Path("data/lexical")
PREDICTIONS, METRICS = Path("data/predictions"), Path("metrics/eval.json")
TABLE_ROWS = 500
FACTS = ("questions", "questions_with_gold_passage", "n_docs", "passages")  # what was evaluated, not how well it did


def main() -> None:
    params = stage_params("evaluate")
    device = prepare_torch(params.runtime)
    from stages.bm25.hits import read_hits
    from stages.corpus.arrow import gold_grades, read_rows, replacing
    from stages.evaluation.answering import evaluate
    from stages.evaluation.errors import table_row
    from stages.evaluation.retrieval import evaluate_retrieval
    from stages.evaluation.scoring import Rules
    from stages.rag.opening import open_trained
    from stages.storage import manifest
    from stages.storage.checkpoints import digest
    from stages.storage.leftovers import drop_finished
    from stages.tracking.records import flatten
    from stages.tracking.runs import reopen_trained
    from stages.verdicts.description import evaluation_text
    from stages.verdicts.of_evaluation import evaluation_signs

    settings, started = params.evaluate, time.time()
    rag = open_trained(params, device, DATA, MODEL)
    root = root_folder()
    trained = json.loads((MODEL / "run.json").read_text(encoding="utf-8"))
    drop_finished(root, trained["fingerprint"])
    passages = read_rows(PREPARED / "passages.arrow")
    questions = read_rows(PREPARED / f"{settings.split}.arrow")
    answered = any(map(len, questions["answers"]))
    hits = read_hits(LEXICAL, settings.split, params.retriever.hybrid_depth, len(questions), len(passages))
    if settings.num_samples:
        questions = questions.select(range(min(settings.num_samples, len(questions))))
        hits = hits and hits.select(slice(len(questions)))

    golds = gold_grades(questions, passages)
    if answered:
        rules = Rules(params.data.language, params.data.unanswerable, params.data.answers_are == "regex")
        metrics, predictions = evaluate(
            rag, questions, passages, golds, settings, params.recipe.marginalization, hits, rules, params.recipe.reading
        )
    else:
        metrics, predictions = evaluate_retrieval(rag, questions, passages, golds, settings, hits)
    verdicts = evaluation_signs(metrics, params.signs)

    manifest.write_metrics(METRICS, metrics)
    with replacing(PREDICTIONS) as (made,), open(made / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)

    with reopen_trained(root, trained) as tracker:
        scores = {f"{settings.split}/{name}": value for name, value in metrics.items() if name not in FACTS}
        facts = {name: metrics[name] for name in FACTS if name in metrics}
        tracker.log_metrics(scores, of_model=True)
        tracker.set_tags({**verdicts.tags, **flatten({"evaluate": {**settings.model_dump(), **facts}})})
        tracker.log_text(verdicts.text, "signs-evaluate.txt")
        tracker.describe(f"{evaluation_text(metrics, settings.split, verdicts)}\n\n{trained['description']}")
        way = settings.decoding if params.recipe.reading == "each" else params.recipe.reading
        name = f"{settings.split}: {way}, {settings.num_beams} beams" if answered else settings.split
        # The same answers under the same settings are the same evaluation, however often a killed command was repeated.
        key = f"{settings.split}-{way}-{settings.num_beams}-{digest(PREDICTIONS / 'predictions.jsonl')}"
        tracker.log_child(
            key, name, started, {"evaluate": {**settings.model_dump(), **facts}}, scores, verdicts.tags,
            {"signs-evaluate.txt": verdicts.text},
        )  # fmt: skip
        tracker.log_table([table_row(row) for row in predictions[:TABLE_ROWS]], "predictions.json")

    print(verdicts.text)
    print(summary(metrics, settings.split))


def summary(metrics: dict[str, float], split: str) -> str:
    """One line; where no question names a gold passage, recall is that of the answers' words."""
    if "em" not in metrics:
        return (
            f"recall@1 {metrics['recall_at_1']:.1f}, recall@20 {metrics['recall_at_20']:.1f}, MRR@10 "
            f"{metrics['mrr_at_10']:.1f}, nDCG@10 {metrics['ndcg_at_10']:.1f} on "
            f"{metrics['questions_with_gold_passage']} {split} questions without answers"
        )
    kind = "recall" if "recall_at_5" in metrics else "answer_recall"
    # Unanswerable questions alone have neither.
    recall = f", {kind.replace('_', ' ')}@5 {metrics[f'{kind}_at_5']:.1f}" if f"{kind}_at_5" in metrics else ""
    oracle = f"gold passage given: EM {metrics['oracle_em']:.1f}, " if "oracle_em" in metrics else ""
    return (
        f"EM {metrics['em']:.1f}, F1 {metrics['f1']:.1f}{recall} on "
        f"{metrics['questions']} {split} questions ({oracle}no passage: {metrics['closed_book_em']:.1f})"
    )


if __name__ == "__main__":
    run(main)
