"""Training the small base models: a BART that copies answers out of passages, a DPR encoder that matches names.

Both skills are what a model needs on facts it never saw. The generator learns them half from questions with their gold
passage and half from cloze questions: an entity-like span masked out of a window of the passage, the passage in full
as the context. The encoder learns from questions, from inverse cloze (Lee et al. 2019) and from bare names in the
company of question words, with in-batch negatives (Karpukhin et al. 2020). Batches are gathered on the device.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, DPRConfig, DPRQuestionEncoder

from stages.contexts import TokenStore, assemble_contexts
from stages.pretraining_corpus import ANSWER_TOKENS, BOS, EOS, MASK, PAD, PASSAGE_TOKENS, QUESTION_TOKENS, UNK

CONTEXT_TOKENS = 256
QUERY_TOKENS = 46
ENCODER_PASSAGE_TOKENS = 160
WINDOW = 14


class Arrays:
    """The arrays of `pretraining_corpus.build_arrays` on a device."""

    def __init__(self, path: Path, device: torch.device):
        with np.load(path, allow_pickle=False) as arrays:
            self.values = {name: torch.from_numpy(self._wide(arrays[name])).to(device) for name in arrays.files}
        self.passages = self.store("passages", "passage_offsets")
        self.span_starts, self.span_lengths = self.values["spans"].view(-1, 2).unbind(1)
        self.span_offsets = self.values["span_offsets"] // 2
        self.with_spans = torch.nonzero(self.span_offsets[1:] > self.span_offsets[:-1]).flatten()

    @staticmethod
    def _wide(array: np.ndarray) -> np.ndarray:
        return array.astype(np.int32) if array.dtype == np.uint16 else array

    def store(self, tokens: str, offsets: str) -> TokenStore:
        return TokenStore(self.values[tokens], self.values[offsets])

    def random_spans(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A random entity-like span of each passage: start and length in tokens, [R] each."""
        first, last = self.span_offsets[rows], self.span_offsets[rows + 1]
        chosen = first + (torch.rand(len(rows), device=rows.device) * (last - first)).long()
        return self.span_starts[chosen].long(), self.span_lengths[chosen].long()


