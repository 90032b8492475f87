"""Warming up the two encoders on questions and their gold passages, with in-batch negatives (Karpukhin et al. 2020).

A second round adds hard negatives, which mining.py finds.
"""

import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from stages.corpus.epochs import epoch_order
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder, padded_rows
from stages.encoders.mining import HardNegatives
from stages.encoders.own_passages import OwnPassages


def in_batch_loss(
    questions: torch.Tensor, passages: torch.Tensor, own: torch.Tensor, score_scale: float = 1.0
) -> torch.Tensor:
    """Mean cross-entropy of each question's own passage among all passages of the batch, in nats.

    `questions` [B, d] are vectors, `passages` [B + M, d] those of one of their own passages each, in the same order, and
    of M hard negatives of any of them. `own` [B, B + M] says which of the passages are a question's own. It may push none
    of them away because another question is about it, too, or took it for a negative: such columns are left out.
    """
    scores = score_scale * (questions.float() @ passages.float().T)
    left_out = own.clone().fill_diagonal_(False)
    return F.cross_entropy(
        scores.masked_fill(left_out, float("-inf")), torch.arange(len(questions), device=scores.device)
    )


def optimizer_and_schedule(
    parameters: list[torch.nn.Parameter], learning_rate: float, steps: int, device: torch.device
) -> tuple[AdamW, LambdaLR]:
    """Of a warm-up, the reranker's too: AdamW (Loshchilov & Hutter 2019) without weight decay, its rate rising linearly over
    the first tenth of the steps to `learning_rate`, then falling linearly to zero behind the last one."""
    fused = True if device.type == "cuda" else None
    optimizer = AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=fused)
    warmup = max(1, steps // 10)
    return optimizer, LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


class WarmUp:
    """Both encoders in training over a fixed set of tokenized questions and passages."""

    def __init__(
        self, question_encoder: Encoder, context_encoder: Encoder, device: torch.device, score_scale: float = 1.0
    ):
        self.question_encoder, self.context_encoder, self.device = question_encoder, context_encoder, device
        self.score_scale = score_scale
        for encoder in (question_encoder, context_encoder):
            encoder.model.to(device)

    def loss(
        self, questions: TokenStore, passages: TokenStore, rows: torch.Tensor, wanted: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        """In-batch loss of the questions `rows` [B] over the passages `wanted` [B + M]: their own, then hard negatives.

        `own` [B, B + M] as `in_batch_loss` takes it.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            vectors = []
            for encoder, store, chosen in (
                (self.question_encoder, questions, rows), (self.context_encoder, passages, wanted)
            ):  # fmt: skip
                ids, mask = padded_rows(store, chosen, encoder.tokenizer.pad_token_id, self.device)
                vectors.append(encoder.embed(ids, mask))
        return in_batch_loss(vectors[0], vectors[1], own.to(self.device), self.score_scale)

    def train(self, questions: TokenStore, passages: TokenStore, positives: OwnPassages, *, steps: int, batch_size: int,
              learning_rate: float, seed: int, negatives: HardNegatives | None = None) -> float:  # fmt: skip
        """Takes `steps` steps in place; `positives` are rows of `passages`. Returns the last loss.

        Of a question's positives one is drawn anew each time. `negatives` are rows of `passages`, too, drawn as well.
        """
        models = [self.question_encoder.model, self.context_encoder.model]
        parameters = [parameter for model in models for parameter in model.parameters()]
        optimizer, schedule = optimizer_and_schedule(parameters, learning_rate, steps, self.device)
        for model in models:
            model.train()
        # Gathered on the device: a padded batch copied there would make the host wait for all that is queued before it.
        questions, passages = (TokenStore(s.tokens.to(self.device), s.offsets) for s in (questions, passages))
        drawing = torch.Generator().manual_seed(seed)
        order: list[int] = []
        epoch, loss = 0, torch.zeros(())
        bar = tqdm(range(steps), desc="warm up the retriever", unit=" steps")
        for step in bar:
            if len(order) < batch_size:
                order, epoch = order + epoch_order(len(questions), seed, epoch), epoch + 1
            rows, order = torch.tensor(order[:batch_size]), order[batch_size:]
            wanted = positives.draw(rows, drawing)
            if negatives is not None:
                wanted = torch.cat([wanted, negatives.draw(rows, drawing)])
            loss = self.loss(questions, passages, rows, wanted, positives.among(rows, wanted))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}")
        for model in models:
            model.eval()
        return loss.item()

    @torch.no_grad()
    def validate(self, questions: TokenStore, passages: TokenStore, positives: OwnPassages, batch_size: int) -> float:
        """Mean in-batch loss of all questions' first positives, in nats."""
        total = 0.0
        for rows in torch.arange(len(questions)).split(batch_size):
            wanted = positives.first(rows)
            loss = self.loss(questions, passages, rows, wanted, positives.among(rows, wanted))
            total += loss.item() * len(rows)
        return total / len(questions)
