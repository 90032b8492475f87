"""What `python -m stages.bench` measures: one function a mode, each giving a dictionary of plain numbers.

Times are medians over runs after a warm-up, read when the device has finished. Peak memory is what tensors held at most.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import DPRContextEncoder, RagConfig, RagSequenceForGeneration

from stages import marginalization, shapes
from stages.decoding import generate
from stages.params import Recipe, Train
from stages.rag import Rag, RagBatch
from stages.recipes import mixed_precision
from stages.throughput import matrix_rate, synchronize
from stages.training import Trainer, make_optimizer

THEIR_CONTEXT_TOKENS = 300  # transformers' retriever pads every context to max_combined_length
NEW = {
    "marginalization": "sequence", "accumulation": "across_batches", "batching": "true_batches", "precision": "auto",
    "checkpoints": "last", "tensorboard": False, "retriever_gradient": "exact",
}  # fmt: skip
OLD = NEW | {
    "marginalization": "average", "accumulation": "within_batch", "batching": "one_at_a_time", "precision": "fp32",
    "retriever_gradient": "none",
}  # fmt: skip


def machine(device: torch.device) -> dict:
    """The device and the rate of its matrix products, which all MFU refers to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"device": name, "torch": torch.__version__, "matrix_tflop_per_second": matrix_rate(device, half) / 1e12}


