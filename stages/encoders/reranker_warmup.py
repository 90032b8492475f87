"""Warming up a cross-encoder on questions, their passages and wrong candidates: listwise cross-entropy.

As in Re2G (Glass et al. 2022, arXiv:2207.06300, section 3.2) and Gao et al. 2021 (arXiv:2101.08751): the negatives are what
the retriever in front of it ranks high, the loss is that of the right passage among them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stages.corpus.epochs import epoch_order
from stages.corpus.token_store import TokenStore
from stages.encoders.cross_encoder import Asked, CrossEncoder
from stages.encoders.mining import HardNegatives
from stages.encoders.warmup import optimizer_and_schedule


def listwise_loss(scores: Tensor, rows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the first of each question's passages `rows` [B, 1 + K] by their scores; -1: none."""
    return F.cross_entropy(
        scores.masked_fill(rows < 0, float("-inf")), torch.zeros(len(rows), dtype=torch.long, device=scores.device)
    )


def asked_rows(questions: TokenStore, rows: Tensor, device: torch.device) -> Asked:
    """The named questions on `device`."""
    ids, lengths = questions.padded(rows.to(questions.offsets.device), limit=1 << 30, pad=0)
    return Asked(ids.to(device), lengths.to(device))


def warm_up_reranker(
    encoder: CrossEncoder, questions: TokenStore, passages: TokenStore, positives: Tensor, negatives: HardNegatives, *,
    steps: int, batch_size: int, learning_rate: float, seed: int, device: torch.device,
) -> float:  # fmt: skip
    """Takes `steps` steps in place and returns the last loss.

    Question i has the passages `positives` [N, P] (-1 behind its last), of which one is drawn in each step, as are its
    negatives, which hold none of them. What is read in which step depends on the seed alone.
    """
    parameters = list(encoder.model.parameters())
    optimizer, schedule = optimizer_and_schedule(parameters, learning_rate, steps, device)
    drawing = torch.Generator().manual_seed(seed)
    of_one = HardNegatives(positives, 1)
    encoder.model.train()
    loss = torch.zeros(())
    bar = tqdm(batches(len(questions), steps, batch_size, seed), "warm up the reranker", steps, unit=" steps")
    for step, rows in enumerate(bar):
        wanted = torch.cat([of_one.draw_each(rows, drawing), negatives.draw_each(rows, drawing)], dim=1)
        asked = asked_rows(questions, rows, device).repeated(wanted.shape[1])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = encoder.scores(encoder.pairs(asked, passages, wanted.flatten()))
        loss = listwise_loss(scores.view(wanted.shape), wanted.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    encoder.model.eval()
    return loss.item()


def batches(count: int, steps: int, batch_size: int, seed: int):
    """Rows of the questions [B] of each step, epoch after epoch."""
    order: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(order) < batch_size:
            order, epoch = order + epoch_order(count, seed, epoch), epoch + 1
        yield torch.tensor(order[:batch_size])
        order = order[batch_size:]
