"""Stage 1c: positives for the questions that name none, where a warm-up or joint training (train.positives_weight) reads them.

    python -m stages.positives                      # reads data/prepared, writes data/positives
    dvc exp run -S data.positives.depth=100         # look further down

The best BM25 hit that contains an answer is taken. Test questions keep what they came with, and so does evaluation on any
split: recall and the oracle line are measured on passages that were given, never on what a search found.
"""

from pathlib import Path

from stages.machine.entry import run
from stages.machine.stage_params import stage_params

PREPARED, POSITIVES = Path("data/prepared"), Path("data/positives")
SPLITS = ("train", "validation")
FEW = 0.1  # share of the questions with a positive below which something is probably wrong


def main() -> None:
    params = stage_params("positives")
    from stages.corpus.arrow import FOUND, read_rows, replacing, write_rows

    settings, retriever = params.data.positives, params.retriever
    reranker_learns = params.models.reranker and retriever.reranker.steps
    # Training takes from them what a pattern matches.
    patterns = params.data.answers_are == "regex"
    read = retriever.steps or retriever.hard_negatives.count or reranker_learns or params.train.positives_weight
    wanted = settings.depth and (read or patterns)
    with replacing(POSITIVES) as (folder,):
        for split in SPLITS:
            rows = search(split, params.data, params.runtime) if wanted else []
            write_rows(folder / f"{split}.arrow", FOUND, rows)
    if not wanted:
        print("no positives are searched for: nothing reads them, or data.positives.depth is 0")
    else:
        if reranker_learns:
            check_some_train()
        counts = ", ".join(f"{len(read_rows(POSITIVES / f'{split}.arrow'))} {split}" for split in SPLITS)
        print(f"questions with a positive by answer: {counts}")


def check_some_train() -> None:
    """Raises ValueError where the reranker's warm-up would find nothing to read, before passages are encoded and indexed."""
    from stages.corpus.arrow import own_rows, read_rows

    folders, passages = (PREPARED, POSITIVES), read_rows(PREPARED / "passages.arrow")
    questions, found = (read_rows(folder / "train.arrow") for folder in folders)
    if not any(own_rows(questions, found, passages)):
        raise ValueError(
            f"{PREPARED / 'train.arrow'}: no question has a positive passage, the reranker's warm-up needs some; name them in "
            "data.fields.positive_ids, raise data.positives.depth to find them by answer, or set retriever.reranker.steps to 0"
        )


def search(split: str, data, runtime) -> list[dict]:
    """{question, passage} rows of the questions that get a positive, at most data.positives.questions searched for."""
    from stages.bm25.positives import find_positives
    from stages.corpus.answers import with_an_answer
    from stages.corpus.arrow import read_rows
    from stages.machine.devices import free_cores

    questions = read_rows(PREPARED / f"{split}.arrow")
    settings, language, patterns = data.positives, data.language, data.answers_are == "regex"
    named = questions["positive_ids"][:]
    answered = with_an_answer(questions["answers"], data.unanswerable)
    lacking = [row for row in answered if not named[row]][: settings.questions]
    if not lacking:
        return []
    passages, chosen = read_rows(PREPARED / "passages.arrow"), questions.select(lacking)
    processes = runtime.threads or free_cores()
    asked, answers = chosen["question"][:], chosen["answers"][:]
    found = find_positives(passages, asked, answers, settings.depth, processes, language, patterns).tolist()
    count = sum(hit >= 0 for hit in found)
    if count < FEW * len(found):
        row = found.index(-1)
        print(
            f"warning: an answer stands in what BM25 finds for {count} of {len(found)} {split} questions, not for e.g. "
            f"{asked[row][:100]!r} with {answers[row][:3]}; are answers worded as in the passages, is data.language right?"
        )
    return [{"question": row, "passage": hit} for row, hit in zip(lacking, found, strict=True) if hit >= 0]


if __name__ == "__main__":
    run(main)
