"""Stage 2: a short DPR warm-up of the question and context encoders on the training questions' gold passages.

    python -m stages.retriever                      # reads data/prepared, writes data/retriever
    dvc exp run -S retriever.steps=0                # passes the encoders through as they are
    dvc exp run -S retriever.hard_negatives.count=1 -S retriever.hard_negatives.steps=30    # a second round

Joint training moves the question encoder alone, or the context encoder a little (train.index_refresh_steps), so that one
must know its corpus before the index is built.
"""

from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.machine.stage_params import stage_params

PREPARED, RETRIEVER, METRICS = Path("data/prepared"), Path("data/retriever"), Path("metrics/retriever.json")


def main() -> None:
    params = stage_params("retriever")
    device = prepare_torch(params.runtime)
    import torch
    from transformers import DPRContextEncoder, DPRQuestionEncoder

    from stages.corpus.arrow import positions_of, read_rows, replacing
    from stages.corpus.token_store import TokenStore
    from stages.encoders.encoder import load_encoder
    from stages.encoders.mining import HardNegatives, best_hits, tokenize_passages, without_answers
    from stages.encoders.warmup import WarmUp
    from stages.storage import manifest
    from stages.storage.outside_files import find

    settings, lengths, models = params.retriever, params.lengths, params.models
    hard = settings.hard_negatives
    question_encoder, context_encoder = (
        load_encoder(
            str(find(getattr(models, part))), f"models.{part}", as_class, models.pooling, models.normalize,
            (models.question_prefix, models.passage_prefix),
        )
        for part, as_class in (("question_encoder", DPRQuestionEncoder), ("context_encoder", DPRContextEncoder))
    )  # fmt: skip
    if question_encoder.dimension != context_encoder.dimension:
        raise ValueError(
            f"models.context_encoder: its vectors have {context_encoder.dimension} dimensions, those of "
            f"models.question_encoder {question_encoder.dimension}; inner products need the same number"
        )
    torch.manual_seed(params.seed)
    warm_up = WarmUp(question_encoder, context_encoder, device, settings.score_scale)

    passages = read_rows(PREPARED / "passages.arrow")
    known = {
        split: [row for row in read_rows(PREPARED / f"{split}.arrow") if row["positive_ids"]]
        for split in ("train", "validation")
    }
    position = positions_of(passages, {row["positive_ids"][0] for rows in known.values() for row in rows})
    questions = {}
    for split, rows in known.items():
        if not rows and (settings.steps or hard.count):
            raise ValueError(
                f"{PREPARED / split}.arrow: no question has a positive passage, the warm-up needs some; name them in "
                "data.fields.positive_ids, raise data.positives.depth to find them by answer, or set retriever.steps and "
                "retriever.hard_negatives.count to 0"
            )
        store = TokenStore.from_rows(
            question_encoder.question_rows([row["question"] for row in rows], lengths.question_tokens)
        )
        questions[split] = store, [position[row["positive_ids"][0]] for row in rows]
    # Only passages that some question asks about are read in training; they are renumbered to be tokenized alone.
    needed = sorted({passage for _, gold in questions.values() for passage in gold})
    renumbered = {passage: row for row, passage in enumerate(needed)}
    chosen = passages.select(needed)
    passage_rows = context_encoder.passage_rows(list(chosen["title"]), list(chosen["text"]), lengths.passage_tokens)
    passage_store = TokenStore.from_rows(passage_rows)
    gold = {split: torch.tensor([renumbered[passage] for passage in rows]) for split, (_, rows) in questions.items()}

    def validation_loss() -> float:
        return warm_up.validate(questions["validation"][0], passage_store, gold["validation"], settings.batch_size)

    before, loss = validation_loss() if known["validation"] else 0.0, 0.0
    first_round = before
    if settings.steps:
        loss = warm_up.train(
            questions["train"][0], passage_store, gold["train"], steps=settings.steps, batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, seed=params.seed,
        )  # fmt: skip
        first_round = validation_loss()
    after, mined = first_round, 0.0
    if hard.count:
        store, rows = questions["train"]
        answers, positive_ids = ([row[key] for row in known["train"]] for key in ("answers", "positive_ids"))
        everything = tokenize_passages(context_encoder, passages, lengths.passage_tokens)
        hits = best_hits(question_encoder, context_encoder, store, everything, hard.depth, device)
        pool = without_answers(hits, answers, positive_ids, passages, hard.skip)
        negatives = HardNegatives(pool, hard.count)
        loss = warm_up.train(
            store, everything, torch.tensor(rows), steps=hard.steps, batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, seed=params.seed + 1, negatives=negatives,
        )  # fmt: skip
        after, mined = validation_loss(), negatives.mean

    with replacing(RETRIEVER) as (made,):
        question_encoder.save(made / "question_encoder")
        context_encoder.save(made / "context_encoder")
    metrics = {
        "steps": settings.steps + (hard.steps if hard.count else 0),
        "train_loss": loss,  # of the last step, in the second round with hard negatives in it
        "val_loss_before": before,
        "val_loss_first_round": first_round,
        "val_loss": after,
        "hard_negatives_mined": mined,  # a question
    }
    manifest.write_metrics(METRICS, metrics)
    print(f"in-batch validation loss {before:.3f} -> {after:.3f} nats after {metrics['steps']} steps")


if __name__ == "__main__":
    run(main)
