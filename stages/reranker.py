"""Stage 3c: a cross-encoder learns to rank what dense and lexical search find; the weights of all scores are fitted.

    python -m stages.reranker                       # from data/prepared, positives, retriever, index, ...; writes data/reranker
    dvc exp run -S models.reranker=FOLDER           # the best retriever.n_docs of retriever.rerank_depth candidates are read
    dvc exp run -S retriever.reranker.steps=0       # a model that ranks already, as it is

models.reranker names the cross-encoder. Listwise, against wrong candidates; joint training goes on with it. Where retrieval
is hybrid or reranked, metrics/reranker.json has the recall of the validation questions by dense search and BM25 alone, by
their candidates as they came, by the reranker alone and by all scores together with the weights of params.yaml, and the
weights that would suit them best: there training starts with retriever.learn_weights.
"""

import shutil
import time
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.machine.stage_params import stage_params
from stages.params import Params

PREPARED, POSITIVES = Path("data/prepared"), Path("data/positives")
RETRIEVER, LEXICAL = Path("data/retriever"), Path("data/lexical")
VECTORS, INDEX = Path("data/vectors"), Path("data/index")
RERANKER, METRICS = Path("data/reranker"), Path("metrics/reranker.json")
RECALL_DEPTHS = (1, 5, 20)


