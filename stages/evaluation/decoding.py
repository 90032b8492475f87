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

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from stages.corpus.answers import normalize_answer
from stages.evaluation.states import State, start
from stages.generation.generator import Generator

# Most logits to hold at once while candidates are rescored: 2**28 are 1 GB in fp32. A large GPU holds up to four times.
LOGITS_AT_ONCE = 2**28


@dataclass
class Answer:
    """One generated answer; where candidates were merged, the likeliest of them with the probability of all.

    `log_prob` is what the answer was chosen by: its marginal log p(y|x), in fast decoding without the
    passages that did not generate it; where they are read together, log p(y|x, all of them).
    `doc_log_probs[z]` is log p(z|x) + log p(y|x,z), so its softmax is the posterior of the passages, also of
    those read together: what each alone says to the answer, which need not add up to `log_prob`. It is -inf
    for a missing passage and, in fast decoding, for one that did not generate the answer. `finished` is False
    where the answer fills max_answer_tokens: EOS was forced and the text may be cut off.
    """

    text: str
    token_ids: list[int]  # without EOS
    log_prob: float
    doc_log_probs: list[float]
    finished: bool


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
            beams = _beam_search(generator, state, first, log_prior, num_beams, max_answer_tokens)
        merged = [_merged(found, answer_of) for found in beams]
        winners = [max(scores, key=scores.get) for scores in merged]
        log_likelihoods = [
            {tokens: [None] * n_docs for tokens in found if answer_of(tokens) == winner}
            for found, winner in zip(beams, winners, strict=True)
        ]
        _complete(generator, state, first, log_likelihoods, priors, answer_of)
    else:
        # Within one passage the prior changes no order; what is left of it is whether the passage is there.
        present = torch.zeros_like(log_prior).masked_fill(log_prior == -math.inf, -math.inf).view(-1, 1)
        beams = _beam_search(generator, state, first, present, num_beams, max_answer_tokens)
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
            _complete(generator, state, first, log_likelihoods, priors, answer_of)

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
        of_answers = _merged(scores, answer_of)
        chosen = max(of_answers, key=of_answers.get)
        alike = [tokens for tokens in joint if answer_of(tokens) == chosen]
        best = max(alike, key=scores.get)
        ids, finished = list(best[:-1]), len(best) < max_answer_tokens
        per_doc = [_logsumexp(values) for values in zip(*(joint[tokens] for tokens in alike), strict=True)]
        answers.append(Answer(generator.decode(ids), ids, of_answers[chosen], per_doc, finished))
    return answers


def _merged(scores: dict[tuple[int, ...], float], answer_of: Callable) -> dict[Hashable, float]:
    """The log-probability of each answer: its candidates' together."""
    found: dict[Hashable, list[float]] = {}
    for tokens, score in scores.items():
        found.setdefault(answer_of(tokens), []).append(score)
    return {answer: _logsumexp(values) for answer, values in found.items()}


def _search_together(generator: Generator, contexts: Any, num_beams: int, max_answer_tokens: int) -> list[dict]:
    """`_beam_search` with a question's only context for its one document."""
    state = start(generator, contexts)
    first = state.first()
    return _beam_search(generator, state, first, first.new_zeros(len(first), 1), num_beams, max_answer_tokens)


