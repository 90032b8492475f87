"""Stage 3c: a cross-encoder learns to rank what dense and lexical search find, where models.reranker names one.

    python -m stages.reranker                       # from data/prepared, positives, retriever, index, ...; writes data/reranker
    dvc exp run -S models.reranker=FOLDER           # the best retriever.n_docs of retriever.rerank_depth candidates are read
    dvc exp run -S retriever.reranker.steps=0       # a model that ranks already, as it is

Listwise, against wrong candidates; joint training goes on with it. metrics/reranker.json has the recall of the validation
questions' candidates as they came (by the retriever), by the reranker alone and by all scores together with the weights of
params.yaml, and the weights that would suit them best.
"""

import shutil
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.machine.stage_params import stage_params
from stages.params import Params

PREPARED, POSITIVES = Path("data/prepared"), Path("data/positives")
RETRIEVER, LEXICAL = Path("data/retriever"), Path("data/lexical")
VECTORS, INDEX = Path("data/vectors"), Path("data/index")
RERANKER, METRICS = Path("data/reranker"), Path("metrics/reranker.json")
RECALL_DEPTHS = (1, 5)


def main() -> None:
    params = stage_params("reranker")
    work = RERANKER.with_name(f"{RERANKER.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    metrics = {"steps": 0}
    if params.models.reranker:
        metrics = warm_up(work, params, prepare_torch(params.runtime))

    from stages.search import reranker_folder
    from stages.storage import manifest

    reranker_folder.record(work, params.models.reranker)
    manifest.record_folder(work)
    manifest.put_in_place(work, RERANKER)
    manifest.write_metrics(METRICS, metrics)


def warm_up(folder: Path, params: Params, device) -> dict[str, float]:
    """Writes the warm model and all passages as it reads them; returns its metrics."""
    import time

    import torch
    from datasets import Dataset

    from stages.bm25.hits import read_hits
    from stages.corpus.arrow import gold_rows, own_rows, read_rows
    from stages.corpus.token_store import TokenStore, write_tokens
    from stages.encoders.cross_encoder import load_cross_encoder
    from stages.encoders.encoder import load_encoder
    from stages.encoders.mining import HardNegatives, without_answers
    from stages.encoders.own_passages import OwnPassages
    from stages.encoders.reranker_warmup import batches, warm_up_reranker
    from stages.search.candidates import Candidates, Searched, ranking_metrics
    from stages.search.passage_index import load_index
    from stages.search.reranking import Reranker
    from stages.storage.outside_files import find

    settings, lengths, warmth = params.retriever, params.lengths, params.retriever.reranker
    torch.manual_seed(params.seed)
    encoder = load_cross_encoder(str(find(params.models.reranker)))
    encoder.model.to(device)
    passages = read_rows(PREPARED / "passages.arrow")
    room = encoder.passage_room(lengths.question_tokens, lengths.passage_tokens)
    chunks = (encoder.passage_rows(batch["title"], batch["text"], room) for batch in passages.iter(1000))
    write_tokens(folder / "tokens", chunks, len(encoder.tokenizer))
    reranker = Reranker(encoder, TokenStore.open(folder / "tokens", "reranker")).to(device)
    index = load_index(INDEX, VECTORS, params.index)
    asking = load_encoder(str(RETRIEVER / "question_encoder"), "models.question_encoder")

    def candidates(split: str, questions: Dataset, rows: torch.Tensor | None = None) -> Candidates:
        hits = read_hits(LEXICAL, split, settings.hybrid_depth, len(questions), len(passages))
        searched = Searched(index, asking, hits, params, device)
        return searched.candidates(
            questions, settings.rerank_depth, settings.score_scale, settings.hybrid_weight if hits else None, rows
        )

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
        found = candidates("train", train, rows)
        some = train.select(rows.tolist())
        pool = torch.full((len(known), found.rows.shape[1]), -1)
        own = OwnPassages([golds[row] for row in rows.tolist()], reranker.tokens)
        pool[seen] = without_answers(found.rows, list(some["answers"]), own, passages)
        positives = torch.full((len(known), max(len(golds[row]) for row in known)), -1)
        for place, row in enumerate(known):
            positives[place, : len(golds[row])] = torch.tensor(golds[row])
        negatives = HardNegatives(pool, warmth.negatives)
        asked = encoder.question_rows(list(train.select(known)["question"]), lengths.question_tokens)
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

    validation = read_rows(PREPARED / "validation.arrow")
    found = candidates("validation", validation)
    metrics = {
        "steps": warmth.steps,
        **trained,
        **ranking_metrics(reranker, found, validation, gold_rows(validation, passages), params, RECALL_DEPTHS),
    }
    if "candidates_recall" not in metrics:
        print("no validation question names a gold passage: the ranking is not measured")
        return metrics
    print(
        "recall@1 of the validation questions' candidates "
        f"{metrics['candidates_recall_at_1']:.1f}, by the reranker {metrics['reranker_recall_at_1']:.1f}, by all scores "
        f"{metrics['reranked_recall_at_1']:.1f}"
    )
    return metrics


if __name__ == "__main__":
    run(main)
