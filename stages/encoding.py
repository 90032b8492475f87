"""Vectors of all passages, encoded shard by shard: a killed run goes on after its last finished shard.

The shards are parts of one file that has its final size from the start, so that nothing is copied at the end. They lie
outside DVC's outputs, which DVC deletes before a stage runs.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from stages.contexts import TokenStore
from stages.encoders import Encoder

SHARD = 8192  # passages; token ids of two shards are held at once, 20 KB a passage while the tokenizer works
FINISHED = "shards.json"


def encode_passages(
    encoder: Encoder, passages: Dataset, passage_tokens: int, batch_tokens: int, device: torch.device, folder: Path,
    shard: int = SHARD,
) -> Path:  # fmt: skip
    """Writes the passages' vectors as `folder/index/vectors.npy`, fp32 [N, d], and returns its path.

    `folder` belongs to these passages, this encoder and these settings alone. A finished shard that is there already,
    and whose hash is right, is not encoded again; a shard's vectors do not depend on whether that happened.
    """
    file = folder / "index" / "vectors.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    start = _prepare(file, (len(passages), encoder.dimension))
    finished = _finished(folder, file, start, 4 * encoder.dimension)
    todo = [first for first in range(0, len(passages), shard) if str(first) not in finished]
    done = len(passages) - sum(min(shard, len(passages) - first) for first in todo)
    bar = tqdm(total=len(passages), initial=done, desc="encode passages", unit=" passages")
    with open(file, "r+b") as vectors, bar:
        for first, store in _tokenized(encoder, passages, passage_tokens, todo, shard):
            digest = hashlib.sha256()
            vectors.seek(start + first * encoder.dimension * 4)
            for _, rows in encoder.vectors(store, batch_tokens, device):
                content = np.ascontiguousarray(rows, dtype=np.float32).tobytes()
                vectors.write(content)
                digest.update(content)
                bar.update(len(rows))
            vectors.flush()
            os.fsync(vectors.fileno())
            finished[str(first)] = {"size": len(store) * encoder.dimension * 4, "sha256": digest.hexdigest()}
            _write_finished(folder, finished)
    return file


def encode_some(
    encoder: Encoder, passages: Dataset, rows: np.ndarray, passage_tokens: int, device: torch.device
) -> np.ndarray:
    """Vectors [R, d] of the named passages."""
    chosen = passages[rows.tolist()]
    store = TokenStore.from_rows(encoder.passage_rows(chosen["title"], chosen["text"], passage_tokens))
    return np.concatenate([vectors for _, vectors in encoder.vectors(store, 4096, device)])


def _tokenized(
    encoder: Encoder, passages: Dataset, passage_tokens: int, todo: list[int], shard: int
) -> Iterator[tuple[int, TokenStore]]:
    """Each shard's token ids; the next one is made in a thread while this one is encoded (tokenizers release the GIL)."""

    def tokenize(first: int) -> TokenStore:
        chunk = passages[first : first + shard]
        return TokenStore.from_rows(encoder.passage_rows(chunk["title"], chunk["text"], passage_tokens))

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = [thread.submit(tokenize, first) for first in todo[:1]]
        for place, first in enumerate(todo):
            store = waiting.pop().result()
            waiting += [thread.submit(tokenize, following) for following in todo[place + 1 : place + 2]]
            yield first, store


def _prepare(file: Path, shape: tuple[int, int]) -> int:
    """Gives the .npy file its header and its final size (what is not written takes no space); returns the header's length."""
    if not file.exists():
        file.touch()
        (file.parent.parent / FINISHED).unlink(missing_ok=True)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    )
    with open(file, "r+b") as vectors:
        vectors.write(header.getvalue())
        vectors.truncate(len(header.getvalue()) + 4 * shape[0] * shape[1])
    return len(header.getvalue())


def _finished(folder: Path, file: Path, start: int, row_bytes: int) -> dict[str, dict]:
    """The recorded shards whose content is what was recorded; the others are named and encoded again."""
    try:
        recorded = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = {}
    with open(file, "rb") as vectors:
        for first, facts in recorded.items():
            vectors.seek(start + int(first) * row_bytes)
            content = vectors.read(facts["size"])
            if len(content) == facts["size"] and hashlib.sha256(content).hexdigest() == facts["sha256"]:
                whole[first] = facts
            else:
                print(f"{file}: passages from {first} on are damaged and encoded again", file=sys.stderr)
    return whole


def _write_finished(folder: Path, finished: dict[str, dict]) -> None:
    unfinished = folder / f"{FINISHED}.unfinished"
    with open(unfinished, "w", encoding="utf-8") as stream:
        json.dump(finished, stream)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(folder / FINISHED)
