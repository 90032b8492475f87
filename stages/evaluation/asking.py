"""Questions to a trained model outside of the pipeline: `ask`, the page to ask, the model that MLflow holds."""

import math
import unicodedata
from pathlib import Path

import torch

from stages.bm25.hits import find_hits
from stages.corpus.arrow import row_reader
from stages.corpus.token_store import TokenStore
from stages.evaluation.answering import answer, passages_of, retrieve
from stages.evaluation.decoding import Answer
from stages.generation import marginalization
from stages.params import Params
from stages.rag.opening import open_trained
from stages.search.passage_index import index_folders

DATA = Path("data")


class Asker:
    """A trained model over the passages of one folder, ready for questions.

    `data` holds prepared, tokens, lexical, index, vectors and reranker as the pipeline leaves them; `model` is the folder
    of the weights, data/model where it is not named. Raises ValueError where they are not there or damaged.
    """

    def __init__(self, params: Params, device: torch.device, data: Path = DATA, model: Path | None = None):
        model = model or data / "model"
        folders = index_folders(model, data / "index", data / "vectors")
        reranker = [data / "reranker"] if params.models.reranker else []
        needed = [data / "prepared", data / "tokens", *folders, model, *reranker]
        missing = [str(one) for one in dict.fromkeys(needed) if not one.is_dir()]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: not there; `dvc checkout` brings back the outputs of the last run, which a killed "
                "experiment takes away; `dvc repro` makes them"
            )
        self.params, self.device, self.lexical = params, device, data / "lexical"
        self.passage, self.passages = (
            row_reader(data / "prepared/passages.arrow"),
            len(TokenStore.open(data / "tokens")),
        )
        self.rag = open_trained(params, device, data, model)

    def ask(self, question: str) -> dict:
        """`answers` of one question."""
        return self.answers([question])[0]

    def answers(self, questions: list[str]) -> list[dict]:
        """{"question", "answer", "log_prob", "probability", "passages": [{"id", "title", "text", "prior", "posterior"}]}
        of each question, decoded as params.evaluate says."""
        if not questions:
            return []
        rag, settings = self.rag, self.params.evaluate
        questions = [unicodedata.normalize("NFC", question) for question in questions]
        hits = find_hits(self.lexical, questions, self.params.retriever.hybrid_depth)
        examples = rag.examples(questions, [""] * len(questions), hits).to(self.device)
        found = retrieve(rag, examples, rag.n_docs, settings.batch_size)
        prior = marginalization.log_prior(found.scores)
        recipe = self.params.recipe
        given = answer(rag, examples, found.rows, prior, settings, recipe.marginalization, "", reading=recipe.reading)
        return [self._row(*of_one) for of_one in zip(questions, given, prior, found.rows.tolist(), strict=True)]

    def _row(self, question: str, given: Answer, prior: torch.Tensor, rows: list[int]) -> dict:
        return {
            "question": question,
            "answer": given.text,
            "log_prob": given.log_prob,
            "probability": math.exp(min(0.0, given.log_prob)),
            "passages": passages_of(given, prior, [self.passage(row) if row >= 0 else None for row in rows]),
        }
