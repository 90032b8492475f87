"""Training the small base models: a BART that copies answers out of passages, a DPR encoder that matches names.

Both skills are what a model needs on facts it never saw. The generator learns them half from questions with their gold
passage and half from cloze questions: an entity-like span masked out of a window of the passage, the passage in full
as the context. The encoder learns from questions, from inverse cloze and from bare names in the company of question
words, with in-batch negatives (Karpukhin et al. 2020).
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, DPRConfig, DPRQuestionEncoder

from stages.corpus.token_store import TokenStore
from stages.generation.contexts import assemble_contexts
from stages.pretraining.batches import (
    CONTEXT_TOKENS,
    ENCODER_PASSAGE_TOKENS,
    QUERY_TOKENS,
    Arrays,
    bracket,
    encoder_batch,
    generator_batch,
)
from stages.pretraining.corpus import ANSWER_TOKENS, BOS, EOS, PAD, QUESTION_TOKENS


def new_generator(vocab_size: int) -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocab_size, d_model=256, encoder_layers=4, decoder_layers=2, encoder_ffn_dim=1024,
            decoder_ffn_dim=1024, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=320,
            dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, bos_token_id=BOS, pad_token_id=PAD,
            eos_token_id=EOS, decoder_start_token_id=BOS, forced_eos_token_id=None,
        )
    )  # fmt: skip


def new_encoder(vocab_size: int, layers: int, projection: int) -> DPRQuestionEncoder:
    return DPRQuestionEncoder(
        DPRConfig(
            vocab_size=vocab_size, hidden_size=256, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=1024, max_position_embeddings=256, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, type_vocab_size=1, pad_token_id=PAD, projection_dim=projection,
        )
    )  # fmt: skip


class Schedule:
    """Learning rate over wall-clock time: a linear warm-up over `warmup_steps`, then a cosine to zero at `seconds`."""

    def __init__(self, optimizer: torch.optim.Optimizer, peak: float, seconds: float, warmup_steps: int):
        self.optimizer, self.peak, self.seconds, self.warmup_steps = optimizer, peak, seconds, warmup_steps
        self.started, self.step = time.time(), 0

    def advance(self) -> bool:
        """Sets the next step's rate; False once the time is up."""
        progress = (time.time() - self.started) / self.seconds
        self.step += 1
        rate = self.peak * min(1.0, self.step / self.warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return progress < 1.0


def optimizer_for(model: torch.nn.Module, device: torch.device) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.98), fused=device.type == "cuda",
    )  # fmt: skip


def train_generator(
    model: BartForConditionalGeneration, arrays: Arrays, prefix: Tensor, *, seconds: float, batch_size: int,
    learning_rate: float, qa_share: float, evaluate, evaluate_steps: int,
) -> int:  # fmt: skip
    """Trains in place until the time is up; returns the number of steps."""
    device = prefix.device
    optimizer = optimizer_for(model, device)

    def loss_of(ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
        decoder_ids = F.pad(answers[:, :-1], (1, 0), value=BOS)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), answers.flatten(), ignore_index=PAD, label_smoothing=0.05)

    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    step_loss(*generator_batch(arrays, batch_size, qa_share, prefix)).backward()  # compiles before the clock starts
    optimizer.zero_grad()
    schedule = Schedule(optimizer, learning_rate, seconds, warmup_steps=300)
    while schedule.advance():
        loss = step_loss(*generator_batch(arrays, batch_size, qa_share, prefix))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule.step % evaluate_steps == 0:
            spent = time.time() - schedule.started
            print(f"{spent:.0f} s, step {schedule.step}: loss {loss.item():.3f}, {evaluate(1000)}", flush=True)
    return schedule.step


@torch.no_grad()
def answer_greedily(model, arrays: Arrays, split: str, count: int, batch_size: int = 500) -> list[list[int]]:
    """Greedy answers of the first `count` questions of a split, each with its gold passage: token ids without EOS."""
    device = arrays.passages.tokens.device
    written = []
    for first in range(0, count, batch_size):
        chosen = torch.arange(first, min(first + batch_size, count), device=device)
        asked, lengths = arrays.store(f"{split}_questions", f"{split}_question_offsets").padded(
            chosen, QUESTION_TOKENS, PAD
        )
        ids, mask = assemble_contexts(
            arrays.passages, arrays.values[f"{split}_positives"][chosen], asked, lengths,
            limit=CONTEXT_TOKENS, prefix=[BOS], suffix=[EOS], pad=PAD,
        )  # fmt: skip
        states = model.get_encoder()(input_ids=ids, attention_mask=mask)
        decoded = torch.full((len(chosen), 1), BOS, device=device)
        for _ in range(ANSWER_TOKENS):
            logits = model(
                encoder_outputs=states, attention_mask=mask, decoder_input_ids=decoded, use_cache=False
            ).logits
            decoded = torch.cat([decoded, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        for row in decoded[:, 1:].tolist():
            written.append(row[: row.index(EOS)] if EOS in row else row)
    return written


def train_encoder(
    model: DPRQuestionEncoder, arrays: Arrays, *, seconds: float, batch_size: int, learning_rate: float
) -> int:
    """Trains in place until the time is up; returns the number of steps."""
    device = arrays.passages.tokens.device
    optimizer = optimizer_for(model, device)
    schedule = Schedule(optimizer, learning_rate, seconds, warmup_steps=100)
    target = torch.arange(batch_size, device=device)
    while schedule.advance():
        query_ids, query_mask, passage_ids, passage_mask = encoder_batch(arrays, batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            queries = model(query_ids, attention_mask=query_mask).pooler_output
            passages = model(passage_ids, attention_mask=passage_mask).pooler_output
        scores = queries.float() @ passages.float().T
        loss = 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule.step % 100 == 0:
            accuracy = (scores.argmax(1) == target).float().mean().item()
            spent = time.time() - schedule.started
            print(f"{spent:.0f} s, step {schedule.step}: loss {loss.item():.3f}, in-batch {accuracy:.3f}", flush=True)
    return schedule.step


@torch.no_grad()
def gold_recall(model: DPRQuestionEncoder, arrays: Arrays, split: str, depths: tuple[int, ...]) -> dict[str, float]:
    """Percent of a split's questions whose gold passage is among the first k of all passages, exact search."""
    device = arrays.passages.tokens.device

    def encode(store: TokenStore, limit: int) -> Tensor:
        vectors = []
        for first in range(0, len(store), 2048):
            rows = torch.arange(first, min(first + 2048, len(store)), device=device)
            ids, mask = bracket(*store.padded(rows, limit, PAD))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                vectors.append(model(ids, attention_mask=mask).pooler_output.float())
        return torch.cat(vectors)

    passages = encode(arrays.passages, ENCODER_PASSAGE_TOKENS)
    questions = encode(arrays.store(f"{split}_questions", f"{split}_question_offsets"), QUERY_TOKENS)
    gold = arrays.values[f"{split}_positives"][:, None]
    found = torch.cat(
        [(part @ passages.T).topk(min(max(depths), len(passages))).indices for part in questions.split(512)]
    )
    return {f"recall_at_{k}": round(100 * (found[:, :k] == gold).any(1).float().mean().item(), 2) for k in depths}
