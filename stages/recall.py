"""How often the retriever finds a gold passage before joint training: dense, by BM25, and by both at several weights.

    dvc repro index lexical && python -m stages.recall          # the validation questions: choose retriever.hybrid_weight by them
    python -m stages.recall --split test --weights 0.3 1 --out recall.json

Not a stage. Reads data/prepared, data/retriever, data/index and, with retriever.hybrid_depth above 0, data/lexical.
"""

import argparse
import json
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.params import load_params

PREPARED, RETRIEVER, LEXICAL = Path("data/prepared"), Path("data/retriever"), Path("data/lexical")
VECTORS, INDEX = Path("data/vectors"), Path("data/index")
DEPTHS = (1, 5, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", choices=("train", "validation", "test"), default="validation")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0], help="retriever.hybrid_weight"
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON here too")
    arguments = parser.parse_args()
    params = load_params()
    device = prepare_torch(params.runtime)
    import numpy as np
    import torch

    from stages.bm25.hits import read_hits
    from stages.corpus.arrow import gold_rows, read_rows
    from stages.corpus.recall import recall_at
    from stages.corpus.token_store import TokenStore
    from stages.encoders.encoder import load_encoder
    from stages.search.fusion import fuse
    from stages.search.passage_index import load_index

    passages, questions = (read_rows(PREPARED / f"{name}.arrow") for name in ("passages", arguments.split))
    gold = gold_rows(questions, passages)
    if not any(gold):
        raise ValueError(f"{PREPARED / arguments.split}.arrow: no question names a gold passage, nothing to measure")
    depth, scale = params.retriever.hybrid_depth, params.retriever.score_scale
    hits = read_hits(LEXICAL, arguments.split, depth, len(questions), len(passages))
    index = load_index(INDEX, VECTORS, params.index).to(device)
    encoder = load_encoder(str(RETRIEVER / "question_encoder"), "models.question_encoder")
    encoder.model.to(device)
    rows = encoder.question_rows(list(questions["question"]), params.lengths.question_tokens)
    batches = encoder.vectors(TokenStore.from_rows(rows), params.index.batch_tokens, device)
    vectors = torch.from_numpy(np.concatenate([batch for _, batch in batches])).to(device)
    parts = torch.arange(len(questions)).split(256)
    dense = torch.cat([index.search(vectors[part], max(depth, *DEPTHS)).to(device) for part in parts])

    def recall(found: torch.Tensor) -> dict[str, float]:
        hit = [[row in some for row in rows] for some, rows in zip(gold, found.tolist(), strict=True) if some]
        return {f"recall_at_{k}": recall_at(hit, k) for k in DEPTHS}

    measured = {"dense": recall(dense)}
    if hits:
        hits = hits.to(device)
        measured["bm25"] = recall(hits.rows)
        for weight in arguments.weights:
            fused = [
                fuse(index, vectors[part], dense[part], hits.select(part), scale, weight, max(DEPTHS))[0]
                for part in parts
            ]
            measured[f"hybrid_{weight:g}"] = recall(torch.cat(fused))
    for name, values in measured.items():
        print(f"{name:12}" + "  ".join(f"{key} {value:5.1f}" for key, value in values.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
