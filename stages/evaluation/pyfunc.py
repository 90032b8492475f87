"""A trained model from a folder alone: questions in, answers with their passages out.

    model = mlflow.pyfunc.load_model("models:/rag-recipes@new")     # any folder, no checkout
    model.predict(["Which country is Warsaw Modlin Airport in?"])

MLflow imports this module from the code that lies beside the model's files and calls `_load_pyfunc`. Two models of
different code in one process share the code of the first: Python imports a module once.
"""

from pathlib import Path

import pandas as pd
import torch

from stages.bm25.hits import find_hits
from stages.corpus.arrow import read_rows
from stages.evaluation.answering import answer, passages_of, retrieve
from stages.generation import marginalization
from stages.params import load_params
from stages.rag.folder import load_rag_parts
from stages.rag.model import open_rag_on
from stages.rag.prior import load_prior
from stages.search.passage_index import index_folders
from stages.search.reranking import load_reranker

MODEL = "model"  # folder of the weights


def _load_pyfunc(data_path: str) -> "AnsweringModel":
    return AnsweringModel(Path(data_path))


class AnsweringModel:
    """Weights, index, vectors, passages and parameters of one folder, as stages/rag/parts.py names them.

    model: the folder of the weights, where it is not `folder`/model. Answers as data/predictions was made: with the
    parameters `evaluate` of params.yaml, on a GPU where there is one. Raises ValueError where something is missing.
    """

    def __init__(self, folder: Path, model: Path | None = None):
        model = model or folder / MODEL
        if not (folder / "prepared").is_dir():
            raise ValueError(
                f"{folder}: the weights alone, without index and passages, answer nothing; they were larger than "
                "tracking.model_gigabytes when the model was registered: raise it and run `dvc repro --force train`, or ask "
                "where it was trained (python -m stages.ask)"
            )
        self.params, self.lexical = load_params(folder / "params.yaml"), folder / "lexical"
        use_cuda = self.params.runtime.device != "cpu" and torch.cuda.is_available()
        places = index_folders(model, folder / "index", folder / "vectors")
        device = torch.device("cuda" if use_cuda else "cpu")
        self.passages = read_rows(folder / "prepared" / "passages.arrow")
        self.rag = open_rag_on(
            load_rag_parts(model), places, folder / "tokens", self.params, device,
            load_prior(model, self.params.retriever),
            reranker=load_reranker(folder / "reranker", self.params.models.reranker, model / "reranker"),
        )  # fmt: skip
        self.rag.eval()

    def predict(self, model_input, params: dict | None = None) -> pd.DataFrame:
        """A row a question: `answer`, its `probability`, and `passages`, each with title, text, prior and posterior.

        model_input: a list of strings, or a table with a column `question` (MLflow hands over the first column alone).
        """
        return pd.DataFrame(self.answers(questions_of(model_input)), columns=["answer", "probability", "passages"])

    def answers(self, questions: list[str]) -> list[dict]:
        """The rows of `predict`."""
        if not questions:
            return []
        rag, settings, marginal = self.rag, self.params.evaluate, self.params.recipe.marginalization
        device = next(rag.parameters()).device
        hits = find_hits(self.lexical, questions, self.params.retriever.hybrid_depth)
        examples = rag.examples(questions, [""] * len(questions), hits).to(device)
        found = retrieve(rag, examples, rag.n_docs, settings.batch_size)
        prior = marginalization.log_prior(found.scores)
        given = answer(rag, examples, found.rows, prior, settings, marginal, "")
        return [self._row(one, *of_it) for one, *of_it in zip(given, prior, found.rows.tolist(), strict=True)]

    def _row(self, given, prior: torch.Tensor, rows: list[int]) -> dict:
        texts = [self.passages[row] if row >= 0 else None for row in rows]
        return {
            "answer": given.text,
            "probability": min(1.0, float(torch.tensor(given.log_prob).exp())),
            "passages": [
                {"title": text["title"], "text": text["text"], "prior": of["prior"], "posterior": of["posterior"]}
                for of, text in zip(passages_of(given, prior, texts), filter(None, texts), strict=True)
            ],
        }


def questions_of(model_input) -> list[str]:
    """The questions of what MLflow hands over. Raises ValueError where it is something else."""
    if isinstance(model_input, pd.DataFrame):
        columns = list(model_input.columns)
        if "question" not in columns and columns != [0]:
            raise ValueError(
                f"the questions' column must be named `question` and come first; this table begins with {columns[0]!r}"
                if columns else "an empty table; it must have a column `question`"
            )  # fmt: skip
        model_input = model_input["question" if "question" in columns else 0]
    questions = [model_input] if isinstance(model_input, str) else list(model_input)
    for place, question in enumerate(questions):
        if not isinstance(question, str):
            raise ValueError(f"question {place} is no text: {question!r}")
    return questions
