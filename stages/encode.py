"""Stage 3: every passage becomes a vector.

    python -m stages.encode                         # reads data/prepared and data/retriever, writes data/vectors
    dvc exp run -S retriever.steps=0 -S index.import_path=my.faiss     # an index's vectors, or those of a .npy file
    torchrun --nproc-per-node=4 -m stages.encode    # or runtime.processes: 4; four ranks encode

Training needs the vectors themselves for scores with a gradient, beside any index of them. Killed and started again, it
goes on with the first passages that are not encoded yet.
"""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import root_folder, run
from stages.machine.stage_params import settings_of, stage_params
from stages.params import Params

PREPARED, RETRIEVER, VECTORS = Path("data/prepared"), Path("data/retriever"), Path("data/vectors")
METRICS = Path("metrics/encode.json")


def main() -> None:
    params = stage_params("encode")
    from stages.machine.launching import launch

    if launch(params.runtime.processes, params.runtime.device):
        return
    device = prepare_torch(params.runtime)
    from stages.compute import ranks

    with ranks.group(device):
        encode(params, device)


def encode(params: Params, device) -> None:
    """Every rank encodes its share of the passages; rank 0 alone puts the result in place."""
    from transformers import DPRContextEncoder

    from stages.compute import ranks
    from stages.corpus.arrow import read_rows
    from stages.encoders.loading import load_encoder
    from stages.search.passage_vectors import encode_passages
    from stages.storage import leftovers, manifest
    from stages.storage.checkpoints import checkpoint_folder, describe, fingerprint

    settings, lengths = params.index, params.lengths
    passages = read_rows(PREPARED / "passages.arrow")
    encoder = load_encoder(str(RETRIEVER / "context_encoder"), "models.context_encoder", DPRContextEncoder)
    encoder.model.to(device)

    # What cannot work is known before hours of encoding.
    copy = adopted(params, encoder, passages, device) if settings.import_path else None

    what = settings_of(params) | {"device": device.type}
    name = fingerprint(describe(what, [PREPARED / "passages.arrow", RETRIEVER / "context_encoder"]))
    ranks.wait()  # however unequally long the hosts' disks took
    ranks.check_same("fingerprint", int(name[:12], 16))
    lock = leftovers.lock(root_folder(), name, "encodes") if ranks.is_main() else None
    ranks.wait()
    work = checkpoint_folder(name)
    result = work / "vectors"
    result.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if copy and ranks.is_main():
        copy(result / "vectors.npy")
    elif not copy:
        encode_passages(encoder, passages, lengths.passage_tokens, settings.batch_tokens, device, work)
    seconds = time.perf_counter() - started
    if not ranks.is_main():
        return

    manifest.record(result / "vectors.npy")
    metrics = {
        "passages": len(passages),
        "dimension": encoder.dimension,
        "encode_seconds": seconds,
        "passages_per_second": len(passages) / seconds,
        "vector_bytes": (result / "vectors.npy").stat().st_size,
    }
    manifest.put_in_place(result, VECTORS)
    shutil.rmtree(work)
    lock.release()
    manifest.write_metrics(METRICS, metrics)
    print(f"{len(passages)} passages, {encoder.dimension} dimensions")


def adopted(params: Params, encoder, passages, device) -> Callable[[Path], None] | None:
    """What copies the vectors of index.import_path to a file, which hold what the context encoder makes of the passages.

    None where that is an index which does not hold them exactly. Raises ValueError where they do not fit.
    """
    import numpy as np

    from stages.search.adopted_index import SAMPLE, check_sample, open_imported, write_vectors
    from stages.search.own_vectors import check_own, open_own, write_own
    from stages.search.passage_vectors import encode_some
    from stages.storage.outside_files import find

    path, limit = find(params.index.import_path), params.lengths.passage_tokens
    rows = np.sort(np.random.default_rng(0).permutation(len(passages))[:SAMPLE])
    if not params.index.imports_index:
        vectors = open_own(path, encoder.dimension, len(passages))
        check_own(path, vectors, rows, encode_some(encoder, passages, rows, limit, device))
        return partial(write_own, path, vectors)
    imported = open_imported(path, encoder.dimension, len(passages))
    check_sample(imported, rows, encode_some(encoder, passages, rows, limit, device))
    return partial(write_vectors, imported) if imported.holds_vectors else None


if __name__ == "__main__":
    run(main)
