"""What the retriever of a model finds for a set of questions, and its scores alone where questions have no answers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.bm25.hits import Hits
from stages.compute.out_of_memory import in_batches
from stages.corpus.ranking import RANKED, retrieval_scores
from stages.evaluation.alone import flags_alone, recall_alone
from stages.evaluation.errors import found_kind_of, rank_of
from stages.generation import marginalization
from stages.rag.batches import Examples
from stages.rag.model import Rag
from stages.settings.runs import Evaluate

if TYPE_CHECKING:  # a second that one question need not wait for
    from datasets import Dataset

RECALL_DEPTHS = (1, 5, 20)


@dataclass
class Found:
    """What the retriever found for N questions: passage rows and scores [N, depth], best first."""

    rows: Tensor
    scores: Tensor


@torch.no_grad()
def retrieve(rag: Rag, examples: Examples, depth: int, batch_size: int) -> Found:
    """The `depth` best passages of every question; depth is at least rag.n_docs."""
    rows, scores = [], []
    wanted, rag.n_docs = rag.n_docs, depth

    def search(some: list[int]) -> tuple[Tensor, Tensor]:
        batch = rag.batch(examples, some)
        return rag.retrieve(rag.encode_questions(batch), batch.hits, batch.asked)

    for found, score in in_batches(len(examples), batch_size, search):
        rows.append(found)
        scores.append(score)
    rag.n_docs = wanted
    return Found(torch.cat(rows), torch.cat(scores))


def depths_of(settings: Evaluate) -> list[int]:
    """The k of recall@k, in order."""
    return sorted({*RECALL_DEPTHS, *settings.further_depths})


def evaluate_retrieval(
    rag: Rag, questions: "Dataset", passages: "Dataset", golds: list[Mapping[int, float]], settings: Evaluate,
    hits: Hits | None = None,
) -> tuple[dict[str, float], list[dict]]:  # fmt: skip
    """Recall, MRR and nDCG in percent of questions without answers, and a row a question for the predictions file.

    `golds`: {row of `passages`: grade} of each question. Raises ValueError where none names a passage: nothing is measured.
    """
    if not any(golds):
        raise ValueError(
            "no question to evaluate has an answer or names a passage of the corpus; set data.fields.answers, "
            "data.fields.positive_ids or data.qrels"
        )
    rag.eval()
    device = next(rag.parameters()).device
    examples = rag.examples(questions["question"][:], [""] * len(questions), hits).to(device)
    started = time.perf_counter()
    depths = depths_of(settings)
    found = retrieve(rag, examples, max(*depths, RANKED, rag.n_docs), settings.batch_size)
    seconds = time.perf_counter() - started
    rows = found.rows.tolist()
    alone = flags_alone(rag, examples, golds, lambda rows: [], depths, settings.batch_size)
    metrics = {
        **retrieval_scores(rows, golds, depths),
        **recall_alone(alone),
        "questions": len(questions),
        "questions_with_gold_passage": sum(map(bool, golds)),
        "questions_without_passages": int((found.rows[:, : rag.n_docs] < 0).all(1).sum()),
        "n_docs": rag.n_docs,
        "passages": len(passages),
        "questions_per_second": len(questions) / seconds,
    }
    prior = marginalization.log_prior(found.scores[:, : rag.n_docs]).exp().tolist()
    return metrics, [
        _prediction_row(question, some[: rag.n_docs], priors, [row in gold for row in some] if gold else None, passages)
        | {"alone": flags}
        for question, some, priors, gold, flags in zip(questions, rows, prior, golds, alone, strict=True)
    ]


def _prediction_row(
    question: dict, read: list[int], prior: list[float], is_gold: list[bool] | None, passages: "Dataset"
) -> dict:
    """As answering.prediction_row, with None for all that an answer would have."""
    rank = is_gold and rank_of(is_gold)
    return {
        "id": question["id"],
        "question": question["question"],
        "answers": [],
        **dict.fromkeys(("prediction", "em", "f1", "log_prob", "with_gold_passage", "without_passage", "answer_rank")),
        "kind": found_kind_of(rank, len(read)) if is_gold else "not judged",
        "gold_known": is_gold is not None,
        "gold_rank": rank,
        "passages": [
            {
                **{name: passages[row][name] for name in ("id", "title", "text")}, "prior": before, "posterior": before,
                "gold": bool(is_gold and is_gold[place]), "has_answer": False,
            }
            for place, (row, before) in enumerate(zip(read, prior, strict=True))
            if row >= 0
        ],
    }  # fmt: skip
