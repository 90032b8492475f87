"""One size of the scaling curve: training, encoding and exact search by as many ranks as the launcher started.

Every rank calls these functions; rank 0's figures count. The work is the same at every size (strong scaling): the same
questions, passages and vectors, dealt out over the ranks by the code that the stages run.
"""

import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import DPRContextEncoder

from stages.bench import random_models
from stages.bench.measuring import rag_to_train, record_graphs, trainer_of
from stages.bench.timing import Peak, spread, timed
from stages.compute import ranks
from stages.compute.exact_search import ExactSearch
from stages.compute.out_of_memory import free_memory
from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder
from stages.machine import launching
from stages.rag.batches import Examples
from stages.rag.model import Rag
from stages.search.passage_vectors import encode_passages
from stages.search.sharded_search import ShardedSearch, part_of
from stages.storage.leftovers import FOLDER
from stages.training.gradient_sums import GradientSums
from stages.training.throughput import synchronize

VALIDATION_QUESTIONS = 64
PASSES_TO_RECORD = 100  # of a rank, until most sizes that occur have their CUDA graphs
SHARDS = 40  # of the passages to encode: as many for each of 1, 2, 4 and 8 ranks
TIMED_SUMS = 10
ROWS_A_BLOCK = 1 << 17  # random vectors made together
ROOM = 4 << 30  # bytes that a search needs beside its vectors


def bench_scaling(options: Namespace, device: torch.device) -> dict:
    """The figures of this number of ranks, each part's told on stderr when it is done.

    Raises ValueError where a step has fewer questions than there are ranks, or too few steps to time.
    """
    small, large = options.batches
    if small < ranks.world() or large % small:
        raise ValueError(
            f"--batches: at least {ranks.world()} (processes), and a multiple of that; not {small} {large}"
        )
    if options.training_steps < 2 * options.steps:
        raise ValueError(f"--training-steps: at least {2 * options.steps}, the first half of them being the warm-up")
    started = time.perf_counter()
    results = {"processes": ranks.world(), "training": told(training(options, device))}
    free_memory()
    results["encoding"] = told(encoding(options, device))
    free_memory()
    results["search"] = {}
    for count in options.search_passages:
        results["search"][str(count)] = told(searching(count, options, device))
        free_memory()
    return results | {"seconds": time.perf_counter() - started}


def told(part: dict) -> dict:
    if ranks.is_main():
        print(json.dumps(part), file=sys.stderr, flush=True)
    return part


