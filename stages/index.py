"""Stage 3b: a FAISS index by inner product over the passages' vectors, and what it loses against exact search.

    python -m stages.index                          # reads data/vectors, writes data/index
    dvc exp run -S 'index.factory="IVF64,Flat"' -S index.nprobe=8     # an approximate index; nothing is encoded again
    dvc exp run -S retriever.steps=0 -S index.import_path=my.faiss     # an index that was built elsewhere, as it is

How thoroughly an approximate index is searched (nprobe, ef_search) is for the stages that search: here each of some
values is measured, so that metrics/index.json says which one to take.
"""

import shutil
import time
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.machine.stage_params import stage_params

PREPARED, RETRIEVER = Path("data/prepared"), Path("data/retriever")
VECTORS, INDEX, METRICS = Path("data/vectors"), Path("data/index"), Path("metrics/index.json")
RECALL_QUESTIONS = 256


def main() -> None:
    params = stage_params("index")
    device = prepare_torch(params.runtime)
    import faiss
    import torch

    from stages.corpus.arrow import read_rows, replacing
    from stages.encoders.loading import load_encoder
    from stages.search.index_quality import search_quality
    from stages.search.passage_index import build_index_on, describe_index, load_index, open_vectors, write_index
    from stages.storage import manifest
    from stages.storage.outside_files import find

    settings = params.index
    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = open_vectors(VECTORS)
    kind = "imported" if settings.imports_index else settings.factory
    started = time.perf_counter()
    with replacing(INDEX) as (made,):
        if settings.imports_index:
            shutil.copyfile(find(settings.import_path), made / "index.faiss")
        else:
            write_index(build_index_on(device, vectors, settings.factory, settings.train_size), made)
        describe_index(made, {"factory": kind, "passages": len(vectors), "dimension": vectors.shape[1]}, VECTORS)
    built = time.perf_counter() - started

    encoder = load_encoder(str(RETRIEVER / "question_encoder"), "models.question_encoder")
    encoder.model.to(device)
    questions = read_rows(PREPARED / "validation.arrow")[:RECALL_QUESTIONS]["question"]
    metrics = {
        "build_seconds": built,
        "index_bytes": (INDEX / "index.faiss").stat().st_size,
        **search_quality(load_index(INDEX, VECTORS), encoder, questions, params.lengths.question_tokens, device),
    }
    manifest.write_metrics(METRICS, metrics)
    print(f"{len(vectors)} passages, {vectors.shape[1]} dimensions, {kind}")


if __name__ == "__main__":
    run(main)
