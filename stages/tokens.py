"""Stage 1b: passages as the generator's tokens, once and for all.

python -m stages.tokens                         # reads data/prepared, writes data/tokens
dvc exp run -S models.generator=FOLDER          # another generator: tokenized again, not parsed again
"""

from pathlib import Path

from stages.machine.entry import run
from stages.machine.stage_params import stage_params

PREPARED, TOKENS = Path("data/prepared"), Path("data/tokens")


def main() -> None:
    params = stage_params("tokens")
    from stages.corpus.arrow import read_rows, replacing
    from stages.corpus.token_store import write_tokens
    from stages.generation.tokenizer import load_tokenizer, passage_tokens
    from stages.storage.model_folders import part_of
    from stages.storage.outside_files import find

    tokenizer = load_tokenizer(str(find(part_of(params.models.generator, "generator"))))
    passages = read_rows(PREPARED / "passages.arrow")
    # Longer rows would be cut when contexts are assembled: cutting here keeps the files small.
    limit = params.lengths.context_tokens
    chunks = (
        [ids[:limit] for ids in passage_tokens(tokenizer, batch["title"], batch["text"])]
        for batch in passages.iter(1000)
    )
    with replacing(TOKENS) as (tokens,):
        count = write_tokens(tokens, chunks, len(tokenizer))
    print(f"{count} passages tokenized")


if __name__ == "__main__":
    run(main)
