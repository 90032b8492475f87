"""What `python -m stages.bench` measures: one function a mode, each giving a dictionary of plain numbers.

Times are medians over runs after a warm-up, read when the device has finished. Peak memory is what torch held at most.
"""

import gc
import math
import statistics
import time
from argparse import Namespace
from functools import partial

import numpy as np
import torch
from transformers import DPRContextEncoder

from stages.bench import random_models
from stages.bench.counterpart import batches_of, check_counterpart, padded_contexts, their_model, their_training
from stages.bench.faiss_engines import compare_engines
from stages.bench.profiling import PROFILED_STEPS, profile_steps
from stages.bench.timing import Peak, spread, timed
from stages.compute.precision import generator_dtype, mixed_precision
from stages.evaluation.decoding import generate
from stages.generation import marginalization
from stages.rag.model import Rag
from stages.rag.opening import check_reading
from stages.rag.together import joint_contexts
from stages.settings.runs import Recipe, Train
from stages.training.throughput import matrix_rate, synchronize
from stages.training.trainer import Trainer

NEW = {
    "reading": "each", "marginalization": "sequence", "accumulation": "across_batches", "batching": "true_batches",
    "precision": "auto", "checkpoints": "last", "tensorboard": False, "retriever_gradient": "exact",
}  # fmt: skip
OLD = NEW | {
    "marginalization": "average", "accumulation": "within_batch", "batching": "one_at_a_time", "precision": "fp32",
    "retriever_gradient": "none",
}  # fmt: skip


def bench_train(options: Namespace, device: torch.device) -> dict:
    """Seconds an optimizer step of the real trainer and, beside it, of transformers' forward on the same model."""
    check_counterpart(options)
    batch_size, accumulation = map(int, options.batch.split("x"))
    rag = rag_to_train(options, device)
    results = {name: getattr(options, name) for name in ("batch", "n_docs", "recipe", "reading", "compiled", "graphs")}
    results["ours"] = ours_training(rag, options, batch_size, accumulation, device)
    if options.profile:
        profile_training(rag, options, batch_size, accumulation, device)
    if options.against:
        precision = mixed_precision(options.precision, device)
        give_back(rag)
        theirs = their_training(rag, options, batch_size, accumulation, precision, device)
        results[options.against] = theirs
        results["times_as_fast"] = theirs["seconds_per_step"]["median"] / results["ours"]["seconds_per_step"]["median"]
    return results


def rag_to_train(options: Namespace, device: torch.device) -> Rag:
    """Random weights of the chosen shapes over random passages, compiled if that is asked for."""
    rag = rag_of(options, device)
    if options.bf16_copy and precision_of(options, device) == "bf16":
        rag.work_in(torch.bfloat16)
    if rag.packed and options.compiled:
        rag.packed.compile()
    record_graphs(rag, options, device)
    return rag


def record_graphs(rag: Rag, options: Namespace, device: torch.device) -> None:
    """Graphs from here on, where they are asked for; those recorded before are forgotten."""
    if options.graphs and device.type == "cuda":
        rag.record_graphs(options.reading)


def rag_of(options: Namespace, device: torch.device) -> Rag:
    """Random weights of the chosen shapes over random passages. ValueError for a generator that cannot read as asked."""
    rag = random_models.random_rag(options.shapes, options.passages[0], options.n_docs, device)
    check_reading(rag.generator, options.reading)
    return rag


def precision_of(options: Namespace, device: torch.device) -> str:
    """accelerate's name of the precision that the recipe trains in."""
    return mixed_precision(OLD["precision"] if options.recipe == "old" else options.precision, device)


def give_back(rag: Rag) -> None:
    """Frees recorded graphs, gradients and working copy: what is measured next shall not pay for them."""
    rag.zero_grad(set_to_none=True)
    rag.working = None
    if rag.packed:
        rag.packed.graphs, rag.packed.model = None, rag.generator_model
    gc.collect()


