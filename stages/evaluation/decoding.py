"""Answers from a generator and retrieved passages: RAG-Sequence, RAG-Token and all passages read together, batched over
questions.

Lewis et al. 2020 (arXiv:2005.11401), section 2.5. For a question x, passages z and an answer y with its EOS,
RAG-Sequence maximises log sum_z p(z|x) prod_t p(y_t | y_<t, x, z),
RAG-Token maximises sum_t log sum_z p(z|x) p(y_t | y_<t, x, z).
Read together (Izacard & Grave 2021, arXiv:2007.01282) it is prod_t p(y_t | y_<t, x, z_1 ... z_K), of one search a question.
Scores are plain sums of log-probabilities: there is no length penalty. Candidates that read the same once normalised
("the Nile", "Nile") are one answer, if wanted, whose probability is the sum of theirs.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import LongTensor, Tensor

from stages.corpus.answers import normalize_answer
from stages.evaluation.beam_search import beam_search
from stages.evaluation.rescoring import complete
from stages.evaluation.states import start
from stages.generation.generator import Generator


@dataclass
class Answer:
    """One generated answer; where candidates were merged, the likeliest of them with the probability of all.

    `log_prob` is what the answer was chosen by: its marginal log p(y|x), in fast decoding without the
    passages that did not generate it; where they are read together, log p(y|x, all of them).
    `doc_log_probs[z]` is log p(z|x) + log p(y|x,z), so its softmax is the posterior of the passages, also of
    those read together: what each alone says to the answer, which need not add up to `log_prob`. It is -inf
    for a missing passage and, in fast decoding, for one that did not generate the answer. `finished` is False
    where the answer fills max_answer_tokens: EOS was forced and the text may be cut off.
    `alone` is the answer from one of the passages by itself, where that was asked for.
    """

    text: str
    token_ids: list[int]  # without EOS
    log_prob: float
    doc_log_probs: list[float]
    finished: bool
    alone: "Answer | None" = None


@torch.no_grad()
def generate(
    generator: Generator,
    input_ids: LongTensor,
    attention_mask: Tensor,
    log_prior: Tensor,
    *,
    num_beams: int,
    max_answer_tokens: int,
    decoding: str,
    marginalization: str,
    merge: bool = False,
    joined: Callable[[Any], Any] | None = None,
    alone: list[int] | None = None,
) -> list[Answer]:
    """The best answer to each of B questions.

    `input_ids` and `attention_mask` [B, K, L] are the contexts of K passages. `log_prior` [B, K] is log
    p(z|x), -inf for a missing passage; a question has at least one context, if only itself. `max_answer_tokens` counts EOS; what
    gets so long must end with EOS there, and pays for it. One beam is greedy search.

    `marginalization` "sequence": a beam search per passage finds candidates. `decoding` "thorough" then
    scores each under every passage; "fast" lets a passage speak only for what it generated itself.
    `marginalization` "token": one beam search per question over the marginal distribution of the next token,
    where `decoding` makes no difference.

    `joined` makes of the B * K contexts, as the generator encoded them, B in which a question's passages are read
    together. Then there is one beam search a question, over these, and neither `decoding` nor `marginalization` makes a
    difference; the answer alone is scored under each passage by itself.

    `merge`: candidates of the same normalised text are one answer; so is each without, and each of which nothing is left
    when normalised.

    `alone`: the place of a passage for each question, -1 for none. Where each passage has a beam search of its own, that
    passage's is what decoding from it alone would make: its answer stands beside the question's.

    ValueError where the generator's probabilities are not finite.
    """
    assert decoding in ("thorough", "fast") and marginalization in ("sequence", "token")
    assert num_beams >= 1 and max_answer_tokens >= 1
    assert not generator.model.training, "dropout would blur the probabilities: call .eval() first"
    n_docs = input_ids.shape[1]
    log_prior = log_prior.float()
    priors = log_prior.tolist()
    assert all(max(prior) > -math.inf for prior in priors), "a question without any context"

    contexts = generator.encode(input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
    one_search = joined is not None or marginalization == "token"
    if joined:
        # Before the passages alone are read, so that the device never holds the keys and values of both.
        beams = _search_together(generator, joined(contexts), num_beams, max_answer_tokens)
    state = start(generator, contexts)
    first = state.first()

    @cache
    def answer_of(tokens: tuple[int, ...]) -> Hashable:
        return (merge and normalize_answer(generator.decode(list(tokens[:-1])))) or tokens

    if one_search:
        if not joined:
            beams = beam_search(generator, state, first, log_prior, num_beams, max_answer_tokens)
        merged = [_merged(found, answer_of) for found in beams]
        winners = [max(scores, key=scores.get) for scores in merged]
        log_likelihoods = [
            {tokens: [None] * n_docs for tokens in found if answer_of(tokens) == winner}
            for found, winner in zip(beams, winners, strict=True)
        ]
        complete(generator, state, first, log_likelihoods, priors, answer_of)
    else:
        # Within one passage the prior changes no order; what is left of it is whether the passage is there.
        present = torch.zeros_like(log_prior).masked_fill(log_prior == -math.inf, -math.inf).view(-1, 1)
        beams = beam_search(generator, state, first, present, num_beams, max_answer_tokens)
        by_question = [beams[row : row + n_docs] for row in range(0, len(beams), n_docs)]
        # Equal candidates fall together in a dict, which unlike a set keeps their order from run to run.
        log_likelihoods = [
            {
                tokens: [found.get(tokens) for found in docs]
                for tokens in {tokens: None for found in docs for tokens in found}
            }
            for docs in by_question
        ]
        if decoding == "thorough":
            complete(generator, state, first, log_likelihoods, priors, answer_of)

    answers = []
    for question, prior in enumerate(priors):
        joint = {
            tokens: [-math.inf if p == -math.inf or q is None else p + q for p, q in zip(prior, per_doc, strict=True)]
            for tokens, per_doc in log_likelihoods[question].items()
        }
        if one_search:
            scores = {tokens: beams[question][tokens] for tokens in joint}
        else:
            scores = {tokens: _logsumexp(per_doc) for tokens, per_doc in joint.items()}
        answer = _best(generator, scores, joint, answer_of, max_answer_tokens)
        if alone and not one_search and alone[question] >= 0:
            own = by_question[question][alone[question]]
            under_it = {tokens: [score] for tokens, score in own.items()}
            answer.alone = _best(generator, own, under_it, answer_of, max_answer_tokens)
        answers.append(answer)
    return answers


def _best(
    generator: Generator, scores: dict[tuple[int, ...], float], joint: dict[tuple[int, ...], list[float]],
    answer_of: Callable, max_answer_tokens: int,
) -> Answer:  # fmt: skip
    """The answer whose candidates have the best `scores` together; `joint` holds each one's log p(z|x) + log p(y|x,z)."""
    of_answers = _merged(scores, answer_of)
    chosen = max(of_answers, key=of_answers.get)
    alike = [tokens for tokens in joint if answer_of(tokens) == chosen]
    best = max(alike, key=scores.get)
    ids, finished = list(best[:-1]), len(best) < max_answer_tokens
    per_doc = [_logsumexp(values) for values in zip(*(joint[tokens] for tokens in alike), strict=True)]
    return Answer(generator.decode(ids), ids, of_answers[chosen], per_doc, finished)


def _merged(scores: dict[tuple[int, ...], float], answer_of: Callable) -> dict[Hashable, float]:
    """The log-probability of each answer: its candidates' together."""
    found: dict[Hashable, list[float]] = {}
    for tokens, score in scores.items():
        found.setdefault(answer_of(tokens), []).append(score)
    return {answer: _logsumexp(values) for answer, values in found.items()}


def _search_together(generator: Generator, contexts: Any, num_beams: int, max_answer_tokens: int) -> list[dict]:
    """`beam_search` with a question's only context for its one document."""
    state = start(generator, contexts)
    first = state.first()
    return beam_search(generator, state, first, first.new_zeros(len(first), 1), num_beams, max_answer_tokens)


def _logsumexp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values)) if top > -math.inf else top
