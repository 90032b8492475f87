"""Stage 2b: what BM25 finds for every question, where retrieval is to be hybrid (retriever.hybrid_depth above 0).

    python -m stages.lexical                        # reads data/prepared, writes data/lexical
    dvc exp run -S retriever.hybrid_depth=64        # hybrid retrieval in training and evaluation

Words and their weights do not change while encoders learn: the hits are found once. The BM25 index itself is kept for
questions to come (python -m stages.ask).
"""

import shutil
from pathlib import Path

from stages.machine.devices import allowed_cores
from stages.machine.entry import run
from stages.machine.stage_params import stage_params

PREPARED, LEXICAL, METRICS = Path("data/prepared"), Path("data/lexical"), Path("metrics/lexical.json")
K1, B = 0.9, 0.4  # Anserini's for passages of a hundred words
RECALL_DEPTHS = (1, 5, 20)


def main() -> None:
    params = stage_params("lexical")
    depth = params.retriever.hybrid_depth
    work = LEXICAL.with_name(f"{LEXICAL.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    metrics = {"depth": depth}
    if depth:
        processes = params.runtime.threads or len(allowed_cores())
        data = params.data
        metrics |= find_hits(work, depth, processes, data.language, data.unanswerable, data.answers_are == "regex")

    from stages.bm25.hits_folder import DEPTH
    from stages.storage import manifest

    manifest.write_json(work / DEPTH, {"depth": depth, "language": params.data.language})
    manifest.record_folder(work)
    manifest.put_in_place(work, LEXICAL)
    manifest.write_metrics(METRICS, metrics)


def find_hits(
    folder: Path, depth: int, processes: int, language: str, unanswerable: str | None = None, patterns: bool = False
) -> dict[str, float]:
    """Writes every split's hits; returns how often a gold passage of the test questions is among the first k, in percent.

    Where none of them names one: how often an answer's words stand in the first k, as `answer_recall_at_k`.
    """
    import numpy as np

    from stages.bm25 import lexical_search
    from stages.corpus.answers import hits_with_answers, with_an_answer
    from stages.corpus.arrow import gold_rows, read_rows
    from stages.corpus.recall import recalls

    passages = read_rows(PREPARED / "passages.arrow")
    splits = {name: read_rows(PREPARED / f"{name}.arrow") for name in ("train", "validation", "test")}
    questions = [question for rows in splits.values() for question in rows["question"]]
    (folder / "index").mkdir()
    shards = lexical_search.shards_of(passages, K1, B, language=language, processes=processes)
    shards = lexical_search.save(shards, folder / "index")
    rows, scores = lexical_search.search(shards, questions, depth, processes, language)
    ends = np.cumsum([len(split) for split in splits.values()])[:-1]
    for name, some, their_scores in zip(splits, np.split(rows, ends), np.split(scores, ends), strict=True):
        np.save(folder / f"{name}_rows.npy", some.astype(np.int32))
        np.save(folder / f"{name}_scores.npy", their_scores)

    golds, found = gold_rows(splits["test"], passages), rows[ends[-1] :].tolist()
    depths = [k for k in RECALL_DEPTHS if k <= depth]
    if any(golds):
        return recalls([[row in gold for row in some] for gold, some in zip(golds, found, strict=True) if gold], depths)
    answers = with_an_answer(splits["test"]["answers"], unanswerable)
    rows = [found[row] for row in answers]
    return recalls(list(hits_with_answers(passages, rows, list(answers.values()), patterns)), depths, "answer_")


if __name__ == "__main__":
    run(main)
