"""Hashes of large files: read once, remembered, and never believed where the file may have changed."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.storage import hashes, manifest

SIZE = 3 << 20
OLD = 1_700_000_000


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A file over the limit that was last changed long ago."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manifest, "WHOLE_FILE_LIMIT", 1 << 20)
    file = tmp_path / "large"
    file.write_bytes(bytes(SIZE))
    os.utime(file, (OLD, OLD))
    return file


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that were really read."""
    seen, read = [], hashes._read
    monkeypatch.setattr(hashes, "_read", lambda file: (seen.append(file), read(file))[1])
    return seen


def edit(file: Path, content: bytes, place: int = SIZE // 2) -> None:
    with open(file, "r+b") as stream:
        stream.seek(place)
        stream.write(content)


def test_read_once_and_again_after_an_edit_of_equal_length(large, reads):
    first = hashes.sha256_of(large)
    assert first == hashes.sha256_of(large) == hashlib.sha256(bytes(SIZE)).hexdigest() and reads == [large]
    edit(large, b"x")
    second = hashes.sha256_of(large)
    assert second == hashlib.sha256(large.read_bytes()).hexdigest() != first and len(reads) == 2


def test_another_file_in_its_place_is_read(large, reads):
    first = hashes.sha256_of(large)
    other = large.with_name("other")
    other.write_bytes(b"x" * SIZE)
    os.utime(other, (OLD, OLD))
    other.replace(large)
    assert hashes.sha256_of(large) != first and len(reads) == 2


def test_a_file_that_was_changed_a_moment_ago_is_never_remembered(large, reads, monkeypatch):
    """Changed again within the tick of its file system's clock, it would keep its time."""
    now = time.time()
    monkeypatch.setattr(hashes.time, "time", lambda: now + 1)  # however long the test takes
    os.utime(large, (now, now))
    first = hashes.sha256_of(large)
    edit(large, b"x")
    os.utime(large, (now, now))
    assert hashes.sha256_of(large) != first and len(reads) == 2
    os.utime(large, (now + 100, now + 100))  # of a host whose clock is ahead
    hashes.sha256_of(large)
    hashes.sha256_of(large)
    assert len(reads) == 4


def test_a_file_that_changes_while_it_is_read_is_not_remembered(large, monkeypatch):
    read = hashes._read
    monkeypatch.setattr(hashes, "_read", lambda file: (read(file), edit(file, b"y"))[0])
    hashes.sha256_of(large)
    monkeypatch.undo()
    os.utime(large, (OLD + 1, OLD + 1))
    assert hashes._remembered(large, large.parent / hashes.REMEMBERED) == hashlib.sha256(large.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"1": 2}'])
def test_a_damaged_memory_costs_a_reading(large, reads, content):
    first = hashes.sha256_of(large)
    (large.parent / hashes.REMEMBERED).write_text(content)
    assert hashes.sha256_of(large) == first and len(reads) == 2
    assert hashes.sha256_of(large) == first and len(reads) == 2


def test_where_nothing_can_be_remembered_it_is_read(large, reads, monkeypatch):
    (large.parent / hashes.FOLDER).write_text("a file in the folder's place")
    assert hashes.sha256_of(large) == hashes.sha256_of(large) and len(reads) == 2


def test_two_processes_read_one_file_once_and_forget_nothing_of_each_other(large):
    """Four processes, four files: all that they found is remembered."""
    files = [large]
    for number in range(3):
        files.append(large.with_name(f"large-{number}"))
        files[-1].write_bytes(bytes([number + 1]) * SIZE)
        os.utime(files[-1], (OLD, OLD))
    program = (
        "import sys; from pathlib import Path; from stages.storage import hashes, manifest\n"
        "manifest.WHOLE_FILE_LIMIT = 1 << 20; read = hashes._read\n"
        "hashes._read = lambda file: (print('read', file), read(file))[1]\n"
        "for name in sys.argv[1:]: hashes.sha256_of(Path(name))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, files[start:] + files[:start])], cwd=large.parent, env=environment,
            stdout=subprocess.PIPE, text=True,
        )
        for start in range(4)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted("".join(outputs).split("\n"))[1:] == sorted(f"read {file}" for file in files)
    known = json.loads((large.parent / hashes.REMEMBERED).read_text())
    assert {one["sha256"] for one in known.values()} == {
        hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