def trainer_of(
    rag: Rag, options: Namespace, batch_size: int, accumulation: int, steps: int, logging_steps: int, device: torch.device
) -> Trainer:  # fmt: skip
    """The real trainer under the chosen recipe; it validates before the first of `steps` and behind the last."""
    if options.recipe == "old" and options.reading != "each":
        raise ValueError(
            f"--reading {options.reading}: the old recipe averages over passages read each; leave out one of the two"
        )
    gradient = "exact" if options.reading in ("each", "weighted") else "emdr2"
    new = NEW | {"reading": options.reading, "retriever_gradient": gradient, "precision": options.precision}
    recipe = Recipe(**(OLD if options.recipe == "old" else new))
    if options.recipe == "old":
        batch_size = accumulation = batch_size * accumulation
    settings = Train(
        recipe=options.recipe, seed=1, max_steps=steps, batch_size=batch_size, gradient_accumulation_steps=accumulation,
        learning_rate=3e-5,
        question_encoder_learning_rate=None, context_encoder_learning_rate=None, reranker_learning_rate=None,
        prior_learning_rate=1e-2, positives_weight=0.0, answers="first", warmup_steps=0, weight_decay=0.01,
        max_grad_norm=1.0, label_smoothing=0.0,
        logging_steps=logging_steps, eval_steps=steps, save_steps=steps, save_total_limit=1,
        gradient_checkpointing=False, compile=False, bf16_copy=False, halve_on_oom=False, max_skipped_steps=20,
        index_refresh_steps=0,
    )  # fmt: skip
    return Trainer(rag, recipe, settings, precision_of(options, device), 1, None)


def ours_training(rag: Rag, options: Namespace, batch_size: int, accumulation: int, device: torch.device) -> dict:
    steps = options.steps * (options.runs + 1)
    peak = Peak(device)
    points = []

    def on_point(point: dict) -> None:
        # The first point is the validation before training, the second the warm-up.
        points.append(point)
        if len(points) == 2:
            peak.start()

    trainer = trainer_of(rag, options, batch_size, accumulation, steps, options.steps, device)
    questions = random_models.random_examples(rag, batch_size * accumulation * steps)
    trainer.run(questions, random_models.random_examples(rag, 16), on_point)
    measured = points[2:]
    tokens = [point["tokens_per_second"] / point["questions_per_second"] for point in measured]
    return {
        "tokens_per_question": statistics.median(tokens),
        "seconds_per_step": spread([point["seconds_per_step"] for point in measured]),
        "peak_gib": peak.gib(),
        **{
            name: statistics.median(point[name] for point in measured)
            for name in ("mfu", "host_wait", "tokens_per_second", "questions_per_second", "train_loss_per_sequence")
            if name in measured[0]  # no mfu on a CPU
        },
    }


def profile_training(
    rag: Rag, options: Namespace, batch_size: int, accumulation: int, device: torch.device
) -> None:  # fmt: skip
    """Writes where the time of three steps goes to `options.profile`; see profiling.py."""
    steps = 2 * PROFILED_STEPS + 1  # some before, and one behind, because the last step is followed by the validation
    trainer = trainer_of(rag, options, batch_size, accumulation, steps, PROFILED_STEPS, device)
    questions = random_models.random_examples(rag, batch_size * accumulation * steps)
    validation = random_models.random_examples(rag, 2)
    text = profile_steps(lambda on_point: trainer.run(questions, validation, on_point), device)
    options.profile.parent.mkdir(parents=True, exist_ok=True)
    options.profile.write_text(text, encoding="utf-8")


