"""Stage 1: questions and passages become Arrow files and, once and for all, token ids.

    python -m stages.prepare                        # writes data/prepared and data/tokens
    dvc exp run -S data.sample.passages=200         # a tiny one, with everything after it

Reads `seed`, `data`, `models.generator` (its tokenizer) and `lengths.context_tokens` from params.yaml.
"""

from pathlib import Path

from stages.params import load_params
from stages.runtime import run

PREPARED, TOKENS = Path("data/prepared"), Path("data/tokens")


def main() -> None:
    params = load_params()
    from stages import airports
    from stages.contexts import write_tokens
    from stages.corpus import PASSAGES, QUESTIONS, batches, read_rows, write_rows
    from stages.generators import load_tokenizer, passage_tokens

    tokenizer = load_tokenizer(params.models.generator)

    print(f"render the sample: {params.data.sample.passages} airports")
    passages, questions = airports.render_sample(**params.data.sample.model_dump(), seed=params.seed)
    write_rows(PREPARED / "passages.arrow", PASSAGES, passages)
    for split, rows in questions.items():
        write_rows(PREPARED / f"{split}.arrow", QUESTIONS, rows)

    # Longer rows would be cut when contexts are assembled: cutting here keeps the files small.
    limit = params.lengths.context_tokens
    rows = read_rows(PREPARED / "passages.arrow")
    chunks = (
        [
            ids[:limit]
            for ids in passage_tokens(tokenizer, [row["title"] for row in batch], [row["text"] for row in batch])
        ]
        for batch in batches(rows, 1000)
    )
    count = write_tokens(TOKENS, chunks, len(tokenizer))
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in questions.items())
    print(f"{count} passages; questions: {sizes}")


if __name__ == "__main__":
    run(main)
