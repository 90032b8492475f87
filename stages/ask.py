"""Ask the trained model a question and see which passages the answer came from.

    python -m stages.ask "Which country is Kangerlussuaq Airport in?"
    python -m stages.ask                            # reads questions from standard input, one a line

Needs the outputs of `dvc repro`. `prior` is how much the retriever trusts a passage, `posterior` how much of the
answer's probability came from it.
"""

import argparse
import os
import sys
import unicodedata
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.params import load_params

PREPARED, TOKENS, LEXICAL = Path("data/prepared"), Path("data/tokens"), Path("data/lexical")
VECTORS, INDEX, MODEL = Path("data/vectors"), Path("data/index"), Path("data/model")
RERANKER = Path("data/reranker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="*", help="without one, questions are read from standard input")
    arguments = parser.parse_args()
    params = load_params()
    device = prepare_torch(params.runtime)
    from transformers.utils import logging

    logging.disable_progress_bar()
    from stages.bm25.hits import find_hits
    from stages.corpus.arrow import row_reader
    from stages.evaluation.answering import answer, passages_of, retrieve
    from stages.generation import marginalization
    from stages.rag.folder import load_rag_parts
    from stages.rag.model import open_rag_on
    from stages.rag.prior import load_prior
    from stages.reading.text_files import decoded
    from stages.search.passage_index import index_folders
    from stages.search.reranking import load_reranker

    passages = row_reader(PREPARED / "passages.arrow")
    rag = open_rag_on(
        load_rag_parts(MODEL), index_folders(MODEL, INDEX, VECTORS), TOKENS, params, device,
        load_prior(MODEL, params.retriever),
        reranker=load_reranker(RERANKER, params.models.reranker, MODEL / "reranker"),
    )  # fmt: skip
    rag.eval()

    def show(question: str) -> None:
        question = unicodedata.normalize("NFC", question)
        hits = find_hits(LEXICAL, [question], params.retriever.hybrid_depth)
        examples = rag.examples([question], [""], hits).to(device)
        found = retrieve(rag, examples, rag.n_docs, 1)
        prior = marginalization.log_prior(found.scores)
        marginal = params.recipe.marginalization
        given = next(answer(rag, examples, found.rows, prior, params.evaluate, marginal, ""))
        if (found.rows < 0).all():
            print("no passage found: answered from the question alone")
        texts = [passages(row) if row >= 0 else None for row in found.rows[0].tolist()]
        print(f"{given.text}    (probability {2.718281828**given.log_prob:.2f})\n\nprior  posterior  passage")
        for passage, text in zip(passages_of(given, prior[0], texts), filter(None, texts), strict=True):
            shown = text["text"] if len(text["text"]) <= 110 else text["text"][:107] + "..."
            print(f"{passage['prior']:5.2f}  {passage['posterior']:9.2f}  {passage['title']}: {shown}")

    if arguments.question:
        show(decoded("the question", 1, os.fsencode(" ".join(arguments.question))))
        return
    if sys.stdin.isatty():
        print("A question a line; end with Ctrl-D.")
    for number, raw in enumerate(sys.stdin.buffer, 1):
        if line := decoded("standard input", number, raw).strip():
            show(line)
            print(flush=True)


if __name__ == "__main__":
    run(main)
