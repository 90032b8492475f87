"""What a passage's scores weigh in the prior: log p(z | x) is the log-softmax over the passages of

    (score_scale * dense + hybrid_weight * BM25 + cross_weight * reranker) / temperature

The four are numbers, or learn: each is then its start times exp(a trained scalar), so that it stays positive and moves by
shares of itself. They start where the validation questions' gold passages are likeliest, if that could be fitted
(search/candidates.py), else where params.yaml says. One of them follows from the other three; the temperature moves what
all of them would have to.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.search.reranker_folder import load_fitted
from stages.settings.retrieval import Retriever

FILE = "prior.json"


class Weights(NamedTuple):
    """Numbers, or scalars on the model's device with gradient."""

    score_scale: float | Tensor = 1.0
    hybrid_weight: float | Tensor = 0.0
    cross_weight: float | Tensor = 1.0
    temperature: float | Tensor = 1.0

    def detached(self) -> "Weights":
        return Weights(*(part.detach() if isinstance(part, Tensor) else part for part in self))


class PriorWeights(nn.Module):
    """The weights of a Rag; without `learns` it has no parameter.

    By the weights `named` in params.yaml dense search and BM25 choose what a reranker reads: its warm-up and the fit have
    seen these candidates, and weights that suit a sum of three scores are no good for two of them.
    """

    def __init__(self, start: Weights | None = None, learns: bool = False, named: Weights | None = None):
        super().__init__()
        self.start = start or Weights()
        self.named = named or self.start
        self.log_factors = nn.Parameter(torch.zeros(len(Weights._fields))) if learns else None

    def forward(self) -> Weights:
        if self.log_factors is None:
            return self.start
        factors = self.log_factors.exp().unbind()
        return Weights(*(number * factor for number, factor in zip(self.start, factors, strict=True)))

    @torch.no_grad()
    def numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in self()._asdict().items()}

    def save(self, folder: Path) -> None:
        """Writes what was learned; nothing where nothing was."""
        if self.log_factors is not None:
            (folder / FILE).write_text(json.dumps(self.numbers(), indent=2) + "\n", encoding="utf-8")


def prior_of(settings: Retriever) -> PriorWeights:
    """The weights that params.yaml names."""
    return PriorWeights(Weights(**{name: getattr(settings, name) for name in Weights._fields}))


def starting_prior(settings: Retriever, reranker: Path) -> PriorWeights:
    """What training starts from: the weights of params.yaml or, where they learn, those that its stage fitted."""
    named = prior_of(settings).start
    if not settings.learn_weights:
        return PriorWeights(named)
    fitted = load_fitted(reranker)
    return PriorWeights(Weights(**fitted) if fitted else named, learns=True, named=named)


def load_prior(model: Path, settings: Retriever) -> PriorWeights:
    """The weights that the model in this folder learned, or else those that params.yaml names."""
    file = model / FILE
    if not file.is_file():
        return prior_of(settings)
    learned = Weights(**json.loads(file.read_text(encoding="utf-8")))
    return PriorWeights(learned, named=prior_of(settings).start)


def combined(weights: Weights, dense: Tensor, lexical: Tensor | None, crossed: Tensor | None) -> Tensor:
    """The scores [B, K] whose softmax is the prior, of their parts; -inf where `dense` is."""
    missing = dense.isinf()
    # A weight that learns would get the gradient 0 x infinity from a missing passage.
    scores = weights.score_scale * dense.masked_fill(missing, 0.0)
    if lexical is not None:
        scores = scores + weights.hybrid_weight * lexical
    if crossed is not None:
        scores = scores + weights.cross_weight * crossed
    return (scores / weights.temperature).masked_fill(missing, float("-inf"))
