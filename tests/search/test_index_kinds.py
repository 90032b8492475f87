"""Kinds of index: by inner product, honest before hours of encoding about what cannot work."""

import faiss
import numpy as np
import pytest
import torch

from stages.search.faiss_files import inner
from stages.search.index_kinds import build_index, empty_index, set_search_parameters
from stages.search.index_quality import recall_of_exact
from stages.search.passage_index import load_index
from stages.settings.retrieval import Index
from tests.tiny_rag import save_index

VECTORS = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32) * 3
QUERIES = np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32)


def settings(**changes):
    known = {
        "factory": "Flat",
        "import_path": None,
        "train_size": 256,
        "nprobe": None,
        "ef_search": None,
        "batch_tokens": 512,
    }
    return Index(**known | changes)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IDMap,Flat", "IVF8,Flat", "HNSW16", "SQ8", "IVF8,SQ8", "PQ4x4", "OPQ4,PQ4x4", "OPQ4,IVF8,PQ4x4"],
)
def test_kinds_search_by_inner_product_and_survive_the_disk(tmp_path, factory):
    index = build_index(VECTORS, factory, train_size=500)
    assert inner(index).metric_type == faiss.METRIC_INNER_PRODUCT and index.ntotal == len(VECTORS)
    np.save(tmp_path / "vectors.npy", VECTORS)
    save_index(tmp_path, index, {"factory": factory})
    loaded = load_index(tmp_path, tmp_path, settings())
    assert np.array_equal(loaded.search(torch.from_numpy(QUERIES), 5), index.search(QUERIES, 5)[1])


@pytest.mark.parametrize("factory", ["Flatt", "IVF", "", "IVF10000,Flat", "PQ4x10", "OPQ5,PQ5"])
def test_a_bad_factory_is_one_line_with_its_key_before_anything_is_encoded(factory):
    with pytest.raises(ValueError, match="index.factory") as error:
        empty_index(16, factory, 600)
    assert "\n" not in str(error.value)


def test_more_lists_than_passages_names_both_numbers():
    with pytest.raises(ValueError, match="'IVF10000,Flat' needs at least 10000 passages.*there are 600"):
        empty_index(16, "IVF10000,Flat", 600)


def test_the_training_sample_is_bounded():
    build_index(VECTORS, "IVF8,Flat", train_size=300)
    with pytest.raises(ValueError, match="index.factory: 'IVF400,Flat' cannot be trained on 300 passages"):
        build_index(VECTORS, "IVF400,Flat", train_size=300)


def test_search_parameters_reach_the_index_wherever_it_is_loaded(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    save_index(tmp_path, build_index(VECTORS, "IVF16,Flat"), {})
    exact = np.argsort(-(QUERIES @ VECTORS.T), axis=1)[:, :5]

    def found(**changes):
        rows = (
            load_index(tmp_path, tmp_path, settings(factory="IVF16,Flat", **changes))
            .search(torch.from_numpy(QUERIES), 5)
            .numpy()
        )
        return np.mean([len(set(a) & set(b)) for a, b in zip(rows, exact, strict=True)])

    assert found() == found(nprobe=1) < found(nprobe=4) < found(nprobe=16) == 5


@pytest.mark.parametrize("factory", ["HNSW8", "IDMap,HNSW8", "OPQ4,HNSW8", "IVF16_HNSW8,Flat"])
def test_ef_search_reaches_the_graph(factory):
    index = build_index(VECTORS, factory)
    set_search_parameters(index, ef_search=77)
    lists = faiss.try_extract_index_ivf(index)
    assert faiss.downcast_index(lists.quantizer if lists else inner(index)).hnsw.efSearch == 77


@pytest.mark.parametrize(
    ("factory", "name"),
    [("Flat", "nprobe"), ("HNSW8", "nprobe"), ("Flat", "ef_search"), ("IVF8,Flat", "ef_search"), ("SQ8", "nprobe")],
)
def test_a_parameter_that_the_kind_does_not_have_is_named(factory, name):
    with pytest.raises(ValueError, match=f"index.{name}: .*has no such parameter.*null") as error:
        set_search_parameters(empty_index(16, factory, 600), **{name: 4})
    assert "\n" not in str(error.value)


def test_more_probes_than_lists():
    with pytest.raises(ValueError, match="index.nprobe: 9, but the index has only 8 lists"):
        set_search_parameters(empty_index(16, "IVF8,Flat", 600), nprobe=9)


def test_recall_against_exact_search_counts_by_score():
    vectors, questions = torch.from_numpy(VECTORS).clone(), torch.from_numpy(QUERIES)
    scores, rows = (questions @ vectors.T).topk(50)
    assert set(recall_of_exact(questions, scores, rows, vectors).values()) == {100.0}
    half = rows.clone()
    half[:20] = -1
    assert recall_of_exact(questions, scores, half, vectors)["recall_of_exact_at_5"] == 50.0
    vectors[599] = vectors[int(rows[0, 0])]  # a twin is as good
    twin = rows.clone()
    twin[0, 0] = 599
    scores = (questions @ vectors.T).topk(50).values
    assert recall_of_exact(questions[:1], scores[:1], twin[:1], vectors)["recall_of_exact_at_1"] == 100.0


def test_a_missing_passage_is_no_hit_even_where_row_0_is_the_best():
    vectors = torch.eye(60)
    scores, rows = (vectors[:1] @ vectors.T).topk(50)
    assert recall_of_exact(vectors[:1], scores, torch.full_like(rows, -1), vectors)["recall_of_exact_at_1"] == 0.0
