"""What is retrieved for a training question, looked for once where nothing that ranks passages learns.

By `retriever_gradient: none` encoder, reranker, prior and vectors stay as they are, and so do a question's passages and
their scores: from its second epoch on it is neither encoded nor searched for nor reranked.
"""

from typing import Any

import torch
from torch import Tensor

from stages.rag.ahead import Found
from stages.rag.batches import Examples, RagBatch
from stages.settings.runs import Recipe

PREFIX = "found-"


class FoundOnce:
    """Passages and scores of a training's N questions, K each, as they are found: 12 bytes a passage on the device.

    They are part of a checkpoint: found again in another batch, a score may differ in its last digit.
    """

    def __init__(self, questions: int, n_docs: int, device: torch.device):
        self.rows = torch.full((questions, n_docs), -1, device=device)
        self.scores = torch.full((questions, n_docs), float("-inf"), device=device)
        self.known = torch.zeros(questions, dtype=torch.bool)

    @classmethod
    def of_training(cls, rag: Any, recipe: Recipe, examples: Examples) -> "FoundOnce | None":
        """For a Rag's training on these examples; None where something learns to rank, or where the recipe forwards one
        question at a time on purpose."""
        learns = recipe.retriever_gradient != "none" or rag.passage_encoder or examples.golds is not None
        if learns or recipe.batching != "true_batches":
            return None
        return cls(len(examples), rag.n_docs, next(rag.parameters()).device)

    def of(self, rag: Any, batch: RagBatch, questions: list[int]) -> Found:
        """What `rag` finds for this batch of these training questions, without gradient."""
        chosen = torch.tensor(questions)
        places = chosen.to(self.rows.device)
        if self.known[chosen].all():
            return Found(self.rows[places], self.scores[places])
        with torch.no_grad():
            rows, scores, _ = rag.find(batch, "none")
        self.rows[places], self.scores[places] = rows, scores.float()
        self.known[chosen] = True
        return Found(rows, scores)

    def tensors(self) -> dict[str, Tensor]:
        """What is known so far, for a checkpoint."""
        return {PREFIX + name: getattr(self, name) for name in ("rows", "scores", "known")}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on with what `tensors` gave."""
        for name, value in tensors.items():
            getattr(self, name.removeprefix(PREFIX)).copy_(value)
