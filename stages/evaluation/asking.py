"""One question at a time to the trained model, as `ask` and the page to ask do."""

import math
import unicodedata
from pathlib import Path

import torch

from stages.bm25.hits import find_hits
from stages.corpus.arrow import row_reader
from stages.corpus.token_store import TokenStore
from stages.evaluation.answering import answer, passages_of, retrieve
from stages.generation import marginalization
from stages.params import Params
from stages.rag.folder import load_rag_parts
from stages.rag.model import open_rag_on
from stages.rag.prior import load_prior
from stages.search.passage_index import index_folders
from stages.search.reranking import load_reranker

PREPARED, TOKENS, LEXICAL = Path("data/prepared"), Path("data/tokens"), Path("data/lexical")
VECTORS, INDEX, MODEL = Path("data/vectors"), Path("data/index"), Path("data/model")
RERANKER = Path("data/reranker")


class Asker:
    """The outputs of the last run, ready for questions. Raises ValueError where they are not there or damaged."""

    def __init__(self, params: Params, device: torch.device):
        folders = index_folders(MODEL, INDEX, VECTORS)
        needed = [PREPARED, TOKENS, *folders, MODEL, *([RERANKER] if params.models.reranker else [])]
        missing = [str(one) for one in dict.fromkeys(needed) if not one.is_dir()]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: not there; `dvc checkout` brings back the outputs of the last run, which a killed "
                "experiment takes away; `dvc repro` makes them"
            )
        self.params, self.device = params, device
        self.passage, self.passages = row_reader(PREPARED / "passages.arrow"), len(TokenStore.open(TOKENS))
        self.rag = open_rag_on(
            load_rag_parts(MODEL), folders, TOKENS, params, device, load_prior(MODEL, params.retriever),
            reranker=load_reranker(RERANKER, params.models.reranker, MODEL / "reranker"),
        )  # fmt: skip
        self.rag.eval()

    def ask(self, question: str) -> dict:
        """{"question", "answer", "log_prob", "probability", "passages": [{"id", "title", "text", "prior", "posterior"}]}."""
        question = unicodedata.normalize("NFC", question)
        hits = find_hits(LEXICAL, [question], self.params.retriever.hybrid_depth)
        examples = self.rag.examples([question], [""], hits).to(self.device)
        found = retrieve(self.rag, examples, self.rag.n_docs, 1)
        prior = marginalization.log_prior(found.scores)
        marginal = self.params.recipe.marginalization
        given = next(answer(self.rag, examples, found.rows, prior, self.params.evaluate, marginal, ""))
        texts = [self.passage(row) if row >= 0 else None for row in found.rows[0].tolist()]
        return {
            "question": question,
            "answer": given.text,
            "log_prob": given.log_prob,
            "probability": math.exp(min(0.0, given.log_prob)),
            "passages": passages_of(given, prior[0], texts),
        }
