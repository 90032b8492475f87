"""A trained model from a folder alone: questions in, answers with their passages out.

    model = mlflow.pyfunc.load_model("models:/rag-recipes@new")     # any folder, no checkout
    model.predict(["Which country is Warsaw Modlin Airport in?"])

MLflow imports this module from the code that lies beside the model's files and calls `_load_pyfunc`. Two models of
different code in one process share the code of the first: Python imports a module once.
"""

from pathlib import Path

import pandas as pd
import torch

from stages.evaluation.asking import Asker
from stages.params import load_params

PASSAGE = ("title", "text", "prior", "posterior")


def _load_pyfunc(data_path: str) -> "AnsweringModel":
    return AnsweringModel(Path(data_path))


class AnsweringModel:
    """Weights, index, vectors, passages and parameters of one folder, as stages/rag/parts.py names them.

    model: the folder of the weights, where it is not `folder`/model. Answers as data/predictions was made: with the
    parameters `evaluate` of params.yaml, on a GPU where there is one. Raises ValueError where something is missing.
    """

    def __init__(self, folder: Path, model: Path | None = None):
        if not (folder / "prepared").is_dir():
            raise ValueError(
                f"{folder}: the weights alone, without index and passages, answer nothing; they were larger than "
                "tracking.model_gigabytes when the model was registered: raise it and run `dvc repro --force train`, or ask "
                "where it was trained (python -m stages.ask)"
            )
        params = load_params(folder / "params.yaml")
        use_cuda = params.runtime.device != "cpu" and torch.cuda.is_available()
        self.asker = Asker(params, torch.device("cuda" if use_cuda else "cpu"), folder, model)

    def predict(self, model_input, params: dict | None = None) -> pd.DataFrame:
        """A row a question: `answer`, its `probability`, and `passages`, each with title, text, prior and posterior.

        model_input: a list of strings, or a table with a column `question` (MLflow hands over the first column alone).
        """
        rows = [
            {
                "answer": given["answer"],
                "probability": given["probability"],
                "passages": [{key: passage[key] for key in PASSAGE} for passage in given["passages"]],
            }
            for given in self.asker.answers(questions_of(model_input))
        ]
        return pd.DataFrame(rows, columns=["answer", "probability", "passages"])


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
