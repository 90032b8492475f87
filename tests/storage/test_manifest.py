"""Manifests: what was cut, altered or removed after it was written is found and named, cheaply for large files."""

import json
import os

import pytest

from stages.storage.manifest import (
    MANIFEST,
    WHOLE_FILE_LIMIT,
    check,
    damage,
    record,
    record_folder,
    write_json,
    write_metrics,
    write_whole,
)


def written(folder):
    (folder / "a").write_bytes(b"first file")
    (folder / "b").write_bytes(b"second file")
    record(folder / "a", folder / "b")
    return folder


def test_whole_files_are_whole_and_files_are_added(tmp_path):
    assert damage(written(tmp_path)) is None
    (tmp_path / "c").write_bytes(b"")
    assert damage(tmp_path, ("c",)) == "c is not recorded in manifest.json"
    record(tmp_path / "c")
    assert damage(tmp_path) is None and set(json.loads((tmp_path / MANIFEST).read_text())) == {"a", "b", "c"}


def test_what_was_written_again_is_recorded_again(tmp_path):
    written(tmp_path)
    (tmp_path / "a").write_bytes(b"other")
    assert "a" in damage(tmp_path)
    record(tmp_path / "a")
    assert damage(tmp_path) is None


@pytest.mark.parametrize("content", [None, b"", b"first fil", b"first file.", b"first filE"])
def test_missing_cut_longer_and_altered_files_are_named(tmp_path, content):
    file = written(tmp_path) / "a"
    file.unlink() if content is None else file.write_bytes(content)
    assert damage(tmp_path).startswith("a ") and damage(tmp_path, ("b",)) is None
    with pytest.raises(ValueError, match="damaged .a .*; do this") as error:
        check(tmp_path, None, "do this")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "7", '{"a": 3, "b": {}}', '{"a": {"size": 10}}'])
def test_a_manifest_that_says_nothing_is_damage(tmp_path, content):
    file = written(tmp_path) / MANIFEST
    file.unlink() if content is None else file.write_text(content)
    assert damage(tmp_path, ("a", "b"))


def test_subfolders_of_a_model_belong_to_it(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab").write_bytes(b"abc")
    record_folder(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "tokenizer" / "vocab").write_bytes(b"abd")
    assert damage(tmp_path) == "tokenizer/vocab was altered after it was written"


def test_large_files_are_checked_at_their_ends_and_wholly_on_demand(tmp_path):
    file = tmp_path / "vectors"
    with open(file, "wb") as stream:
        stream.truncate(WHOLE_FILE_LIMIT + 4096)
    record(file)

    def altered_at(place, byte):
        with open(file, "r+b") as stream:
            stream.seek(place)
            stream.write(byte)

    altered_at(WHOLE_FILE_LIMIT // 2, b"x")
    assert damage(tmp_path) is None and damage(tmp_path, whole=True) == "vectors was altered after it was written"
    altered_at(WHOLE_FILE_LIMIT + 4000, b"x")
    assert damage(tmp_path) == "vectors was altered after it was written"
    altered_at(WHOLE_FILE_LIMIT + 4000, b"\0")
    altered_at(10, b"x")
    assert damage(tmp_path) == "vectors was altered after it was written"


@pytest.mark.parametrize("write", [write_json, write_metrics, lambda file, value: write_whole(file, str(value))])
def test_what_is_written_takes_the_place_of_a_file_and_leaves_its_other_names_alone(tmp_path, write):
    """DVC's outputs are read-only hardlinks into its cache."""
    file, cached = tmp_path / "output", tmp_path / "cache"
    cached.write_text("cached")
    cached.chmod(0o444)
    os.link(cached, file)
    write(file, {"b": 1, "a": 2})
    assert cached.read_text() == "cached" and "b" in file.read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cache", "output"]
    write(tmp_path / "new" / "file", {})
    assert (tmp_path / "new" / "file").exists()


def test_metrics_keep_their_order(tmp_path):
    write_metrics(tmp_path / "m.json", {"b": 1, "a": 2})
    assert list(json.loads((tmp_path / "m.json").read_text())) == ["b", "a"]