def main() -> None:
    params = stage_params("reranker")
    work = RERANKER.with_name(f"{RERANKER.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    metrics, fitted = {"steps": 0}, None
    if params.models.reranker or params.retriever.hybrid_depth:
        metrics, fitted = rank(work, params, prepare_torch(params.runtime))

    from stages.search import reranker_folder
    from stages.storage import manifest

    reranker_folder.record(work, params.models.reranker, fitted)
    manifest.record_folder(work)
    manifest.put_in_place(work, RERANKER)
    manifest.write_metrics(METRICS, metrics)


def rank(folder: Path, params: Params, device) -> tuple[dict[str, float], dict[str, float] | None]:
    """Writes the warm reranker, where there is one; returns metrics of the validation questions' ranking and the prior's
    weights that suit it best."""
    from stages.corpus.arrow import gold_rows, read_rows
    from stages.search.candidates import ranking_metrics, reranker_scores

    passages, validation = (read_rows(PREPARED / f"{name}.arrow") for name in ("passages", "validation"))
    search = open_search(params, device, len(passages))
    trained, reranker = {"steps": 0}, None
    if params.models.reranker:
        trained, reranker = warm_up(folder, params, device, passages, search)
    settings = params.retriever
    found = search("validation", validation)
    alone = {}
    if settings.hybrid_depth:
        alone["dense"] = search("validation", validation, hybrid=False).rows
        alone["bm25"] = hits_of(params, "validation", len(validation), len(passages)).rows
    crossed, speed = None, {}
    if reranker:
        started = time.perf_counter()
        crossed = reranker_scores(reranker, found, validation["question"][:], params.lengths.question_tokens)
        speed = {"pairs_per_second": found.rows.numel() / (time.perf_counter() - started)}
    ranking, fitted = ranking_metrics(found, alone, crossed, gold_rows(validation, passages), settings, RECALL_DEPTHS)
    said = {
        "dense alone": "dense_recall_at_1", "BM25 alone": "bm25_recall_at_1", "candidates": "candidates_recall_at_1",
        "reranker alone": "reranker_recall_at_1", "all scores": "reranked_recall_at_1", "fitted": "fitted_recall_at_1",
    }  # fmt: skip
    if ranking:
        lines = [f"{name} {ranking[key]:.1f}" for name, key in said.items() if key in ranking]
        print(f"recall@1 of the validation questions: {', '.join(lines)}")
    else:
        print("no validation question names a gold passage: the ranking is not measured, no weights are fitted")
    return {**trained, **ranking, **speed}, fitted


def hits_of(params: Params, split: str, questions: int, passages: int):
    from stages.bm25.hits import read_hits

    return read_hits(LEXICAL, split, params.retriever.hybrid_depth, questions, passages)


def open_search(params: Params, device, passages: int):
    """The candidates of a split's questions, or of those that `rows` name, by all searches or by the dense one alone."""
    from stages.encoders.loading import load_encoder
    from stages.search.candidates import Searched
    from stages.search.passage_index import load_index

    index = load_index(INDEX, VECTORS, params.index)
    asking = load_encoder(str(RETRIEVER / "question_encoder"), "models.question_encoder")
    settings = params.retriever

    def search(split: str, questions, rows=None, hybrid: bool = True):
        hits = hits_of(params, split, len(questions), passages) if hybrid else None
        return Searched(index, asking, hits, params, device).candidates(
            questions, settings.rerank_depth, settings.score_scale, settings.hybrid_weight if hits else None, rows
        )

    return search


def warm_up(folder: Path, params: Params, device, passages, search):
    """Writes the warm model and all passages as it reads them; returns its metrics and itself."""
    import torch

    from stages.corpus.arrow import own_rows, read_rows
    from stages.corpus.token_store import TokenStore, write_tokens
    from stages.encoders.cross_encoder import load_cross_encoder
    from stages.encoders.mining import HardNegatives, without_answers
    from stages.encoders.own_passages import OwnPassages
    from stages.encoders.reranker_warmup import batches, warm_up_reranker
    from stages.search.reranking import Reranker
    from stages.storage.model_folders import part_of
    from stages.storage.outside_files import find

    lengths, warmth = params.lengths, params.retriever.reranker
    torch.manual_seed(params.seed)
    encoder = load_cross_encoder(str(find(part_of(params.models.reranker, "reranker"))))
    encoder.model.to(device)
    room = encoder.passage_room(lengths.question_tokens, lengths.passage_tokens)
    chunks = (encoder.passage_rows(batch["title"], batch["text"], room) for batch in passages.iter(1000))
    write_tokens(folder / "tokens", chunks, len(encoder.tokenizer))
    reranker = Reranker(encoder, TokenStore.open(folder / "tokens", "reranker")).to(device)

    trained: dict[str, float] = {}
    if warmth.steps:
        train = read_rows(PREPARED / "train.arrow")
        golds = own_rows(train, read_rows(POSITIVES / "train.arrow"), passages)
        known = [row for row, gold in enumerate(golds) if gold]
        if not known:
            raise ValueError(
                f"{PREPARED / 'train.arrow'}: no question has a positive passage, the warm-up needs some; name them in "
                "data.fields.positive_ids, raise data.positives.depth to find them by answer, or set "
                "retriever.reranker.steps to 0"
            )
        # Candidates are searched for the questions alone that the steps will see.
        seen = torch.cat(list(batches(len(known), warmth.steps, warmth.batch_size, params.seed))).unique()
        rows = torch.tensor(known)[seen]
        found = search("train", train, rows)
        some = train.select(rows.tolist())
        pool = torch.full((len(known), found.rows.shape[1]), -1)
        own = OwnPassages([golds[row] for row in rows.tolist()], reranker.tokens)
        patterns = params.data.answers_are == "regex"
        pool[seen] = without_answers(
            found.rows, some["answers"][:], own, passages, patterns=patterns, unanswerable=params.data.unanswerable
        )
        positives = torch.full((len(known), max(len(golds[row]) for row in known)), -1)
        for place, row in enumerate(known):
            positives[place, : len(golds[row])] = torch.tensor(golds[row])
        negatives = HardNegatives(pool, warmth.negatives)
        asked = encoder.question_rows(train.select(known)["question"][:], lengths.question_tokens)
        started = time.perf_counter()
        loss = warm_up_reranker(
            encoder, TokenStore.from_rows(asked), reranker.tokens, positives, negatives, steps=warmth.steps,
            batch_size=warmth.batch_size, learning_rate=warmth.learning_rate, seed=params.seed, device=device,
        )  # fmt: skip
        trained = {
            "train_loss": loss,  # of the last step, in nats
            "hard_negatives_mined": HardNegatives(pool[seen], warmth.negatives).mean,  # a question
            "warmup_seconds": time.perf_counter() - started,
        }
    encoder.save(folder / "model")
    return {"steps": warmth.steps, **trained}, reranker


if __name__ == "__main__":
    run(main)