def bench_index(options: Namespace, device: torch.device) -> dict:
    """Passages of 109 tokens in the mean that the context encoder turns into vectors, a second."""
    encoder = random_models.random_encoder(options.shapes, DPRContextEncoder)
    encoder.model.to(device)
    random = np.random.default_rng(0)
    rows = random_models.lengths(options.passages[0], 109, 20, 256, random)
    store = random_models.token_rows(rows, encoder.model.config.vocab_size, random)
    warm_up = random_models.token_rows(rows[:8192], encoder.model.config.vocab_size, random)
    for _ in encoder.vectors(warm_up, options.batch_tokens, device):
        pass
    synchronize(device)
    peak = Peak(device)
    peak.start()
    started = time.perf_counter()
    for _ in encoder.vectors(store, options.batch_tokens, device):
        pass
    seconds = time.perf_counter() - started
    weights = sum(p.numel() for name, p in encoder.model.named_parameters() if p.dim() > 1 and "embeddings" not in name)
    flop = 2 * weights * float(rows.sum())
    on_gpu = device.type == "cuda"
    return {
        "passages": len(store),
        "passages_per_second": len(store) / seconds,
        **({"mfu": flop / seconds / matrix_rate(device, torch.bfloat16)} if on_gpu else {}),
        "peak_gib": peak.gib(),
    }


def bench_search(options: Namespace, device: torch.device) -> dict:
    """Milliseconds of one exact search for a batch of questions over all passages, or of FAISS on a GPU and a CPU."""
    if options.engine == "faiss-gpu":
        return compare_engines(options, device)
    rag = random_models.random_rag(options.shapes, options.passages[0], options.n_docs, device)
    questions = torch.randn(int(options.batch.split("x")[0]), rag.index.vectors.shape[1], device=device)
    seconds = timed(lambda: rag.index.search(questions, options.n_docs), max(20, options.runs), device)
    return {
        "passages": options.passages[0],
        "questions": len(questions),
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
    }


@torch.no_grad()
def bench_decode(options: Namespace, device: torch.device) -> dict:
    """Questions a second by thorough decoding, or of passages read together, and by transformers' own `generate` over a share
    of the same questions.

    Both in the precision that evaluation has. Random weights hardly ever write EOS: every answer is as long as it may be,
    which is the most work there is.
    """
    check_counterpart(options)
    rag = rag_of(options, device)
    rag.eval()
    rag.generator_model.to(generator_dtype(options.precision, device))
    batch_size = int(options.batch.split("x")[0])
    batches = batches_of(rag, batch_size)

    def ours() -> None:
        batch = next(batches)
        rows, scores = rag.retrieve(rag.encode_questions(batch))
        input_ids, mask = rag.contexts(batch, rows)
        prior = marginalization.log_prior(scores)
        generate(
            rag.generator, input_ids.view(batch_size, options.n_docs, -1), mask.view(batch_size, options.n_docs, -1),
            prior, num_beams=options.num_beams, max_answer_tokens=options.answer_tokens,
            decoding="thorough", marginalization="sequence",
            joined=None if options.reading == "each" else partial(
                joint_contexts, rag, batch, rows, reading=options.reading, log_prior=prior
            ),
        )  # fmt: skip

    peak = Peak(device)
    peak.start()
    seconds = timed(ours, max(1, math.ceil(options.questions / batch_size)), device)
    results = {
        "questions_per_second": batch_size / seconds["median"],
        "seconds_for_3610_questions": 3610 * seconds["median"] / batch_size,
        "peak_gib": peak.gib(),
    }
    if options.against:
        theirs = their_model(rag, options.n_docs)
        theirs.eval()
        few = batches_of(rag, 2)

        def their_generate() -> None:
            batch = next(few)
            rows, scores = rag.retrieve(rag.encode_questions(batch))
            input_ids, mask = padded_contexts(rag, batch, rows)
            theirs.generate(
                context_input_ids=input_ids, context_attention_mask=mask, doc_scores=scores,
                num_beams=options.num_beams, max_length=options.answer_tokens + 1, decoder_start_token_id=0,
                do_sample=False,
            )  # fmt: skip

        theirs_seconds = timed(their_generate, min(3, options.runs), device)
        results["transformers"] = {"questions_per_second": 2 / theirs_seconds["median"]}
        results["times_as_fast"] = theirs_seconds["median"] / 2 / (seconds["median"] / batch_size)
    return results
