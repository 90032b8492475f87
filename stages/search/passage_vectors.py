"""Vectors of all passages, encoded shard by shard: a killed run goes on after its last finished shard.

The shards are parts of one file that has its final size from the start, so that nothing is copied at the end. They lie
outside DVC's outputs, which DVC deletes before a stage runs. Several ranks deal the shards out: all write into the one
file, each keeps a list of its own shards, and any number of ranks goes on from the lists that are there.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from stages.compute import ranks
from stages.corpus.token_store import TokenStore, write_npy_header
from stages.encoders.encoder import Encoder
from stages.storage import manifest

if TYPE_CHECKING:  # the benchmarks encode what is no data set
    from datasets import Dataset

SHARD = 8192  # passages; 20 KB a passage while the tokenizer works
# Shards tokenized at once beside the one that is encoded: a GPU is faster than one thread's share of the tokenizing.
AHEAD = {"cpu": 1, "cuda": 3}
FINISHED = "shards.json"
OF_A_RANK = "shards-{}.json"  # beside rank 0's, until the next start puts them together


def encode_passages(
    encoder: Encoder, passages: "Dataset", passage_tokens: int, batch_tokens: int, device: torch.device, folder: Path,
    shard: int = SHARD,
) -> Path:  # fmt: skip
    """Writes the passages' vectors as `folder/vectors/vectors.npy`, fp32 [N, d], and returns its path.

    `folder` belongs to these passages, this encoder and these settings alone. A finished shard that is there already,
    and whose hash is right, is not encoded again; a shard's vectors do not depend on whether that happened. Returns on
    every rank when all vectors are there.
    """
    file = folder / "vectors" / "vectors.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    if ranks.is_main():
        start = _prepare(file, (len(passages), encoder.dimension))
        finished = _finished(folder, file, start, 4 * encoder.dimension)
        _write_one_list(folder, finished)
    ranks.wait()
    if not ranks.is_main():
        start = _prepare(file, (len(passages), encoder.dimension))
        finished = _lists(folder)
    todo = [first for first in range(0, len(passages), shard) if str(first) not in finished]
    ranks.wait()  # until all have read the list, which rank 0 goes on writing
    mine, own_list = ranks.share(todo), folder / FINISHED
    if not ranks.is_main():
        own_list, finished = folder / OF_A_RANK.format(ranks.rank()), {}

    def passages_in(shards: list[int]) -> int:
        return sum(min(shard, len(passages) - first) for first in shards)

    done = len(passages) - passages_in(todo)
    bar = tqdm(
        total=done + passages_in(mine), initial=done, desc="encode passages", unit=" passages",
        disable=not ranks.is_main(),
    )  # fmt: skip

    def write(first: int, rows: np.ndarray) -> None:
        content = rows.tobytes()
        vectors.seek(start + first * encoder.dimension * 4)
        vectors.write(content)
        vectors.flush()
        os.fsync(vectors.fileno())
        finished[str(first)] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_json(own_list, finished)

    stores = _tokenized(encoder, passages, passage_tokens, mine, shard, AHEAD[device.type])
    with open(file, "r+b") as vectors, bar, ThreadPoolExecutor(max_workers=1) as thread:
        # One shard is written while the next is encoded.
        written = None
        for first, rows in zip(mine, encoder.stream(stores, batch_tokens, device), strict=True):
            if written:
                written.result()
            written = thread.submit(write, first, rows)
            bar.update(len(rows))
        if written:
            written.result()
    ranks.wait()
    return file


def encode_some(
    encoder: Encoder, passages: "Dataset", rows: np.ndarray, passage_tokens: int, device: torch.device
) -> np.ndarray:
    """Vectors [R, d] of the named passages."""
    store = _store(encoder, passages[rows.tolist()], passage_tokens)
    return np.concatenate([vectors for _, vectors in encoder.vectors(store, 4096, device)])


def _tokenized(
    encoder: Encoder, passages: "Dataset", passage_tokens: int, todo: list[int], shard: int, ahead: int
) -> Iterator[TokenStore]:
    """Each shard's token ids; the next ones are made in threads while one is encoded (tokenizers release the GIL)."""

    def tokenize(first: int) -> TokenStore:
        return _store(encoder, passages[first : first + shard], passage_tokens)

    with ThreadPoolExecutor(max_workers=ahead) as threads:
        waiting = deque()
        for first in todo:
            waiting.append(threads.submit(tokenize, first))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _store(encoder: Encoder, chosen: dict[str, list[str]], passage_tokens: int) -> TokenStore:
    return TokenStore.from_rows(encoder.passage_rows(chosen["title"], chosen["text"], passage_tokens))


def _prepare(file: Path, shape: tuple[int, int]) -> int:
    """Gives the .npy file its header and its final size (what is not written takes no space); returns the header's length."""
    if not file.exists():
        file.touch()
        for recorded in file.parent.parent.glob("shards*.json"):
            recorded.unlink()
    header = io.BytesIO()
    write_npy_header(header, np.dtype(np.float32), shape)
    with open(file, "r+b") as vectors:
        vectors.write(header.getvalue())
        vectors.truncate(len(header.getvalue()) + 4 * shape[0] * shape[1])
    return len(header.getvalue())


def _finished(folder: Path, file: Path, start: int, row_bytes: int) -> dict[str, dict]:
    """The recorded shards whose content is what was recorded; the others are named and encoded again."""
    whole = {}
    with open(file, "rb") as vectors:
        for first, facts in _lists(folder).items():
            vectors.seek(start + int(first) * row_bytes)
            content = vectors.read(facts["size"])
            if len(content) == facts["size"] and hashlib.sha256(content).hexdigest() == facts["sha256"]:
                whole[first] = facts
            else:
                print(f"{file}: passages from {first} on are damaged and encoded again", file=sys.stderr)
    return whole


def _lists(folder: Path) -> dict[str, dict]:
    """What all ranks have recorded as finished; a list that cannot be read counts as empty."""
    recorded = {}
    for file in folder.glob("shards*.json"):
        with contextlib.suppress(OSError, ValueError):
            recorded |= json.loads(file.read_text(encoding="utf-8"))
    return recorded


def _write_one_list(folder: Path, finished: dict[str, dict]) -> None:
    """Makes one list of the lists, where there are several or several ranks read it: of what is whole, nothing else."""
    others = list(folder.glob(OF_A_RANK.format("*")))
    if others or ranks.world() > 1:
        manifest.write_json(folder / FINISHED, finished)
    for file in others:
        file.unlink()
