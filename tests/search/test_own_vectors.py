"""Vectors from elsewhere: what fits is taken as it is, what does not is named in one line."""

import numpy as np
import pytest

from stages.search.own_vectors import check_own, open_own, write_own

VECTORS = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32)
ROWS = np.arange(0, 600, 10)


def adopted(path, dimension=16, passages=600, encoded=VECTORS):
    vectors = open_own(path, dimension, passages)
    check_own(path, vectors, ROWS, encoded[ROWS])
    write_own(path, vectors, path.with_name("written.npy"))
    return np.load(path.with_name("written.npy"))


def refused(path, match, **given):
    with pytest.raises(ValueError, match=match) as error:
        adopted(path, **given)
    assert str(error.value).startswith(f"index.import_path: {path}") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_are_copied_in_fp32(tmp_path, kind, order):
    np.save(tmp_path / "mine.npy", np.asarray(VECTORS.astype(kind), order=order))
    found = adopted(tmp_path / "mine.npy")
    assert found.dtype == np.float32 and np.array_equal(found, VECTORS.astype(kind).astype(np.float32))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"passages": 599}, "holds 600 vectors, data/prepared has 599 passages"),
        ({"dimension": 32}, "16 dimensions, the context encoder makes 32"),
        ({"encoded": VECTORS[::-1]}, "vector of passage .* differs by .* another order"),
    ],
)
def test_what_belongs_to_other_passages_or_weights(tmp_path, given, match):
    np.save(tmp_path / "mine.npy", VECTORS)
    refused(tmp_path / "mine.npy", match, **given)


@pytest.mark.parametrize(
    "vectors", [VECTORS.astype(np.float64), VECTORS.astype(np.int32), VECTORS[0], VECTORS[None]], ids=str
)
def test_another_kind_of_array(tmp_path, vectors):
    np.save(tmp_path / "mine.npy", vectors)
    refused(tmp_path / "mine.npy", "give one array \\[passages, d\\] of float32 or float16")


@pytest.mark.parametrize("row", [10, 11])  # one that is encoded again, one that is not
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite(tmp_path, row, value):
    vectors = VECTORS.copy()
    vectors[row, 3] = value
    np.save(tmp_path / "mine.npy", vectors)
    refused(tmp_path / "mine.npy", f"the vector of passage {row} \\(from 0\\) holds NaN or infinity")


def test_what_is_no_array(tmp_path):
    path = tmp_path / "mine.npy"
    refused(path, "not found")
    for content in (b"", b"hello", b"\x80\x04" + b"pickle" * 20):
        path.write_bytes(content)
        refused(path, "damaged or no array of numbers")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(path, "damaged or no array of numbers")
    np.save(path, VECTORS)
    path.write_bytes(path.read_bytes()[:5000])
    refused(path, "damaged or no array of numbers")
    np.savez(tmp_path / "several.npz", a=VECTORS)
    (tmp_path / "several.npz").rename(path)
    refused(path, "holds several arrays")
