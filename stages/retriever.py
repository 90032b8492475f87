"""Stage 2: a short DPR warm-up of the question and context encoders on the training questions' gold passages.

    python -m stages.retriever                      # reads data/prepared, data/positives, writes data/retriever
    dvc exp run -S retriever.steps=0                # passes the encoders through as they are
    dvc exp run -S retriever.hard_negatives.count=1 -S retriever.hard_negatives.steps=30    # a second round

Joint training moves the question encoder alone, or the context encoder a little (train.index_refresh_steps), so that one
must know its corpus before the index is built.
"""

from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.machine.stage_params import stage_params

PREPARED, POSITIVES = Path("data/prepared"), Path("data/positives")
RETRIEVER, METRICS = Path("data/retriever"), Path("metrics/retriever.json")
SPLITS = ("train", "validation")


def main() -> None:
    params = stage_params("retriever")
    device = prepare_torch(params.runtime)
    import torch
    from transformers import DPRContextEncoder, DPRQuestionEncoder

    from stages.corpus.arrow import own_rows, read_rows, replacing
    from stages.corpus.token_store import TokenStore
    from stages.encoders.loading import check_pair, load_encoder
    from stages.encoders.mining import HardNegatives, best_hits, tokenize_passages, without_answers
    from stages.encoders.own_passages import OwnPassages
    from stages.encoders.warmup import WarmUp
    from stages.storage import manifest
    from stages.storage.model_folders import part_of
    from stages.storage.outside_files import find

    settings, lengths, models = params.retriever, params.lengths, params.models
    hard = settings.hard_negatives
    question_encoder, context_encoder = (
        load_encoder(
            str(find(part_of(getattr(models, part), part))), f"models.{part}", as_class, models.pooling, models.normalize,
            (models.question_prefix, models.passage_prefix),
        )
        for part, as_class in (("question_encoder", DPRQuestionEncoder), ("context_encoder", DPRContextEncoder))
    )  # fmt: skip
    check_pair(question_encoder, context_encoder)
    torch.manual_seed(params.seed)
    warm_up = WarmUp(question_encoder, context_encoder, device, settings.score_scale)

    passages = read_rows(PREPARED / "passages.arrow")
    known, gold, questions = {}, {}, {}
    for split in SPLITS:
        rows, found = (read_rows(folder / f"{split}.arrow") for folder in (PREPARED, POSITIVES))
        own = {row: some for row, some in enumerate(own_rows(rows, found, passages)) if some}
        if not own and (settings.steps or hard.count):
            raise ValueError(
                f"{PREPARED / split}.arrow: no question has a positive passage, the warm-up needs some; name them in "
                "data.fields.positive_ids, raise data.positives.depth to find them by answer, or set retriever.steps and "
                "retriever.hard_negatives.count to 0"
            )
        known[split], gold[split] = rows.select(list(own)), list(own.values())
        questions[split] = TokenStore.from_rows(
            question_encoder.question_rows(known[split]["question"][:], lengths.question_tokens)
        )
    # Only passages that some question asks about are read in training; they are renumbered to be tokenized alone.
    needed = sorted({passage for rows in gold.values() for some in rows for passage in some})
    renumbered = {passage: row for row, passage in enumerate(needed)}
    chosen = passages.select(needed)
    passage_rows = context_encoder.passage_rows(chosen["title"][:], chosen["text"][:], lengths.passage_tokens)
    passage_store = TokenStore.from_rows(passage_rows)
    positives = {
        split: OwnPassages([[renumbered[passage] for passage in some] for some in rows], passage_store)
        for split, rows in gold.items()
    }

    def validation_loss() -> dict[str, float]:
        if not len(known["validation"]):
            return {}
        loss = warm_up.validate(questions["validation"], passage_store, positives["validation"], settings.batch_size)
        return {"val_loss": loss}

    before = first_round = after = validation_loss()
    trained: dict[str, float] = {}
    if settings.steps:
        loss = warm_up.train(
            questions["train"], passage_store, positives["train"], steps=settings.steps, batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, seed=params.seed,
        )  # fmt: skip
        trained = {"train_loss": loss}
        first_round = after = validation_loss()
    mined = 0.0
    if hard.count:
        everything = tokenize_passages(context_encoder, passages, lengths.passage_tokens)
        own = OwnPassages(gold["train"], everything)
        hits = best_hits(question_encoder, context_encoder, questions["train"], everything, hard.depth, device)
        patterns = params.data.answers_are == "regex"
        answers = known["train"]["answers"][:]
        pool = without_answers(hits, answers, own, passages, hard.skip, patterns, params.data.unanswerable)
        negatives = HardNegatives(pool, hard.count)
        loss = warm_up.train(
            questions["train"], everything, own, steps=hard.steps, batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, seed=params.seed + 1, negatives=negatives,
        )  # fmt: skip
        trained = {"train_loss": loss}
        after, mined = validation_loss(), negatives.mean

    with replacing(RETRIEVER) as (made,):
        question_encoder.save(made / "question_encoder")
        context_encoder.save(made / "context_encoder")
    metrics = {
        "steps": settings.steps + (hard.steps if hard.count else 0),
        **trained,  # the loss of the last step, in the second round with hard negatives in it
        **{f"{name}_before": loss for name, loss in before.items()},
        **{f"{name}_first_round": loss for name, loss in first_round.items()},
        **after,  # no losses where no validation question has a positive
        "hard_negatives_mined": mined,  # a question
    }
    manifest.write_metrics(METRICS, metrics)
    change = (
        f"{before['val_loss']:.3f} -> {after['val_loss']:.3f} nats"
        if after
        else "not known, no question has a positive"
    )
    print(f"in-batch validation loss {change} after {metrics['steps']} steps")


if __name__ == "__main__":
    run(main)
