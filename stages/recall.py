"""How often the retriever finds a gold passage: dense, by BM25, by both at several weights, and reranked.

    dvc repro reranker lexical && python -m stages.recall       # the validation questions: choose retriever.hybrid_weight by them
    python -m stages.recall --split test --weights 0.3 1 --depths 1 5 20 100 --out recall.json
    python -m stages.recall --split test --trained              # the same after joint training: encoder, reranker and weights

MRR@10 and nDCG@10 as trec_eval has them, nDCG by the grades of data.qrels. Where no question names a gold passage: how
often an answer's words stand in what is found. Not a stage. Reads data/prepared, data/retriever and data/index,
data/lexical if it has hits, and data/reranker if models.reranker is set; with --trained what data/model has of them.
"""

import argparse
import json
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.params import load_params

PREPARED, RETRIEVER, LEXICAL = Path("data/prepared"), Path("data/retriever"), Path("data/lexical")
VECTORS, INDEX = Path("data/vectors"), Path("data/index")
RERANKER, MODEL = Path("data/reranker"), Path("data/model")
DEPTHS = (1, 5, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", choices=("train", "validation", "test"), default="validation")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0], help="retriever.hybrid_weight"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, metavar="K", help="of recall@K, 1 to 1,000")
    parser.add_argument("--trained", action="store_true", help="by data/model in place of what training started from")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON here too")
    arguments = parser.parse_args()
    if not all(1 <= k <= 1000 for k in arguments.depths):
        parser.error("--depths: from 1 to 1,000")
    params = load_params()
    device = prepare_torch(params.runtime)
    import torch

    from stages.bm25.hits import read_hits
    from stages.bm25.hits_folder import kept_depth
    from stages.corpus.answers import hits_with_answers, with_an_answer
    from stages.corpus.arrow import gold_grades, read_rows
    from stages.corpus.ranking import RANKED, retrieval_scores
    from stages.corpus.recall import recalls
    from stages.encoders.loading import load_encoder
    from stages.rag.folder import load_rag_parts
    from stages.rag.prior import load_prior, starting_prior
    from stages.search.candidates import Searched, reranker_scores
    from stages.search.passage_index import index_folders, load_index
    from stages.search.reranking import load_reranker

    passages, questions = (read_rows(PREPARED / f"{name}.arrow") for name in ("passages", arguments.split))
    gold = gold_grades(questions, passages)
    settings, trained = params.retriever, arguments.trained
    model = MODEL if trained else Path("nowhere")
    reranks = params.models.reranker is not None
    prior = starting_prior(settings, RERANKER) if reranks and not trained else load_prior(model, settings)
    weights, named = prior(), prior.named
    if trained:
        encoder = load_rag_parts(MODEL)[0]
    else:
        encoder = load_encoder(str(RETRIEVER / "question_encoder"), "models.question_encoder")
    index = load_index(*index_folders(model, INDEX, VECTORS), params.index)
    # Whatever retrieval is set to: a reader must see what words alone find.
    hits = read_hits(LEXICAL, arguments.split, kept_depth(LEXICAL), len(questions), len(passages))
    searched = Searched(index, encoder, hits, params, device)
    depths = sorted(set(arguments.depths))
    depth = max(*depths, RANKED)

    # By the passages that questions name; where none names any, by the words of their answers.
    patterns = params.data.answers_are == "regex"
    answers = with_an_answer(questions["answers"], params.data.unanswerable)

    def recall(found: torch.Tensor) -> dict[str, float]:
        rows = found[:, :depth].tolist()
        if any(gold):
            return retrieval_scores(rows, gold, depths)
        rows = [rows[at] for at in answers]
        return recalls(list(hits_with_answers(passages, rows, list(answers.values()), patterns)), depths, "answer_")

    measured = {"dense": recall(searched.candidates(questions, depth, weights.score_scale, None).rows)}
    if hits:
        measured["bm25"] = recall(hits.rows)
        hybrid = named if reranks else weights
        for weight in dict.fromkeys([*arguments.weights, hybrid.hybrid_weight]):
            found = searched.candidates(questions, depth, weights.score_scale, weight)
            measured[f"hybrid_{weight:g}"] = recall(found.rows)
    reranker = load_reranker(RERANKER, params.models.reranker, MODEL / "reranker" if trained else None)
    if reranker:
        reranker.encoder.model.to(device)
        weight = named.hybrid_weight if hits and settings.hybrid_depth else None
        found = searched.candidates(questions, max(settings.rerank_depth, depth), named.score_scale, weight)
        crossed = reranker_scores(reranker.to(device), found, questions["question"][:], params.lengths.question_tokens)
        for name, scores in (
            ("reranker", crossed), ("reranked", found.scores(*weights[:2]) + weights.cross_weight * crossed)
        ):  # fmt: skip
            scores = scores.masked_fill(found.rows < 0, float("-inf"))
            # What evaluation does not rerank comes behind the others, in its own order.
            scores[:, settings.rerank_depth :] = float("-inf")
            order = scores.sort(dim=1, descending=True, stable=True).indices
            measured[name] = recall(found.rows.gather(1, order))
    for name, values in measured.items():
        print(f"{name:12}" + "  ".join(f"{key} {value:5.1f}" for key, value in values.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