def _beam_search(
    generator: Generator,
    state: State,
    first: Tensor,
    log_prior: Tensor,
    num_beams: int,
    max_answer_tokens: int,
) -> list[dict[tuple[int, ...], float]]:
    """Finished hypotheses of G groups over D documents each: per group {tokens with EOS: score}, best first.

    `first` [G * D, V] are the log-probabilities after the prefix, `state` stands there; `log_prior` [G, D].
    The documents of a group share its hypotheses. The rules are transformers': of the 2 * num_beams best
    continuations, EOS ends a hypothesis where it is among the first num_beams, and the best others live on.
    A group without any document finds nothing.
    """
    groups, docs = log_prior.shape
    vocab, eos, device = first.shape[-1], generator.eos_token_id, first.device
    has_document = (log_prior > -math.inf).any(1)

    def marginal(log_probs: Tensor) -> Tensor:  # [G * beams * D, V] -> [G, beams, V]
        joint = log_probs.view(len(log_prior), -1, docs, vocab) + log_prior[:, None, :, None]
        # Not left to the sum: what the generator says to a missing passage may be NaN.
        joint.masked_fill_(log_prior[:, None, :, None] == -math.inf, -math.inf)
        return joint.logsumexp(2)

    def likeliest(scored: Tensor, last: bool) -> tuple[Tensor, Tensor]:  # [G * beams * D, V] -> [G, beams, n], words
        """log p of each beam's likeliest words, as many as a group can take of it; of EOS alone at the last place.

        `scored` are logits or log-probabilities. Of one document the likeliest have the largest logits: scores are made of
        these few alone.
        """
        log_probs = scored.log_softmax(-1, dtype=torch.float)
        if docs > 1:
            scored = log_probs = marginal(log_probs)
        else:
            scored, log_probs = (part.view(len(log_prior), -1, vocab) for part in (scored, log_probs))
        ending = torch.full((*scored.shape[:2], 1), eos, device=device)
        words = ending if last else scored.topk(min(2 * num_beams, vocab)).indices
        log_probs = log_probs.gather(2, words)
        if docs == 1:
            absent = log_prior[:, :, None] == -math.inf
            log_probs = (log_probs + log_prior[:, :, None]).masked_fill(absent, -math.inf)
        return log_probs, words

    def pick(hypotheses: Tensor, beams: Tensor) -> Tensor:  # [G, n, T], [G, m] -> [G, m, T]
        return hypotheses.gather(1, beams[..., None].expand(-1, -1, max_answer_tokens))

    # Rows go by group, beam, document. A context's keys and values were computed once: its beams get copies.
    doc = torch.arange(docs, device=device)
    group = torch.arange(groups, device=device)[:, None, None]
    state = state.fork((group * docs + doc).expand(groups, num_beams, docs).flatten())
    log_probs, words = (part.expand(groups, num_beams, -1) for part in likeliest(first, max_answer_tokens == 1))
    live_scores = torch.full((groups, num_beams), -math.inf, device=device)
    finished_scores = live_scores.clone()
    live_scores[:, 0] = 0.0  # one beam at first, or every token would be found num_beams times
    # What is not written yet is EOS, so a hypothesis that ends needs nothing appended.
    live = torch.full((groups, num_beams, max_answer_tokens), eos, device=device)
    finished = live.clone()
    done = torch.zeros((groups, 1), dtype=torch.bool, device=device)
    searched = torch.arange(groups, device=device)  # which groups the rows above are about
    all_finished, all_scores = finished.clone(), finished_scores.clone()

    for step in range(max_answer_tokens):
        scores = (live_scores[..., None] + log_probs).flatten(1)
        # Fewer where each beam can only end, or the vocabulary is tiny; what is missing is EOS that nobody reaches.
        missing = 2 * num_beams - scores.shape[1]
        if missing > 0:
            scores = F.pad(scores, (0, missing), value=-math.inf)
        best, index = scores.topk(2 * num_beams)
        parent = (index // log_probs.shape[2]).clamp(max=num_beams - 1)
        token = F.pad(words.flatten(1), (0, max(0, missing)), value=eos).gather(1, index)

        # A group that is done takes no more, or a tie could make its answer depend on the rest of the batch.
        ended = best.masked_fill((token != eos) | done, -math.inf)[:, :num_beams]
        finished = torch.cat([finished, pick(live, parent[:, :num_beams])], dim=1)
        finished_scores, order = torch.cat([finished_scores, ended], dim=1).topk(num_beams)
        finished = pick(finished, order)

        live_scores, order = best.masked_fill(token == eos, -math.inf).topk(num_beams)
        parent, token = parent.gather(1, order), token.gather(1, order)
        live = pick(live, parent)
        live[:, :, step] = token
        # Scores only fall, so what is behind the worst finished hypothesis stays behind it.
        done = live_scores[:, :1] <= finished_scores[:, -1:]
        waiting = int((~done).sum())
        if waiting == 0:
            break
        rows = (group[: len(searched)] * num_beams + parent[..., None]) * docs + doc
        if waiting <= len(searched) // 2:
            # Half of the rows decode for nothing: go on without the groups that are done.
            all_finished[searched], all_scores[searched] = finished, finished_scores
            left = torch.nonzero(~done[:, 0]).flatten()
            state = state.fork(rows[left].flatten())
            searched, log_prior, done, token = searched[left], log_prior[left], done[left], token[left]
            live, live_scores = live[left], live_scores[left]
            finished, finished_scores = finished[left], finished_scores[left]
        elif num_beams > 1:
            state.reorder(rows.flatten())
        logits = state.advance(token.repeat_interleave(docs, dim=1).flatten()[:, None])[:, -1]
        log_probs, words = likeliest(logits, step + 1 == max_answer_tokens - 1)

    all_finished[searched], all_scores[searched] = finished, finished_scores
    if not (all_scores[:, 0] > -math.inf)[has_document].all():
        raise ValueError("the generator's probabilities are not finite: check its weights or use fp32")
    return [
        {tuple(ids[: ids.index(eos) + 1]): p for ids, p in zip(rows, scores, strict=True) if p > -math.inf}
        for rows, scores in zip(all_finished.tolist(), all_scores.tolist(), strict=True)
    ]


def _complete(
    generator: Generator, state: State, first: Tensor, log_likelihoods: list[dict], priors: list[list[float]],
    answer_of: Callable,
) -> None:  # fmt: skip
    """Fills in, for B questions, log p(y|x,z) (None: not known yet) of every candidate of an answer that can be the best.

    `log_likelihoods` holds a list over passages for each candidate (tokens with EOS). Candidates are scored under their
    likeliest unknown passage first. Under a passage all candidates of an answer have together at most the passage's prior,
    so an answer whose bound falls below another's certain part cannot win. All of its candidates are then taken out, never
    some: no approximation, and most never meet most passages.
    """
    n_docs = len(priors[0])
    # Candidates [C], those of a question and of an answer side by side; what is known of them [C, K].
    candidates, question, answer = [], [], []
    answers = 0
    for place, of_question in enumerate(log_likelihoods):
        alike: dict[Hashable, list[tuple[int, ...]]] = {}
        for tokens in of_question:
            alike.setdefault(answer_of(tokens), []).append(tokens)
        for some in alike.values():
            candidates += some
            question += [place] * len(some)
            answer += [answers] * len(some)
            answers += 1
    question, answer = np.array(question), np.array(answer)
    lengths = np.array([len(tokens) for tokens in candidates])
    words = np.full((len(candidates), lengths.max()), generator.eos_token_id)
    words[np.arange(words.shape[1]) < lengths[:, None]] = [word for tokens in candidates for word in tokens]
    given = [log_likelihoods[place][tokens] for place, tokens in zip(question, candidates, strict=True)]
    scores = np.array(given, dtype=float)  # None becomes NaN
    known = np.array([[value is not None for value in values] for values in given])
    prior = np.array(priors)[question]
    left = np.arange(len(candidates))
    while True:
        wanted, possible = _wanted(scores[left], known[left], prior[left], question[left], answer[left])
        left, wanted = left[possible], wanted[possible]
        if not wanted.any():
            break
        chosen, docs = np.nonzero(wanted)
        order = lengths[left[chosen]].argsort(kind="stable")  # alike lengths together, for little padding
        chosen, docs = left[chosen[order]], docs[order]
        rows = question[chosen] * n_docs + docs
        scores[chosen, docs] = _score(generator, state, first, rows, words[chosen], lengths[chosen])
        known[chosen, docs] = True
    for of_question in log_likelihoods:
        of_question.clear()
    for place in left:
        found = [value if sure else None for value, sure in zip(scores[place].tolist(), known[place], strict=True)]
        log_likelihoods[question[place]][candidates[place]] = found


def _wanted(
    scores: np.ndarray, known: np.ndarray, prior: np.ndarray, question: np.ndarray, answer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which scores [C, K] are to be made next, and which candidates [C] belong to an answer that can still be the best.

    Log-likelihoods `scores` count where they are `known`; `question` and `answer` [C] are sorted.
    """
    present = prior > -math.inf
    of_answer = np.flatnonzero(np.diff(answer, prepend=-1))
    of_question = np.flatnonzero(np.diff(question[of_answer], prepend=-1))
    place = np.cumsum(np.diff(answer, prepend=answer[0]) > 0)  # each candidate's answer
    asked = np.cumsum(np.diff(question[of_answer], prepend=question[0]) > 0)  # each answer's question
    joint = np.where(known & present, prior + scores, -math.inf)
    together = np.logaddexp.reduceat(joint, of_answer)
    certain = np.logaddexp.reduce(together, axis=1)
    open_docs = np.logical_or.reduceat(~known, of_answer)
    bound = np.logaddexp.reduce(np.where(open_docs, prior[of_answer], together), axis=1)
    # The slack leaves to the full sums what only rounding separates.
    left = bound >= np.maximum.reduceat(certain, of_question)[asked] - 1e-3
    alone = np.add.reduceat(left.astype(int), of_question)[asked] == 1
    waiting = ~known & present
    # The winner, once it is alone, needs all its shares; rivals meet their likeliest passage.
    likeliest = np.where(waiting, prior, -math.inf).argmax(1)
    next_one = waiting & (np.arange(prior.shape[1]) == likeliest[:, None])
    return np.where(alone[place][:, None], waiting, next_one), left[place]


def _score(
    generator: Generator, state: State, first: Tensor, rows: np.ndarray, words: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """log p(y|x,z) [N] of answers under the contexts `rows` [N]: `words` [N, T] behind `lengths` [N] EOS, shortest first.

    `state` and `first` [R, V] as in `_beam_search`: the contexts' keys and values are used again.
    """
    device, vocab = first.device, first.shape[-1]
    widths = lengths.tolist()
    rows, words, lengths = (torch.from_numpy(part).to(device) for part in (rows, words, lengths))
    at_once = max(1, _logits_at_once(device) // (widths[-1] * vocab))
    if not state.shares_contexts:  # so that the caches need little more memory than the contexts'
        at_once = min(at_once, len(first))
    scores = []
    for begin in range(0, len(rows), at_once):
        chosen, length = rows[begin : begin + at_once], lengths[begin : begin + at_once]
        width = widths[begin : begin + at_once][-1]
        targets = words[begin : begin + at_once, :width]
        log_probs = first[chosen, targets[:, 0]][:, None]
        if width > 1:
            logits = state.fork(chosen).advance(targets[:, :-1]).float()
            later = logits.gather(2, targets[:, 1:, None]).squeeze(2) - logits.logsumexp(-1)
            log_probs = torch.cat([log_probs, later], dim=1)
        padding = torch.arange(width, device=device) >= length[:, None]
        scores.append(log_probs.masked_fill(padding, 0.0).sum(1))
    return torch.cat(scores).double().cpu().numpy()


def _logits_at_once(device: torch.device) -> int:
    """Most logits to hold at once while candidates are rescored: of a GPU's free memory a third, 12 bytes each."""
    if device.type != "cuda":
        return LOGITS_AT_ONCE
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return min(4 * LOGITS_AT_ONCE, max(LOGITS_AT_ONCE // 16, free // 36))


def _logsumexp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values)) if top > -math.inf else top
