"""The index: inner products, honest about what it did not find, and about damage."""

import faiss
import numpy as np
import pytest
import torch

from stages.search import passage_index
from stages.search.index_kinds import build_index
from stages.search.passage_index import PassageIndex, doc_scores, flat_index, load_index
from stages.storage.manifest import put_in_place
from tests.tiny_rag import save_index

VECTORS = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32) * 3
QUERIES = torch.from_numpy(np.random.default_rng(1).normal(size=(7, 16)).astype(np.float32))


def test_flat_is_exact_by_inner_product():
    index = PassageIndex(build_index(VECTORS, "Flat"), torch.from_numpy(VECTORS))
    expected = np.argsort(-(QUERIES.numpy() @ VECTORS.T), axis=1)[:, :5]
    assert (index.search(QUERIES, 5).numpy() == expected).all()


def test_a_flat_index_searches_what_its_vectors_were_filled_with_and_they_outlive_it():
    index = flat_index(*VECTORS.shape)
    index.vectors[:] = torch.from_numpy(VECTORS)
    built = PassageIndex(build_index(VECTORS, "Flat"), torch.from_numpy(VECTORS))
    assert torch.equal(index.search(QUERIES, 5), built.search(QUERIES, 5))
    vectors = index.vectors[10:]
    del index
    assert torch.equal(vectors.clone(), torch.from_numpy(VECTORS[10:]))


def test_an_index_smaller_than_n_docs_says_so():
    index = PassageIndex(build_index(VECTORS[:3], "Flat"), torch.from_numpy(VECTORS[:3]))
    rows = index.search(QUERIES, 5)
    assert (rows[:, 3:] == -1).all() and (rows[:, :3] >= 0).all()
    scores = doc_scores(QUERIES, index.gather(rows), rows)
    assert torch.isinf(scores[:, 3:]).all() and torch.isfinite(scores[:, :3]).all()


def test_scores_are_fp32_under_autocast_and_carry_the_gradient():
    questions = QUERIES.clone().requires_grad_()
    rows = torch.arange(14).view(7, 2)
    with torch.autocast("cpu", torch.bfloat16):
        scores = doc_scores(questions, torch.from_numpy(VECTORS)[rows], rows)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (QUERIES[:, None] * torch.from_numpy(VECTORS)[rows]).sum(-1))
    scores[:, 0].sum().backward()
    torch.testing.assert_close(questions.grad, torch.from_numpy(VECTORS)[rows[:, 0]])


def write(folder):
    np.save(folder / "vectors.npy", VECTORS)
    save_index(folder, build_index(VECTORS, "Flat"), {"factory": "Flat"})


def test_round_trip(tmp_path):
    write(tmp_path)
    index = load_index(tmp_path, tmp_path)
    assert torch.equal(index.vectors, torch.from_numpy(VECTORS)) and index.index.ntotal == 600


@pytest.mark.parametrize("file", ["index.faiss", "vectors.npy", "index.json"])
def test_missing_parts_are_named(tmp_path, file):
    write(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: not found"):
        load_index(tmp_path, tmp_path)


@pytest.mark.parametrize("file", ["index.faiss", "vectors.npy"])
def test_cut_files_are_damaged(tmp_path, file):
    write(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged") as error:
        load_index(tmp_path, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", '{"factory": "IVF8,Flat"}'])
def test_a_broken_or_altered_description_is_damage(tmp_path, content):
    write(tmp_path)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="damaged .index.json.*; run `dvc repro --force index`") as error:
        load_index(tmp_path, tmp_path)
    assert "\n" not in str(error.value)


def test_one_altered_byte_is_damage(tmp_path):
    write(tmp_path)
    content = bytearray((tmp_path / "vectors.npy").read_bytes())
    content[3000] ^= 1
    (tmp_path / "vectors.npy").write_bytes(content)
    with pytest.raises(ValueError, match="damaged .vectors.npy was altered"):
        load_index(tmp_path, tmp_path)


def test_a_new_index_takes_the_old_ones_place(tmp_path):
    for name in ("work", "index"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    (tmp_path / "index" / "old").write_text("old")
    put_in_place(tmp_path / "work", tmp_path / "index")
    assert [folder.name for folder in tmp_path.iterdir()] == ["index"]
    assert (
        load_index(tmp_path / "index", tmp_path / "index").index.ntotal == 600
        and not (tmp_path / "index" / "old").exists()
    )


def test_parts_that_do_not_belong_together(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "vectors.npy", VECTORS[:-1])
    save_index(tmp_path, build_index(VECTORS, "Flat"), {"factory": "Flat"})
    with pytest.raises(ValueError, match="600 vectors.*599"):
        load_index(tmp_path, tmp_path)


def test_a_faiss_whose_kernels_abort_on_this_gpu_searches_on_the_cpu(monkeypatch, capfd):
    index = faiss.IndexFlatIP(4)
    monkeypatch.setattr(passage_index, "finds_gpu", lambda: True)
    monkeypatch.setattr(passage_index, "PROBE", "import os; os.abort()")
    passage_index.kernels_run.cache_clear()
    try:
        assert passage_index.on_gpu(index, torch.device("cuda")) is index
    finally:
        passage_index.kernels_run.cache_clear()
    assert "IndexFlatIP stays on the CPU: faiss" in capfd.readouterr().err


@pytest.mark.parametrize("free", [0, 1e9], ids=["trained there", "filled there too"])
def test_an_index_built_with_a_gpu_is_the_one_built_without(free, monkeypatch):
    moved = []
    monkeypatch.setattr(
        passage_index, "on_gpu", lambda index, device: moved.append(faiss.clone_index(index)) or moved[0]
    )
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", faiss.clone_index, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1e9))
    built = passage_index.build_index_on(torch.device("cuda"), VECTORS, "IVF8,Flat")
    assert moved[0].is_trained and moved[0].ntotal == (600 if free else 0)
    expected = build_index(VECTORS, "IVF8,Flat")
    assert np.array_equal(built.search(QUERIES.numpy(), 5)[1], expected.search(QUERIES.numpy(), 5)[1])
    assert built.ntotal == 600


def test_what_a_gpu_cannot_build_is_built_on_the_cpu(monkeypatch, capfd):
    def refuse(*arguments):
        raise ValueError("no memory there")

    monkeypatch.setattr(passage_index, "on_gpu", lambda index, device: faiss.clone_index(index))
    monkeypatch.setattr(passage_index, "train", refuse)
    built = passage_index.build_index_on(torch.device("cuda"), VECTORS, "IVF8,Flat")
    assert built.ntotal == 600
    assert (
        "IndexIVFFlat is built on the CPU: FAISS does not build it on this GPU (no memory there)"
        in capfd.readouterr().err
    )


@pytest.mark.skipif(not passage_index.finds_gpu(), reason="FAISS's own search on a GPU")
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8"])
def test_faiss_on_a_gpu_finds_what_it_finds_on_the_cpu(factory, capfd):
    index = build_index(VECTORS, factory)
    if hasattr(index, "nprobe"):
        index.nprobe = 4
    there = passage_index.on_gpu(index, torch.device("cuda", 0))
    assert there is not index, capfd.readouterr().err
    built = passage_index.build_index_on(torch.device("cuda", 0), VECTORS, factory)
    assert built.ntotal == 600 and isinstance(built, type(index))
    for found, expected in zip(there.search(QUERIES.numpy(), 5), index.search(QUERIES.numpy(), 5), strict=True):
        assert np.allclose(found, expected, rtol=1e-5)