def uniform(low: int, high: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(low, high + 1, (count,), device=device)


def compact(tokens: Tensor, keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The kept tokens of each row moved to its left: ids [R, width] padded, lengths [R]."""
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :width]
    lengths = keep.sum(1).clamp(max=width)
    inside = torch.arange(order.shape[1], device=tokens.device) < lengths[:, None]
    return torch.where(inside, tokens.gather(1, order), PAD), lengths


def window(arrays: Arrays, rows: Tensor, start: Tensor, length: Tensor, left: Tensor, right: Tensor) -> tuple:
    """Passage tokens around a span: ids [R, W], which of them exist [R, W], which belong to the span [R, W]."""
    span = ANSWER_TOKENS
    column = torch.arange(2 * WINDOW + span, device=rows.device)[None, :]
    at = start[:, None] - left[:, None] + column
    size = (arrays.passages.offsets[rows + 1] - arrays.passages.offsets[rows])[:, None]
    end = (start + length + right)[:, None]
    exists = (at >= 0) & (at < size) & (at < end)
    source = torch.where(exists, arrays.passages.offsets[rows][:, None] + at, 0)
    return arrays.passages.tokens[source].long(), exists, (at >= start[:, None]) & (at < (start + length)[:, None])


def cloze_questions(arrays: Arrays, rows: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cloze questions over passages: ids [R, Q], lengths [R], answers [R, ANSWER_TOKENS] ending in EOS."""
    device = rows.device
    start, length = arrays.random_spans(rows)
    sides = uniform(3, WINDOW, 2 * len(rows), device).view(2, -1)
    tokens, exists, in_span = window(arrays, rows, start, length, sides[0], sides[1])
    # Some words are left out, so that the window has to be understood rather than aligned.
    dropped = torch.rand(tokens.shape, device=device) < 0.25 * torch.rand(len(rows), 1, device=device)
    first_of_span = in_span & ~F.pad(in_span, (1, 0))[:, :-1]
    tokens = torch.where(first_of_span, MASK, tokens)
    keep = exists & ((~in_span & ~dropped) | first_of_span)
    asked, lengths = compact(tokens, keep, QUESTION_TOKENS - len(prefix))
    asked = torch.cat([prefix.expand(len(rows), -1), asked], dim=1)
    column = torch.arange(ANSWER_TOKENS, device=device)[None, :]
    at = arrays.passages.offsets[rows][:, None] + start[:, None] + column
    answers = arrays.passages.tokens[at.clamp(max=len(arrays.passages.tokens) - 1)].long()
    answers = torch.where(column < length[:, None], answers, torch.where(column == length[:, None], EOS, PAD))
    return asked, lengths + len(prefix), answers


def gold_answers(arrays: Arrays, split: str, chosen: Tensor) -> Tensor:
    answers, lengths = arrays.store(f"{split}_answers", f"{split}_answer_offsets").padded(
        chosen, ANSWER_TOKENS - 1, PAD
    )
    answers = F.pad(answers, (0, ANSWER_TOKENS - answers.shape[1]), value=PAD)
    return answers.scatter(1, lengths[:, None], EOS)


def fit(width: int, tokens: Tensor) -> Tensor:
    return F.pad(tokens, (0, width - tokens.shape[1]), value=PAD)


def generator_batch(arrays: Arrays, size: int, qa_share: float, prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Context ids and mask [size, CONTEXT_TOKENS] and answers [size, ANSWER_TOKENS]."""
    device = prefix.device
    qa = int(size * qa_share)
    chosen = torch.randint(len(arrays.values["train_positives"]), (qa,), device=device)
    asked, asked_lengths = arrays.store("train_questions", "train_question_offsets").padded(
        chosen, QUESTION_TOKENS, PAD
    )
    cloze_rows = arrays.with_spans[torch.randint(len(arrays.with_spans), (size - qa,), device=device)]
    cloze, cloze_lengths, cloze_answers = cloze_questions(arrays, cloze_rows, prefix)
    ids, mask = assemble_contexts(
        arrays.passages,
        torch.cat([arrays.values["train_positives"][chosen], cloze_rows]),
        torch.cat([fit(QUESTION_TOKENS, asked), fit(QUESTION_TOKENS, cloze)]),
        torch.cat([asked_lengths, cloze_lengths]),
        limit=CONTEXT_TOKENS, prefix=[BOS], suffix=[EOS], pad=PAD, width=CONTEXT_TOKENS,
    )  # fmt: skip
    return ids, mask, torch.cat([gold_answers(arrays, "train", chosen), cloze_answers])


def names_as_queries(arrays: Arrays, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A name from each passage (or its title) between words of an unrelated question: ids, lengths."""
    device = rows.device
    start, length = arrays.random_spans(rows)
    title = arrays.values["title_lengths"][rows].long()
    by_title = torch.rand(len(rows), device=device) < 0.5
    start = torch.where(by_title, 0, start)
    length = torch.where(by_title, title.clamp(max=ANSWER_TOKENS), length)
    none = torch.zeros_like(start)
    name, exists, _ = window(arrays, rows, start, length, none, none)
    other = torch.randint(len(arrays.values["train_positives"]), (len(rows),), device=device)
    words, word_lengths = arrays.store("train_questions", "train_question_offsets").padded(other, 18, PAD)
    column = torch.arange(words.shape[1], device=device)[None, :]
    before = column < uniform(0, 7, len(rows), device)[:, None]
    after = column >= (word_lengths - uniform(0, 4, len(rows), device))[:, None]
    real = column < word_lengths[:, None]
    return compact(
        torch.cat([words, name, words], dim=1),
        torch.cat([before & real, exists, after & real & ~before], dim=1),
        QUERY_TOKENS,
    )


def inverse_cloze(arrays: Arrays, rows: Tensor, remove: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A window around a name as the query, the passage mostly without it as the positive: ids and lengths of each."""
    device = rows.device
    start, length = arrays.random_spans(rows)
    sides = uniform(2, WINDOW, 2 * len(rows), device).view(2, -1)
    tokens, exists, _ = window(arrays, rows, start, length, sides[0], sides[1])
    dropped = torch.rand(tokens.shape, device=device) < 0.4 * torch.rand(len(rows), 1, device=device)
    query, query_lengths = compact(tokens, exists & ~dropped, QUERY_TOKENS)
    passage, lengths = arrays.passages.padded(rows, ENCODER_PASSAGE_TOKENS, PAD)
    column = torch.arange(passage.shape[1], device=device)[None, :]
    gone = (column >= (start - sides[0])[:, None]) & (column < (start + length + sides[1])[:, None])
    gone &= torch.rand(len(rows), 1, device=device) < remove
    passage, lengths = compact(passage, (column < lengths[:, None]) & ~gone, ENCODER_PASSAGE_TOKENS)
    return query, query_lengths, passage, lengths


def bracket(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`<s> tokens </s>`: ids and attention mask [R, L + 2]."""
    ids = F.pad(F.pad(tokens, (1, 0), value=BOS), (0, 1), value=PAD).scatter(1, (lengths + 1)[:, None], EOS)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < (lengths + 2)[:, None]).long()


def encoder_batch(arrays: Arrays, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and their positive passages, a third each of questions, inverse cloze and names: ids, mask, ids, mask."""
    device = arrays.passages.tokens.device
    third = size // 3
    chosen = torch.randint(len(arrays.values["train_positives"]), (size - 2 * third,), device=device)
    asked, asked_lengths = arrays.store("train_questions", "train_question_offsets").padded(chosen, QUERY_TOKENS, PAD)
    gold, gold_lengths = arrays.passages.padded(arrays.values["train_positives"][chosen], ENCODER_PASSAGE_TOKENS, PAD)
    rows = arrays.with_spans[torch.randint(len(arrays.with_spans), (2 * third,), device=device)]
    window_query, window_lengths, rest, rest_lengths = inverse_cloze(arrays, rows[:third], remove=0.8)
    names, name_lengths = names_as_queries(arrays, rows[third:])
    named, named_lengths = arrays.passages.padded(rows[third:], ENCODER_PASSAGE_TOKENS, PAD)
    queries = torch.cat([fit(QUERY_TOKENS, part) for part in (asked, window_query, names)])
    passages = torch.cat([fit(ENCODER_PASSAGE_TOKENS, part) for part in (gold, rest, named)])
    return (
        *bracket(queries, torch.cat([asked_lengths, window_lengths, name_lengths])),
        *bracket(passages, torch.cat([gold_lengths, rest_lengths, named_lengths])),
    )


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


assert UNK not in (BOS, PAD, EOS, MASK) and PASSAGE_TOKENS + 2 <= CONTEXT_TOKENS
