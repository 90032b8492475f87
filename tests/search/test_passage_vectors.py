"""Encoding all passages: in order, shard by shard, and after a kill the same bytes as without."""

import hashlib
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset

from stages.encoders.loading import load_encoder
from stages.search.passage_vectors import encode_passages, encode_some

COUNT, SHARD, TOKENS, BATCH = 40, 8, 48, 512
CPU = torch.device("cpu")
TEXTS = [f"Passage number {i} says that {i * i} is the square of {i}. " * (1 + i % 5) for i in range(COUNT)]
PASSAGES = Dataset.from_dict({"title": [f"Title {i}" for i in range(COUNT)], "text": TEXTS})
KILLED_BEHIND_TWO_SHARDS = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = ["."]
from stages.storage import manifest
from tests.search import test_passage_vectors

write = manifest.write_json

def write_and_die(file, finished):
    write(file, finished)
    if len(finished) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

manifest.write_json = write_and_die
test_passage_vectors.encode(Path(sys.argv[1]))
"""


def encode(folder):
    encoder = load_encoder("data/tiny/encoder", "models.context_encoder")
    return encode_passages(encoder, PASSAGES, TOKENS, BATCH, CPU, folder, shard=SHARD)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("whole"))


def test_vectors_are_those_of_each_passage_in_order(whole):
    vectors = np.load(whole, mmap_mode="r", allow_pickle=False)
    encoder = load_encoder("data/tiny/encoder", "models.context_encoder")
    rows = np.array([0, 7, 8, 31, 39])
    assert vectors.shape == (COUNT, 256) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[rows], encode_some(encoder, PASSAGES, rows, TOKENS, CPU), rtol=1e-4, atol=1e-4)


def test_finished_shards_are_not_encoded_again_and_damaged_ones_are(whole, tmp_path, capsys):
    file = encode(tmp_path)
    assert file.read_bytes() == whole.read_bytes()
    content = bytearray(file.read_bytes())
    start = len(content) - COUNT * 256 * 4
    content[start + 2 * SHARD * 256 * 4 + 5] ^= 255
    file.write_bytes(content)
    encode(tmp_path)
    assert f"passages from {2 * SHARD} on are damaged" in capsys.readouterr().err
    assert file.read_bytes() == whole.read_bytes()


def test_a_finished_shard_is_believed_by_its_hash(whole, tmp_path):
    """Zeros that are recorded as finished stay, and the shards around them too."""
    file = encode(tmp_path)
    content, size = bytearray(file.read_bytes()), SHARD * 256 * 4
    start = len(content) - COUNT * 256 * 4 + size
    content[start : start + size] = bytes(size)
    file.write_bytes(content)
    finished = json.loads((tmp_path / "shards.json").read_text())
    finished[str(SHARD)]["sha256"] = hashlib.sha256(bytes(size)).hexdigest()
    (tmp_path / "shards.json").write_text(json.dumps(finished))
    assert encode(tmp_path).read_bytes() == content != whole.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "removed", "journal"])
def test_what_is_left_of_the_file_is_used_whatever_happened_to_it(whole, tmp_path, damage):
    file = encode(tmp_path)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: -3 * SHARD * 256 * 4 + 7])
    elif damage == "removed":
        file.unlink()
    else:
        (tmp_path / "shards.json").write_text('{"0": ')
    assert encode(tmp_path).read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_killed_process_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    command = [sys.executable, "-c", KILLED_BEHIND_TWO_SHARDS, str(tmp_path)]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == -signal.SIGKILL
    assert len(json.loads((tmp_path / "shards.json").read_text())) == 2
    assert (tmp_path / "vectors" / "vectors.npy").read_bytes() != whole.read_bytes()
    assert encode(tmp_path).read_bytes() == whole.read_bytes()