def timed(run: Callable[[], object], runs: int, device: torch.device) -> dict[str, float]:
    """Seconds of `run` over `runs` runs after one that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return spread(seconds[1:])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "best": min(values), "worst": max(values)}


class Peak:
    """GiB that tensors held on the GPU at most since `start`; zero on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def gib(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0


def bench_train(options: Namespace, device: torch.device) -> dict:
    """Seconds an optimizer step of the real trainer and, beside it, of transformers' forward on the same model."""
    check_counterpart(options)
    batch_size, accumulation = map(int, options.batch.split("x"))
    rag = shapes.random_rag(options.shapes, options.passages[0], options.n_docs, device)
    if rag.packed and options.compiled:
        rag.packed.compile()
    results = {"batch": options.batch, "recipe": options.recipe, "compiled": options.compiled}
    results["ours"] = ours_training(rag, options, batch_size, accumulation, device)
    if options.against:
        precision = mixed_precision(options.precision, device)
        theirs = their_training(rag, options, batch_size, accumulation, precision, device)
        results[options.against] = theirs
        results["times_as_fast"] = theirs["seconds_per_step"]["median"] / results["ours"]["seconds_per_step"]["median"]
    return results


def check_counterpart(options: Namespace) -> None:
    if options.against and not shapes.GENERATORS[options.shapes].is_encoder_decoder:
        raise ValueError("--against transformers: its RAG classes take no decoder-only generator")


def ours_training(rag: Rag, options: Namespace, batch_size: int, accumulation: int, device: torch.device) -> dict:
    questions = batch_size * accumulation
    recipe = Recipe(**(OLD if options.recipe == "old" else NEW | {"precision": options.precision}))
    if options.recipe == "old":
        batch_size, accumulation = questions, questions
    steps = options.steps * (options.runs + 1)
    settings = Train(
        recipe=options.recipe, seed=1, max_steps=steps, batch_size=batch_size, gradient_accumulation_steps=accumulation,
        learning_rate=3e-5,
        question_encoder_learning_rate=None, context_encoder_learning_rate=None, warmup_steps=0, weight_decay=0.01,
        max_grad_norm=1.0, label_smoothing=0.0,
        logging_steps=options.steps, eval_steps=steps, save_steps=steps, save_total_limit=1,
        gradient_checkpointing=False, compile=False, halve_on_oom=False, max_skipped_steps=20, index_refresh_steps=0,
    )  # fmt: skip
    peak = Peak(device)
    points = []

    def on_point(point: dict) -> None:
        # The first point is the validation before training, the second the warm-up.
        points.append(point)
        if len(points) == 2:
            peak.start()

    trainer = Trainer(rag, recipe, settings, mixed_precision(recipe.precision, device), 1, None)
    trainer.run(shapes.random_examples(rag, questions * steps), shapes.random_examples(rag, 16), on_point)
    measured = points[2:]
    return {
        "seconds_per_step": spread([point["seconds_per_step"] for point in measured]),
        "peak_gib": peak.gib(),
        **{
            name: statistics.median(point[name] for point in measured)
            for name in ("mfu", "host_wait", "tokens_per_second", "questions_per_second", "train_loss_per_sequence")
        },
    }


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
    rates = Namespace(weight_decay=0.01, learning_rate=3e-5, question_encoder_learning_rate=None)
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
    examples, first = shapes.random_examples(rag, batch_size * 64), 0
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


def bench_index(options: Namespace, device: torch.device) -> dict:
    """Passages of 109 tokens in the mean that the context encoder turns into vectors, a second."""
    encoder = shapes.random_encoder(options.shapes, DPRContextEncoder)
    encoder.model.to(device)
    random = np.random.default_rng(0)
    rows = shapes.lengths(options.passages[0], 109, 20, 256, random)
    store = shapes.token_rows(rows, encoder.model.config.vocab_size, random)
    warm_up = shapes.token_rows(rows[:8192], encoder.model.config.vocab_size, random)
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
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {
        "passages": len(store),
        "passages_per_second": len(store) / seconds,
        "mfu": 2 * weights * float(rows.sum()) / seconds / rate,
        "peak_gib": peak.gib(),
    }


def bench_search(options: Namespace, device: torch.device) -> dict:
    """Milliseconds of one exact search for a batch of questions over all passages."""
    rag = shapes.random_rag(options.shapes, options.passages[0], options.n_docs, device)
    questions = torch.randn(int(options.batch.split("x")[0]), rag.index.vectors.shape[1], device=device)
    seconds = timed(lambda: rag.index.search(questions, options.n_docs), max(20, options.runs), device)
    return {
        "passages": options.passages[0],
        "questions": len(questions),
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
    }


@torch.no_grad()
def bench_decode(options: Namespace, device: torch.device) -> dict:
    """Questions a second by thorough decoding, and by transformers' own `generate` over a share of the same questions.

    Random weights hardly ever write EOS: every answer is as long as it may be, which is the most work there is.
    """
    check_counterpart(options)
    rag = shapes.random_rag(options.shapes, options.passages[0], options.n_docs, device)
    rag.eval()
    batch_size = int(options.batch.split("x")[0])
    batches = batches_of(rag, batch_size)

    def ours() -> None:
        batch = next(batches)
        rows, scores = rag.retrieve(rag.encode_questions(batch))
        input_ids, mask = rag.contexts(batch, rows)
        generate(
            rag.generator, input_ids.view(batch_size, options.n_docs, -1), mask.view(batch_size, options.n_docs, -1),
            marginalization.log_prior(scores), num_beams=options.num_beams, max_answer_tokens=options.answer_tokens,
            decoding="thorough", marginalization="sequence",
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


def bench_scale(options: Namespace, device: torch.device) -> dict:
    """Seconds a passage and peak memory of the real prepare, retriever and index stages over synthetic passages."""
    results = {}
    for count in options.passages:
        with tempfile.TemporaryDirectory() as folder:
            results[str(count)] = scale_of(Path(folder), count, options)
        print(f"{count} passages: {results[str(count)]}", file=sys.stderr)
    return {"by_passages": results}


def scale_of(folder: Path, count: int, options: Namespace) -> dict:
    root = Path(__file__).resolve().parent.parent
    folder.joinpath("data").mkdir()
    shutil.copytree(root / "data/tiny", folder / "data/tiny")
    random = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + letter) for letter in row) for row in random.integers(0, 26, (5000, 6))])
    with open(folder / "passages.jsonl", "w", encoding="utf-8") as file:
        for row in range(count):
            text = " ".join(words[random.integers(0, len(words), 60)])
            file.write(json.dumps({"id": str(row), "title": f"Passage {row}", "text": text}) + "\n")
    for split in ("train", "validation", "test"):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for row in range(64):
                question = {"question": f"What does {split} find in passage {row}?", "answers": [str(words[row])]}
                file.write(json.dumps(question) + "\n")
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    params["data"] |= {"source": "files"}
    params["data"]["files"] |= {name: f"{name}.jsonl" for name in ("passages", "train", "validation", "test")}
    params["retriever"]["steps"] = 0
    params["runtime"] |= {"device": options.device, "threads": options.threads}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    results = {"index_bytes_per_passage": 0.0}
    for stage in ("prepare", "retriever", "index"):
        results |= resources_of(stage, folder, root, count)
    results["index_bytes_per_passage"] = (folder / "data/index/index.faiss").stat().st_size / count
    return results


def resources_of(stage: str, folder: Path, root: Path, count: int) -> dict:
    """Seconds of a stage in a process of its own, and the memory that was resident there at most."""
    code = (
        "import resource, runpy, sys; sys.argv = [sys.argv[1]]; runpy.run_module(sys.argv[0], run_name='__main__');"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, f"stages.{stage}"], cwd=folder, env=os.environ | {"PYTHONPATH": str(root)}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ValueError(f"python -m stages.{stage} failed over {count} passages; its message is above")
    kilobytes = int(done.stdout.rsplit("peak ", 1)[1])
    return {f"{stage}_seconds": seconds, f"{stage}_peak_gib": kilobytes / 2**20}