def training(options: Namespace, device: torch.device) -> dict:
    """Steps of both effective batches through the real trainer, and how long they wait for the sums of gradients.

    At the smaller batch `options.training_steps` steps, validated before and after: their order of questions is the same
    at every size, their dropout masks are not (each rank draws its own), so that the losses agree within noise. Then
    the larger one, at most the smaller's number of questions a forward pass, the rest by accumulation.
    """
    small, large = options.batches
    rag = rag_to_train(options, device)
    ranks.wait()  # however unequally long that took
    torch.manual_seed(1)  # rank 0's masks; the trainer gives every other rank masks of its own
    points, of_small = trained(
        rag, options, 1, options.training_steps // 2, options.training_steps, options.steps, device
    )
    losses = [point["val_loss_per_sequence"] for point in points if "val_loss_per_sequence" in point]
    record_graphs(rag, options, device)  # they add to the first trainer's gradients
    free_memory()
    window, passes_a_step = max(1, options.steps // 2), max(1, large // small // ranks.world())
    warm_up = -(-PASSES_TO_RECORD // passes_a_step) if rag.packed and rag.packed.graphs else window
    _, of_large = trained(rag, options, large // small, warm_up, warm_up + window * options.runs, window, device)
    record_graphs(rag, options, device)
    free_memory()
    communication = summing(rag, random_models.random_examples(rag, small), device)
    for found in (of_small, of_large):
        waited = max(0.0, communication["seconds_waited"]["median"])
        found["communication_share"] = waited / found["seconds_per_step"]["median"]
    return {
        "by_batch": {str(small): of_small, str(large): of_large},
        "communication": communication,
        "validation_loss": {"steps": options.training_steps, "before": losses[0], "after": losses[-1]},
    }


def trained(
    rag: Rag, options: Namespace, accumulation: int, warm_up: int, steps: int, window: int, device: torch.device
) -> tuple[list[dict], dict]:
    """The points of a training of so many steps, and its figures over windows of steps behind the `warm_up` first."""
    questions = options.batches[0] * accumulation
    trainer = trainer_of(rag, options, options.batches[0], accumulation, steps, window, device)
    examples = random_models.random_examples(rag, questions * steps)
    peak = Peak(device)
    peak.start()
    trainer.run(examples, random_models.random_examples(rag, VALIDATION_QUESTIONS), lambda point: None)
    points = trainer.progress.history
    timed_points = [point for point in points if "seconds_per_step" in point and point["step"] - window >= warm_up]
    seconds = spread([point["seconds_per_step"] for point in timed_points])
    return points, {
        "seconds_per_step": seconds,
        "questions_per_second": questions / seconds["median"],
        **({"mfu": points[-1]["mfu"]} if device.type == "cuda" else {}),
        "peak_gib": peak.gib(),
    }


def summing(rag: Rag, questions: Examples, device: torch.device) -> dict:
    """Seconds of one sum of all gradients over the ranks: `seconds_per_sum` by itself, with nothing else to do on the
    device, and `seconds_waited`, by which a forward and backward pass over all `questions` takes longer with it.

    In a step the sum is begun within the last backward pass. What a rank waits for slower ones in a step is not counted:
    all begin together. One rank has no sum; a difference may be below zero by noise.
    """
    size = sum(parameter.nbytes for parameter in rag.parameters() if parameter.requires_grad)
    if ranks.world() == 1:
        return {"seconds_per_sum": spread([0.0]), "seconds_waited": spread([0.0]), "gradient_gib": size / 2**30}
    sums = GradientSums.of(rag)
    mine = ranks.share(list(range(len(questions))))

    def step(summed: bool) -> None:
        # The trainer has left its autocast around the model.
        loss = rag(rag.batch(questions, mine), marginal="sequence").nll.sum() / len(questions)
        if summed:
            sums.last_pass()
        loss.backward()
        if summed:
            sums.finish()

    alone, waited = [], []
    for _ in range(TIMED_SUMS + 1):
        without, with_sum, sum_alone = (
            seconds_of(work, device) for work in (lambda: step(False), lambda: step(True), sums.finish)
        )
        alone.append(sum_alone)
        waited.append(with_sum - without)
    sums.close()
    return {"seconds_per_sum": spread(alone[1:]), "seconds_waited": spread(waited[1:]), "gradient_gib": size / 2**30}


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """All ranks begin together; the end is read when the device has finished."""
    synchronize(device)
    ranks.wait()
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


class TokenizedPassages:
    """Random passages for the code that encodes a corpus, and their tokenizer in one: their text is token ids already."""

    # A tokenizer without special tokens, as corpus/text_tokens.py asks for them.
    pad_token_id, unk_token_id, chat_template, added_tokens_decoder = 0, None, None, {}

    def __init__(self, store: TokenStore):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: slice) -> dict[str, list]:
        bounds = self.store.offsets[rows.start : min(rows.stop, len(self)) + 1].tolist()
        ids = self.store.tokens[bounds[0] : bounds[-1]].tolist()
        texts = [ids[first - bounds[0] : last - bounds[0]] for first, last in zip(bounds, bounds[1:], strict=False)]
        return {"title": [""] * len(texts), "text": texts}

    def __call__(self, titles: list[str], texts: list[list[int]], **limits) -> dict[str, list[list[int]]]:
        return {"input_ids": texts}

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 0


def encoding(options: Namespace, device: torch.device) -> dict:
    """Passages a second of the index stage's own encoding: dealt out in shards, written into one file, hashed, fsynced.

    Spared are the tokenizer and the text. `alone` is the context encoder without the file, over a fifth of the passages.
    """
    model = random_models.random_encoder(options.shapes, DPRContextEncoder).model.to(device)
    random = np.random.default_rng(0)
    store = random_models.token_rows(
        random_models.lengths(options.passages[0], 109, 20, 256, random), model.config.vocab_size, random
    )
    passages = TokenizedPassages(store)
    encoder, shard = Encoder(model, passages), max(1, len(passages) // SHARDS)

    def encode(firsts: list[int]) -> None:
        parts = (TokenStore(store.tokens, store.offsets[first : first + shard + 1]) for first in firsts)
        for _ in encoder.stream(parts, options.batch_tokens, device):
            pass

    encode([0])
    fifth = range(0, max(shard, len(passages) // 5), shard)
    ranks.wait()
    started = time.perf_counter()
    encode(ranks.share(list(fifth)))
    ranks.wait()
    alone = time.perf_counter() - started

    folder = Path(FOLDER) / "scaling"
    if ranks.is_main():
        shutil.rmtree(folder, ignore_errors=True)  # of a killed call: it would go on from there
        folder.mkdir(parents=True)
    ranks.wait()
    started = time.perf_counter()
    encode_passages(encoder, passages, 256, options.batch_tokens, device, folder, shard)
    seconds = time.perf_counter() - started
    if ranks.is_main():
        shutil.rmtree(folder)
    return {
        "passages": len(passages),
        "seconds": seconds,
        "passages_per_second": len(passages) / seconds,
        "alone_passages_per_second": len(fifth) * shard / alone,
    }


def searching(count: int, options: Namespace, device: torch.device) -> dict:
    """Milliseconds of an exact search of `count` random bf16 vectors for a batch of questions, both dealt out.

    One rank alone searches without meeting anyone, as in training. The vectors are made where they are searched and are
    the same at every size, and so must be the rows that are found. `milliseconds` is None where they do not fit.
    """
    config = random_models.ENCODERS[options.shapes]
    dimension = config.projection_dim or config.hidden_size
    questions, rows = options.batches[0], part_of(count)
    ranks.wait()
    if not ranks.least([int(2 * len(rows) * dimension + ROOM <= free_bytes(device))])[0]:
        return {"questions": questions, "milliseconds": None, "rows_of_one_question": None}
    vectors = random_vectors(rows, dimension, device)
    search = ShardedSearch(vectors, device, rows.start) if ranks.world() > 1 else ExactSearch(vectors, device)
    asked = torch.randn(questions, dimension, generator=torch.Generator().manual_seed(0))
    mine = asked[ranks.share(list(range(questions)))].to(device)
    ranks.wait()
    found = search.search(mine, options.n_docs)
    seconds = timed(lambda: search.search(mine, options.n_docs), max(20, options.runs), device)
    return {
        "questions": questions,
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
        "rows_of_one_question": found[0].tolist(),
    }


def free_bytes(device: torch.device) -> int:
    """What is free on the GPU, or this rank's part of what is free on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // launching.ranks_on_this_host()


def random_vectors(rows: range, dimension: int, device: torch.device) -> Tensor:
    """The bf16 vectors [len(rows), dimension] of these rows, the same whoever holds which rows."""
    vectors = torch.empty(len(rows), dimension, dtype=torch.bfloat16, device=device)
    for block in range(rows.start // ROWS_A_BLOCK, -(-rows.stop // ROWS_A_BLOCK)):
        own = torch.Generator(device).manual_seed(block)
        made = torch.randn(ROWS_A_BLOCK, dimension, dtype=torch.bfloat16, device=device, generator=own)
        start = block * ROWS_A_BLOCK
        first, last = max(rows.start, start), min(rows.stop, start + ROWS_A_BLOCK)
        vectors[first - rows.start : last - rows.start] = made[first - start : last - start]
    return vectors
