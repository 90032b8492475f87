"""Indexes from elsewhere: what fits is adopted, what does not is named in one line, and nothing ends the process."""

import faiss
import numpy as np
import pytest
from datasets import Dataset

from stages.search.adopted_index import check_sample, open_imported, write_vectors
from stages.search.index_kinds import build_index

VECTORS = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32) * 3
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
ROWS = np.arange(0, 600, 10)
ORDER = np.random.default_rng(3).permutation(600)


def written(path, index):
    faiss.write_index(index, str(path))
    return path


def with_ids(factory, ids):
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.add_with_ids(VECTORS[ids % 600], ids)
    return index


def refused(path, match, dimension=16, passages=600, encoded=VECTORS):
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ValueError, match=match) as error:
        check_sample(open_imported(path, dimension, passages), ROWS, encoded[ROWS])
    assert str(error.value).startswith("index.import_path") and "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW8", "IDMap,Flat", "IDMap2,Flat", "IDMap,IVF8,Flat"])
def test_exact_kinds_give_their_vectors(tmp_path, factory):
    imported = open_imported(written(tmp_path / "i", build_index(VECTORS, factory)), 16, 600)
    check_sample(imported, ROWS, VECTORS[ROWS])
    assert imported.holds_vectors
    write_vectors(imported, tmp_path / "vectors.npy")
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), VECTORS)


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IVF8,Flat", "IDMap2,HNSW8"])
def test_ids_put_vectors_in_the_passages_order(tmp_path, factory):
    imported = open_imported(written(tmp_path / "i", with_ids(factory, ORDER)), 16, 600)
    check_sample(imported, ROWS, VECTORS[ROWS])
    write_vectors(imported, tmp_path / "vectors.npy")
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), VECTORS)


@pytest.mark.parametrize("factory", ["SQ8", "IVF8,SQ8", "PQ8x4", "PCA12,Flat", "IDMap,SQ8"])
def test_compressed_kinds_are_recognised_and_their_vectors_encoded(tmp_path, factory):
    path = written(tmp_path / "i", build_index(VECTORS, factory))
    imported = open_imported(path, 16, 600)
    check_sample(imported, ROWS, VECTORS[ROWS])
    assert not imported.holds_vectors
    refused(path, "nearest to their own.*at least 75%", encoded=VECTORS[ORDER])


def test_a_file_of_datasets_loads(tmp_path):
    rows = Dataset.from_dict({"vectors": list(VECTORS)})
    rows.add_faiss_index("vectors", metric_type=faiss.METRIC_INNER_PRODUCT)
    rows.save_faiss_index("vectors", tmp_path / "i")
    imported = open_imported(tmp_path / "i", 16, 600)
    check_sample(imported, ROWS, VECTORS[ROWS])
    rows = Dataset.from_dict({"vectors": list(VECTORS)})
    rows.add_faiss_index("vectors")  # L2 is what datasets takes unasked
    rows.save_faiss_index("vectors", tmp_path / "l2")
    refused(tmp_path / "l2", "ranks by L2.*not of length 1.*METRIC_INNER_PRODUCT")


def test_l2_of_unit_vectors_is_the_same_order(tmp_path):
    index = faiss.IndexFlatL2(16)
    index.add(UNIT)
    imported = open_imported(written(tmp_path / "i", index), 16, 600)
    check_sample(imported, ROWS, UNIT[ROWS])
    write_vectors(imported, tmp_path / "vectors.npy")
    expected = np.argsort(-(UNIT[:5] @ UNIT.T), axis=1)[:, :3]
    assert np.array_equal(imported.index.search(UNIT[:5], 3)[1], expected)


def test_one_long_vector_outside_the_sample_is_found_too(tmp_path):
    index = faiss.IndexFlatL2(16)
    vectors = UNIT.copy()
    vectors[5] *= 2
    index.add(vectors)
    imported = open_imported(written(tmp_path / "i", index), 16, 600)
    check_sample(imported, ROWS, UNIT[ROWS])
    with pytest.raises(ValueError, match=r"ranks by L2.*passage 5"):
        write_vectors(imported, tmp_path / "vectors.npy")


def test_another_dimension(tmp_path):
    refused(
        written(tmp_path / "i", build_index(VECTORS, "Flat")), "16 dimensions, the context encoder makes 8", dimension=8
    )


def test_another_metric(tmp_path):
    index = faiss.IndexFlat(16, faiss.METRIC_L1)
    index.add(VECTORS)
    refused(written(tmp_path / "i", index), "metric .*METRIC_INNER_PRODUCT")


def test_another_number_of_passages(tmp_path):
    refused(written(tmp_path / "i", build_index(VECTORS, "Flat")), "600 vectors, data/prepared has 601", passages=601)


def test_other_vectors(tmp_path):
    refused(written(tmp_path / "i", build_index(VECTORS[ORDER], "Flat")), "passage .* differs by .*tolerance 0.05")
    refused(written(tmp_path / "i", build_index(np.full_like(VECTORS, np.nan), "Flat")), "differs by nan")


@pytest.mark.parametrize("ids", [np.arange(600) + 1, np.arange(600) % 599, np.arange(600) * 1000])
@pytest.mark.parametrize("factory", ["IDMap,Flat", "IVF8,Flat"])
def test_ids_that_are_not_row_numbers(tmp_path, ids, factory):
    refused(written(tmp_path / "i", with_ids(factory, ids)), "ids in its .* are not the row numbers 0 to 599")


def test_what_is_not_there(tmp_path):
    refused(tmp_path / "none", "not found")
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize("content", [b"", b"IxFI", b"hello " * 100, b"\x80\x04" + b"pickle" * 20, b"PK\x03\x04" * 30])
def test_what_is_no_index(tmp_path, content):
    (tmp_path / "i").write_bytes(content)
    refused(tmp_path / "i", "too few|not a FAISS index")


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
@pytest.mark.parametrize("keep", [33, 5000])
def test_cut_files(tmp_path, factory, keep):
    path = written(tmp_path / "i", build_index(VECTORS, factory))
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "damaged or not a FAISS index")


@pytest.mark.parametrize("place", [4, 8, 33, 37])
def test_altered_headers(tmp_path, place):
    path = written(tmp_path / "i", build_index(VECTORS, "Flat"))
    content = bytearray(path.read_bytes())
    content[place : place + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    refused(path, "index.import_path")


def test_dpr_s_auxiliary_dimension(tmp_path):
    """DPR's HNSW index turns the inner product into L2 by one dimension more."""
    index = faiss.IndexHNSWFlat(17, 8)
    index.add(np.pad(VECTORS, ((0, 0), (0, 1))))
    refused(written(tmp_path / "i", index), "17 dimensions, one more than the context encoder makes: DPR's auxiliary")
