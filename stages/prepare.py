"""Stage 1: questions and passages become Arrow files.

python -m stages.prepare                        # writes data/prepared and data/unusable.jsonl
dvc exp run -S data.sample.passages=200         # a tiny one, with everything after it
dvc exp run -S data.source=files -S data.files.train=questions.jsonl -S data.files.passages=passages.tsv.gz
"""

from pathlib import Path

from stages.machine.entry import run
from stages.machine.stage_params import stage_params

PREPARED, UNUSABLE = Path("data/prepared"), Path("data/unusable.jsonl")


def main() -> None:
    params = stage_params("prepare")
    from stages.corpus.arrow import PASSAGES, QUESTIONS, read_rows, replacing, write_rows
    from stages.reading import airports, files, natural_questions
    from stages.reading.judgements import read_judgements
    from stages.reading.passage_ids import PassageIds, settle
    from stages.reading.rows import columns_of, named_passages, read_passages, read_questions
    from stages.reading.splits import check_answers, leaks, split_questions
    from stages.reading.unusable_rows import Report

    data = params.data
    with replacing(PREPARED) as (prepared,), Report(UNUSABLE, data.max_unusable) as report:
        if data.source == "sample":
            print(f"render the sample: {data.sample.passages} airports")
            passages, questions = airports.render_sample(**data.sample.model_dump(), seed=params.seed)
            write_rows(prepared / "passages.arrow", PASSAGES, passages)
        else:
            tables = (
                files.open_tables(data.files, data.qrels, data.tables, columns_of(data.fields))
                if data.source == "files"
                else natural_questions.open_tables(data.nq)
            )
            corpus = tables.pop("passages")
            given = {}
            for split, its_files in tables.items():
                qrels = getattr(data.qrels, split) if data.source == "files" else None
                given[split] = read_questions(
                    its_files, data.fields, split, report, separator=data.tables.separator, unanswerable=data.unanswerable,
                    patterns=data.answers_are == "regex",
                    judged=read_judgements(qrels, f"data.qrels.{split}") if qrels else None,
                )  # fmt: skip
            questions = split_questions(given, data.shares, params.seed)
            check_answers(questions)
            for line in leaks(questions):
                print(line)
            every = [question for rows in questions.values() for question in rows]

            ids = PassageIds(positive for question in every for positive in question["positives"])
            passages = ids.watch(read_passages(corpus, data.fields, ids, report))
            write_rows(prepared / "passages.arrow", PASSAGES, passages)
            ids.check_unique(named_passages(corpus, data.fields))
            settle(every, ids, report)

            if report.counts:
                print(f"{report.counts.total()} rows cannot be used, listed in {UNUSABLE}")
        for split, rows in questions.items():
            if not any(row["answers"] for row in rows):
                print(f"the {split} questions have no answers: they train and measure retrieval alone")
            write_rows(prepared / f"{split}.arrow", QUESTIONS, rows)
    count = len(read_rows(PREPARED / "passages.arrow"))
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in questions.items())
    print(f"{count} passages; questions: {sizes}")


if __name__ == "__main__":
    run(main)
