"""Candidates scored under the passages that did not write them, as far as they can still be the best answer."""

import math
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.states import State
from stages.generation.generator import Generator

# Most logits to hold at once while candidates are rescored: 2**28 are 1 GB in fp32. A large GPU holds up to four times.
LOGITS_AT_ONCE = 2**28


def complete(
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

    `state` and `first` [R, V] as in `beam_search`: the contexts' keys and values are used again.
    """
    device, vocab = first.device, first.shape[-1]
    at_once = max(1, _logits_at_once(device) // (lengths[-1] * vocab))
    if not state.shares_contexts:  # so that the caches need little more memory than the contexts'
        at_once = min(at_once, len(first))
    order, scores = [], []
    for begin in range(0, len(rows), at_once):
        some = np.arange(begin, min(begin + at_once, len(rows)))
        width = lengths[some[-1]]
        order.append(some[rows[some].argsort(kind="stable")])  # those on a context side by side
        chosen, length, targets = (
            torch.from_numpy(part[order[-1]]).to(device) for part in (rows, lengths, words[:, :width])
        )
        log_probs = first[chosen, targets[:, 0]][:, None]
        if width > 1:
            later = state.fork(chosen).advance(targets[:, :-1]).log_softmax(-1, dtype=torch.float)
            log_probs = torch.cat([log_probs, later.gather(2, targets[:, 1:, None]).squeeze(2)], dim=1)
        padding = torch.arange(width, device=device) >= length[:, None]
        scores.append(log_probs.masked_fill(padding, 0.0).sum(1))
    found = np.empty(len(rows))
    found[np.concatenate(order)] = torch.cat(scores).cpu().numpy()
    return found


def _logits_at_once(device: torch.device) -> int:
    """Most logits to hold at once while candidates are rescored: of a GPU's free memory a third, 12 bytes each."""
    if device.type != "cuda":
        return LOGITS_AT_ONCE
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return min(4 * LOGITS_AT_ONCE, max(LOGITS_AT_ONCE // 16, free // 36))
