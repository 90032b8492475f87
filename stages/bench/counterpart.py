"""transformers' own RAG classes over our models: what the benchmarks compare with, measured in the same process."""

from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import RagConfig, RagSequenceForGeneration

from stages.bench import random_models
from stages.bench.timing import Peak, timed
from stages.rag.batches import RagBatch
from stages.rag.model import Rag
from stages.training.optimizer import make_optimizer

THEIR_CONTEXT_TOKENS = 300  # transformers' retriever pads every context to max_combined_length


def check_counterpart(options: Namespace) -> None:
    if options.against and not random_models.GENERATORS[options.shapes].is_encoder_decoder:
        raise ValueError("--against transformers: its RAG classes take no decoder-only generator")
    if options.against and options.reading != "each":
        raise ValueError(
            f"--against transformers: its RAG classes read each passage; leave out --reading {options.reading}"
        )


def their_model(rag: Rag, n_docs: int) -> RagSequenceForGeneration:
    """transformers' RAG over the same two models."""
    config = RagConfig.from_question_encoder_generator_configs(
        rag.question_encoder.config, rag.generator_model.config, n_docs=n_docs, bos_token_id=0, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return RagSequenceForGeneration(config=config, question_encoder=rag.question_encoder, generator=rag.generator_model)


def their_training(
    rag: Rag, options: Namespace, batch_size: int, accumulation: int, precision: str, device: torch.device
) -> dict:
    """transformers' RagSequenceForGeneration.forward: contexts padded to its 300 tokens, its loss, one AdamW step.

    It is spared its retriever: passages come from our search and arrive tokenized.
    """
    theirs = their_model(rag, options.n_docs)
    theirs.train()
    rates = Namespace(
        weight_decay=0.01, learning_rate=3e-5, question_encoder_learning_rate=None, reranker_learning_rate=None,
        prior_learning_rate=1e-2,
    )  # fmt: skip
    optimizer = make_optimizer(rag, rates)
    batches = batches_of(rag, batch_size)

    def micro_batch() -> None:
        batch = next(batches)
        with torch.autocast(device.type, dtype_of(precision), enabled=precision != "no"):
            rows, scores = rag.retrieve(rag.encode_questions(batch))
            input_ids, mask = padded_contexts(rag, batch, rows)
            labels = torch.cat([torch.zeros_like(batch.targets[:, :1]), batch.targets], dim=1)
            output = theirs(
                context_input_ids=input_ids, context_attention_mask=mask, doc_scores=scores, labels=labels,
                decoder_input_ids=labels, reduce_loss=True,
            )  # fmt: skip
        (output.loss / (batch_size * accumulation)).backward()

    def step() -> None:
        for _ in range(accumulation):
            micro_batch()
        torch.nn.utils.clip_grad_norm_(rag.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    peak = Peak(device)
    peak.start()
    seconds = timed(step, max(3, min(options.runs, 5)), device)
    return {"seconds_per_step": seconds, "peak_gib": peak.gib()}


def batches_of(rag: Rag, batch_size: int) -> Iterator[RagBatch]:
    examples, first = random_models.random_examples(rag, batch_size * 64), 0
    while True:
        yield rag.batch(examples, list(range(first, first + batch_size)))
        first = (first + batch_size) % len(examples)


def padded_contexts(rag: Rag, batch: RagBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts as transformers' retriever gives them: padded to its fixed length."""
    input_ids, mask = rag.contexts(batch, rows)
    more = max(0, THEIR_CONTEXT_TOKENS - input_ids.shape[1])
    pad = torch.nn.functional.pad
    return pad(input_ids, (0, more), value=rag.generator.pad_token_id), pad(mask, (0, more))


def dtype_of(precision: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
