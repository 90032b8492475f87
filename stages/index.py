"""Stage 3: every passage becomes a vector, the vectors a FAISS index by inner product.

    python -m stages.index                          # reads data/prepared and data/retriever, writes data/index
    dvc exp run -S index.factory=IVF64,Flat         # an approximate index

`vectors.npy` keeps the vectors themselves: training needs them for scores with a gradient.
"""

import json
import time
from pathlib import Path

from stages.params import load_params
from stages.runtime import prepare_torch, run

PREPARED, ENCODER, INDEX = Path("data/prepared"), Path("data/retriever/context_encoder"), Path("data/index")
METRICS = Path("metrics/index.json")
PASSAGES_A_CHUNK = 32768


def main() -> None:
    params = load_params()
    device = prepare_torch(params.runtime)
    import faiss
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import DPRContextEncoder

    from stages.contexts import TokenStore
    from stages.corpus import batches, read_rows
    from stages.encoders import load_encoder
    from stages.search import build_index, save_index

    faiss.omp_set_num_threads(torch.get_num_threads())
    passages = read_rows(PREPARED / "passages.arrow")
    encoder = load_encoder(str(ENCODER), "models.context_encoder", DPRContextEncoder)
    encoder.model.to(device)

    INDEX.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    shape = (len(passages), encoder.dimension)
    vectors = np.lib.format.open_memmap(INDEX / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
    done = 0
    bar = tqdm(total=len(passages), desc="encode passages", unit=" passages")
    for chunk in batches(passages, PASSAGES_A_CHUNK):
        titles, texts = [row["title"] for row in chunk], [row["text"] for row in chunk]
        store = TokenStore.from_rows(encoder.passage_rows(titles, texts, params.lengths.passage_tokens))
        for first, rows in encoder.vectors(store, params.index.batch_tokens, device):
            vectors[done + first : done + first + len(rows)] = rows
            bar.update(len(rows))
        done += len(chunk)
    bar.close()
    vectors.flush()
    seconds = time.perf_counter() - started

    index = build_index(vectors, params.index.factory)
    facts = {"factory": params.index.factory, "passages": len(passages), "dimension": encoder.dimension}
    save_index(INDEX, index, facts)
    metrics = {
        "passages": len(passages),
        "dimension": encoder.dimension,
        "passages_per_second": len(passages) / seconds,
        "encode_seconds": seconds,
        "index_bytes": (INDEX / "index.faiss").stat().st_size,
    }
    METRICS.parent.mkdir(exist_ok=True)
    METRICS.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"{len(passages)} passages, {encoder.dimension} dimensions, {params.index.factory}")


if __name__ == "__main__":
    run(main)
