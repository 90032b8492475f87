"""What a training counts: where it stands, and its sums since the last logged point."""

import time
from dataclasses import dataclass, field

import torch

from stages.compute import ranks
from stages.generation import marginalization
from stages.rag.batches import RagBatch
from stages.rag.model import RagOutput
from stages.training.throughput import DeviceGaps

SUMS = (
    "nll",
    "retriever_loss",
    "gold_nll",
    "with_gold",
    "context_tokens",
    "prior_entropy",
    "distinct",
    "target_tokens",
    "question_tokens",
    "scored_tokens",
    "questions",
    "forwards",
    "without_passages",
)  # of a Window


@dataclass
class Progress:
    """Where a training stands; what a checkpoint must bring back besides weights and optimizer."""

    step: int = 0
    updates_taken: int = 0
    questions_seen: int = 0
    questions_without_passages: int = 0  # of those seen at logged points; answered from the question alone
    best_step: int = 0
    best_loss: float = float("inf")
    training_seconds: float = 0.0
    skipped_steps: int = 0  # their gradient was not finite
    overflow_steps: int = 0  # the same under fp16's loss scaling, which looks for its scale
    skipped_in_a_row: int = 0
    micro_batch: int | None = None  # most questions a forward pass since memory ran out; None: it never did
    halvings: list[str] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)


@dataclass
class Window:
    """Sums since the last logged point, kept on the device so that logging alone waits for it."""

    nll: torch.Tensor | float = 0.0
    retriever_loss: torch.Tensor | float = 0.0
    gold_nll: torch.Tensor | float = 0.0
    with_gold: torch.Tensor | float = 0.0  # questions that it is of
    question_tokens: torch.Tensor | float = 0.0
    context_tokens: torch.Tensor | float = 0.0
    prior_entropy: torch.Tensor | float = 0.0
    distinct: torch.Tensor | float = 0.0
    target_tokens: torch.Tensor | float = 0.0
    scored_tokens: torch.Tensor | float = 0.0
    without_passages: torch.Tensor | float = 0.0
    questions: int = 0
    forwards: int = 0
    steps: int = 0
    waited: float = 0.0  # seconds that the device waited for the host before a checkpoint
    waits: DeviceGaps | None = None  # and since
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def on(cls, device: torch.device) -> "Window":
        """An empty one that begins now."""
        return cls(waits=DeviceGaps(device))

    def state(self) -> dict:
        """The sums, to be given back to `restore`: of this window, or of another process's that goes on with it."""
        sums = {
            name: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor | int | float)
        }
        return sums | {"started": time.perf_counter() - self.started}

    def restore(self, state: dict, device: torch.device) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(device, copy=True) if isinstance(value, torch.Tensor) else value)
        self.started = time.perf_counter() - state["started"]

    def add(self, batch: RagBatch, output: RagOutput) -> None:
        """A forward pass that counts."""
        targets = batch.target_mask.sum()
        self.nll += output.nll.detach().sum()
        if output.retriever_loss is not None:
            self.retriever_loss += output.retriever_loss.detach().sum()
        if output.gold_nll is not None:
            self.gold_nll += output.gold_nll.detach().sum()
            self.with_gold += (batch.golds[:, 0] >= 0).sum()
        self.question_tokens += batch.question_mask.sum()
        self.context_tokens += output.context_tokens
        self.target_tokens += targets
        self.scored_tokens += targets * output.scored_under
        self.prior_entropy += marginalization.normalized_entropy(output.log_prior).sum()
        self.distinct += distinct_share(output.rows)
        self.without_passages += (output.rows < 0).all(1).sum()
        self.questions += len(batch.targets)
        self.forwards += 1

    def summed(self) -> dict[str, torch.Tensor | float]:
        """The sums of SUMS over all ranks."""
        return ranks.summed({name: getattr(self, name) for name in SUMS})


def distinct_share(rows: torch.Tensor) -> torch.Tensor:
    """Distinct over all retrieved passages of `rows` (-1: missing), without waiting for the device."""
    ordered = rows.flatten().sort().values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    present = ordered >= 0
    return (first & present).sum() / present.sum().clamp(min=1)
