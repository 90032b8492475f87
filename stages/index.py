"""Stage 3: every passage becomes a vector, the vectors a FAISS index by inner product.

    python -m stages.index                          # reads data/prepared and data/retriever, writes data/index
    dvc exp run -S index.factory=IVF64,Flat -S index.nprobe=8      # an approximate index
    dvc exp run -S index.import_path=my.faiss       # an index that was built elsewhere
    torchrun --nproc-per-node=4 -m stages.index     # or runtime.processes: 4; four ranks encode

`vectors.npy` keeps the vectors themselves: training needs them for scores with a gradient. Killed and started again, it
goes on with the first passages that are not encoded yet.
"""

import json
import shutil
import time
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.params import Params, load_params

PREPARED, RETRIEVER, INDEX = Path("data/prepared"), Path("data/retriever"), Path("data/index")
METRICS = Path("metrics/index.json")
RECALL_QUESTIONS = 256


def main() -> None:
    params = load_params()
    from stages.machine.launching import launch

    if launch(params.runtime.processes, params.runtime.device):
        return
    device = prepare_torch(params.runtime)
    from stages.compute import ranks

    with ranks.group(device):
        make_index(params, device)


def make_index(params: Params, device) -> None:
    """Every rank encodes its share of the passages; rank 0 alone builds the index."""
    import faiss
    import numpy as np
    import torch
    from transformers import DPRContextEncoder

    from stages.compute import ranks
    from stages.corpus.arrow import read_rows
    from stages.encoders.encoder import load_encoder
    from stages.search.adopted_index import SAMPLE, check_sample, open_imported, write_vectors
    from stages.search.index_kinds import empty_index, set_search_parameters
    from stages.search.index_quality import search_quality
    from stages.search.passage_index import build_index_on, describe_index, load_index, write_index
    from stages.search.passage_vectors import encode_passages, encode_some
    from stages.storage.checkpoints import checkpoint_folder, describe, fingerprint
    from stages.storage.manifest import put_in_place
    from stages.storage.outside_files import find

    settings, lengths = params.index, params.lengths
    faiss.omp_set_num_threads(torch.get_num_threads())
    passages = read_rows(PREPARED / "passages.arrow")
    encoder = load_encoder(str(RETRIEVER / "context_encoder"), "models.context_encoder", DPRContextEncoder)
    encoder.model.to(device)

    # What cannot work is known before hours of encoding.
    imported = None
    if settings.import_path:
        imported = open_imported(find(settings.import_path), encoder.dimension, len(passages))
        rows = np.sort(np.random.default_rng(0).permutation(len(passages))[:SAMPLE])
        check_sample(imported, rows, encode_some(encoder, passages, rows, lengths.passage_tokens, device))
        set_search_parameters(imported.index, settings)
    else:
        set_search_parameters(empty_index(encoder.dimension, settings.factory, len(passages)), settings)

    # Neither the kind of index nor what is searched changes a vector: they are not part of the fingerprint.
    copied = imported is not None and imported.holds_vectors
    what = {
        "passage_tokens": lengths.passage_tokens, "batch_tokens": settings.batch_tokens, "device": device.type, "copied": copied,
    }  # fmt: skip
    name = fingerprint(describe(what, [PREPARED / "passages.arrow", RETRIEVER / "context_encoder"]))
    ranks.wait()  # however unequally long the hosts' disks took
    ranks.check_same("fingerprint", int(name[:12], 16))
    work = checkpoint_folder(name)
    result = work / "index"
    result.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if copied and ranks.is_main():
        write_vectors(imported, result / "vectors.npy")
    elif not copied:
        encode_passages(encoder, passages, lengths.passage_tokens, settings.batch_tokens, device, work)
    encoded = time.perf_counter()
    if not ranks.is_main():
        return

    kind = "imported" if imported else settings.factory
    if imported:
        shutil.copyfile(imported.path, result / "index.faiss")
    else:
        vectors = np.load(result / "vectors.npy", mmap_mode="r", allow_pickle=False)
        write_index(build_index_on(device, vectors, settings.factory, settings.train_size), result)
    describe_index(result, {"factory": kind, "passages": len(passages), "dimension": encoder.dimension})
    built = time.perf_counter()

    asking = load_encoder(str(RETRIEVER / "question_encoder"), "models.question_encoder")
    asking.model.to(device)
    questions = read_rows(PREPARED / "validation.arrow")[:RECALL_QUESTIONS]["question"]
    metrics = {
        "passages": len(passages),
        "dimension": encoder.dimension,
        "encode_seconds": encoded - started,
        "passages_per_second": len(passages) / (encoded - started),
        "build_seconds": built - encoded,
        "index_bytes": (result / "index.faiss").stat().st_size,
        "vector_bytes": (result / "vectors.npy").stat().st_size,
        **search_quality(load_index(result, settings), asking, questions, lengths.question_tokens, device),
    }
    put_in_place(result, INDEX)
    shutil.rmtree(work)
    METRICS.parent.mkdir(exist_ok=True)
    METRICS.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"{len(passages)} passages, {encoder.dimension} dimensions, {kind}")


if __name__ == "__main__":
    run(main)
