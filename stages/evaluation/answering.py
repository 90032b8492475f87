"""Answering a set of questions with a trained model: batched retrieval and decoding, scores, and the lines around them."""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from stages.bm25.hits import Hits
from stages.compute.out_of_memory import in_batches
from stages.corpus.answers import hits_with_answers
from stages.corpus.ranking import RANKED, retrieval_scores
from stages.corpus.recall import recalls
from stages.evaluation.alone import flags_alone, recall_alone
from stages.evaluation.decoding import Answer, generate
from stages.evaluation.errors import kind_of, rank_of
from stages.evaluation.retrieval import depths_of, retrieve
from stages.evaluation.scoring import Rules
from stages.generation import marginalization
from stages.rag.batches import Examples
from stages.rag.model import Rag
from stages.rag.together import joint_contexts
from stages.settings.runs import Evaluate

if TYPE_CHECKING:  # a second that one question need not wait for
    from datasets import Dataset


def answer(
    rag: Rag, examples: Examples, rows: Tensor, log_prior: Tensor, settings: Evaluate, marginal: str, progress: str,
    asked: list[int] | None = None, reading: str = "each", alone: list[int] | None = None,
) -> Iterator[Answer]:  # fmt: skip
    """Answers of the questions `asked` (None: all N), each from its passages `rows` [N, K] and their prior.

    A row of -1 is no passage, its context the question alone. With any `reading` but "each" all of a question's are
    read at once, and `marginal` is not looked at. `alone` [N] as in `generate`.

    Questions are decoded settings.batch_size at once, more where they have fewer passages than usual; a batch that does
    not fit into memory in halves.
    """
    decoding_marginal = "token" if marginal == "token" else "sequence"
    asked = list(range(len(examples))) if asked is None else asked
    bar = tqdm(total=len(asked), desc=progress, unit=" questions", disable=not progress)

    def decode(places: list[int]) -> list[Answer]:
        chosen = [asked[place] for place in places]
        batch = rag.batch(examples, chosen)
        input_ids, attention_mask = rag.contexts(batch, rows[chosen])
        shape = (len(chosen), rows.shape[1], -1)
        # A single passage read together is that passage alone.
        together = reading != "each" and rows.shape[1] > 1
        joined = partial(joint_contexts, rag, batch, rows[chosen], reading=reading, log_prior=log_prior[chosen])
        return generate(
            rag.generator, input_ids.view(shape), attention_mask.view(shape), log_prior[chosen],
            num_beams=settings.num_beams, max_answer_tokens=rag.lengths.answer_tokens,
            decoding=settings.decoding, marginalization=decoding_marginal, merge=True,
            joined=joined if together else None,
            alone=alone and [alone[place] for place in chosen],
        )  # fmt: skip

    as_many_contexts = settings.batch_size * max(1, rag.n_docs // rows.shape[1])
    for answers in in_batches(len(asked), as_many_contexts, decode):
        yield from answers
        bar.update(len(answers))
    bar.close()


def evaluate(
    rag: Rag,
    questions: "Dataset",
    passages: "Dataset",
    gold_passages: list[Mapping[int, float]],
    settings: Evaluate,
    marginal: str,
    hits: Hits | None = None,
    rules: Rules | None = None,
    reading: str = "each",
) -> tuple[dict[str, float], list[dict]]:
    """Scores in percent over all questions, and a row a question for the predictions file.

    `gold_passages`: {row of `passages`: grade} of each question's own, where it names any. `rules`: how answers compare.
    Beside EM and F1: recall by gold passage and by answer string, that of dense search and BM25 alone where they were put
    together (alone.py), MRR and nDCG by gold passage, EM with the gold passage given (oracle: of the highest grade) and
    with no passage at all (closed book). What needs a gold passage is measured over the questions that name one, the closed
    book over them too, as `closed_book_em_of_oracle_questions`; where none does, these metrics are absent. Where some
    questions have no answer, EM and F1 of these and of the others stand beside the total, and only the others' answers are
    looked for in passages.
    """
    rag.eval()
    rules = rules or Rules()
    device = next(rag.parameters()).device
    golds = questions["answers"][:]
    examples = rag.examples(questions["question"][:], [answers[0] for answers in golds], hits).to(device)

    started = time.perf_counter()
    depths = depths_of(settings)
    depth = max(*depths, RANKED, rag.n_docs)
    found = retrieve(rag, examples, depth, settings.batch_size)
    rows = found.rows[:, : rag.n_docs]
    prior = marginalization.log_prior(found.scores[:, : rag.n_docs])
    # Of each question's own passages the best, and its place among those read.
    gold_rows = [max(gold, key=gold.get) if gold else -1 for gold in gold_passages]
    places = [
        read.index(gold) if gold >= 0 and gold in read else -1
        for gold, read in zip(gold_rows, rows.tolist(), strict=True)
    ]
    answers = list(answer(rag, examples, rows, prior, settings, marginal, "answer", reading=reading, alone=places))
    seconds = time.perf_counter() - started

    known = [index for index, gold in enumerate(gold_passages) if gold]
    none = torch.zeros((len(examples), 1), device=device)
    closed = list(answer(rag, examples, none.long() - 1, none, settings, marginal, "closed book"))
    # From a passage that was read, each of which has a search of its own, there is an answer already.
    oracle = {index: answers[index].alone for index in known if answers[index].alone}
    if left := [index for index in known if index not in oracle]:
        given = torch.tensor(gold_rows, device=device)[:, None]
        oracle |= zip(left, answer(rag, examples, given, none, settings, marginal, "gold passage", left), strict=True)

    found_rows = found.rows.tolist()
    by_id = [[row in gold_passages[index] for row in found_rows[index]] for index in known]
    texts = [[passages[row] if row >= 0 else None for row in some[: rag.n_docs]] for some in found_rows]
    sought = [rules.sought(gold) for gold in golds]
    by_string = list(hits_with_answers(passages, found_rows, sought, rules.patterns))
    answerable = [index for index, gold in enumerate(sought) if gold]
    alone = flags_alone(
        rag, examples, gold_passages, lambda rows: hits_with_answers(passages, rows, sought, rules.patterns), depths,
        settings.batch_size,
    )  # fmt: skip
    if not known:  # then by answers, which not every question has
        alone = [flags if some else {} for flags, some in zip(alone, sought, strict=True)]
    metrics = {
        **_mean_scores([answer.text for answer in answers], golds, rules),
        **_by_answerability([answer.text for answer in answers], golds, answerable, rules),
        **retrieval_scores(found_rows, gold_passages, depths),
        **recalls([by_string[index] for index in answerable], depths, "answer_"),
        **recall_alone(alone),
        **_mean_scores([oracle[index].text for index in known], [golds[index] for index in known], rules, "oracle_"),
        **_mean_scores([answer.text for answer in closed], golds, rules, "closed_book_"),
        **_mean_scores(
            [closed[index].text for index in known],
            [golds[index] for index in known],
            rules,
            "closed_book_",
            "_of_oracle_questions",
        ),
        "questions": len(questions),
        "questions_with_gold_passage": len(known),
        "questions_without_passages": int((rows < 0).all(1).sum()),
        "n_docs": rag.n_docs,
        "passages": len(passages),
        "questions_per_second": len(questions) / seconds,
    }
    flags = dict(zip(known, by_id, strict=True))
    predictions = [
        prediction_row(
            questions[index], given, passages_of(given, prior[index], texts[index]), flags.get(index), by_string[index],
            oracle.get(index), closed[index], rules,
        ) | {"alone": alone[index]}
        for index, given in enumerate(answers)
    ]  # fmt: skip
    return metrics, predictions


def prediction_row(
    question: dict, given: Answer, passages: list[dict], is_gold: list[bool] | None, has_answer: list[bool],
    oracle: Answer | None, closed: Answer, rules: Rules,
) -> dict:  # fmt: skip
    """A row of the predictions file. The flags are those of the passages found, which go on behind those read.

    `is_gold`, `oracle`: None where the question names no passage of the corpus; the kind of error then goes by
    `has_answer`. `gold_rank`, `answer_rank`: place of the first such passage from 1, None where it is not among those found.
    """
    golds = question["answers"]
    scores = scored(given.text, golds, rules)
    rank = rank_of(has_answer if is_gold is None else is_gold)
    return {
        "id": question["id"],
        "question": question["question"],
        "answers": golds,
        **scores,
        "kind": kind_of(scores["em"], scores["f1"], rank, len(passages)),
        "log_prob": given.log_prob,
        "with_gold_passage": oracle and scored(oracle.text, golds, rules),
        "without_passage": scored(closed.text, golds, rules),
        "gold_known": is_gold is not None,
        "gold_rank": is_gold and rank,
        "answer_rank": rank_of(has_answer),
        "passages": [
            {**passage, "gold": bool(is_gold and is_gold[place]), "has_answer": has_answer[place]}
            for place, passage in enumerate(passages)
        ],
    }


def scored(prediction: str, golds: list[str], rules: Rules) -> dict:
    return {"prediction": prediction, "em": rules.exact_match(prediction, golds), "f1": rules.f1(prediction, golds)}


def passages_of(given: Answer, prior: Tensor, texts: list[dict | None]) -> list[dict]:
    """Each retrieved passage of one answer, whole, with its prior p(z|x) and posterior p(z|x, y)."""
    posterior = torch.tensor(given.doc_log_probs).softmax(0).tolist()
    return [
        {"id": text["id"], "title": text["title"], "text": text["text"], "prior": before, "posterior": after}
        for text, before, after in zip(texts, prior.exp().tolist(), posterior, strict=True)
        if text is not None
    ]


def _by_answerability(
    predictions: list[str], golds: list[list[str]], answerable: list[int], rules: Rules
) -> dict[str, float]:
    """SQuAD 2's HasAns and NoAns lines; empty where every question has an answer."""
    unanswerable = sorted(set(range(len(golds))) - set(answerable))
    if not unanswerable:
        return {}
    parts = {"has_ans_": answerable, "no_ans_": unanswerable}
    scores = {"questions_without_answer": len(unanswerable)}
    for prefix, chosen in parts.items():
        scores |= _mean_scores([predictions[at] for at in chosen], [golds[at] for at in chosen], rules, prefix)
    return scores


def _mean_scores(
    predictions: list[str], golds: list[list[str]], rules: Rules, prefix: str = "", suffix: str = ""
) -> dict[str, float]:
    pairs = list(zip(predictions, golds, strict=True))
    if not pairs:
        return {}
    return {
        f"{prefix}{name}{suffix}": 100.0 * sum(score(*pair) for pair in pairs) / len(pairs)
        for name, score in (("em", rules.exact_match), ("f1", rules.f1))
    }
