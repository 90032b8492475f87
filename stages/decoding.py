"""Answers from a generator and retrieved passages: RAG-Sequence and RAG-Token, batched over questions.

Lewis et al. 2020 (arXiv:2005.11401), section 2.5. For a question x, passages z and an answer y with its EOS,
RAG-Sequence maximises log sum_z p(z|x) prod_t p(y_t | y_<t, x, z),
RAG-Token maximises sum_t log sum_z p(z|x) p(y_t | y_<t, x, z).
Scores are plain sums of log-probabilities: there is no length penalty.
"""

import math
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from stages.generators import DecoderState, Generator

# Most logits to hold at once while candidates are rescored: 2**27 are 0.5 GB in fp32.
LOGITS_AT_ONCE = 2**27


@dataclass
class Answer:
    """One generated answer.

    `log_prob` is what the answer was chosen by: its marginal log p(y|x), in fast decoding without the
    passages that did not generate it. `doc_log_probs[z]` is log p(z|x) + log p(y|x,z), so its softmax is the
    posterior of the passages; -inf for a missing passage and, in fast decoding, for one that did not generate
    the answer. `finished` is False where the answer fills max_answer_tokens: EOS was forced and the text may
    be cut off.
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
) -> list[Answer]:
    """The best answer to each of B questions.

    `input_ids` and `attention_mask` [B, K, L] are the contexts of K passages. `log_prior` [B, K] is log
    p(z|x), -inf for a missing passage; a question has at least one. `max_answer_tokens` counts EOS; what
    gets so long must end with EOS there, and pays for it. One beam is greedy search.

    `marginalization` "sequence": a beam search per passage finds candidates. `decoding` "thorough" then
    scores each under every passage; "fast" lets a passage speak only for what it generated itself.
    `marginalization` "token": one beam search per question over the marginal distribution of the next token,
    where `decoding` makes no difference.

    ValueError where the generator's probabilities are not finite.
    """
    assert decoding in ("thorough", "fast") and marginalization in ("sequence", "token")
    assert num_beams >= 1 and max_answer_tokens >= 1
    assert not generator.model.training, "dropout would blur the probabilities: call .eval() first"
    n_docs = input_ids.shape[1]
    log_prior = log_prior.float()
    priors = log_prior.tolist()
    assert all(max(prior) > -math.inf for prior in priors), "a question without any passage"

    contexts = generator.encode(input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
    state = generator.start(contexts)
    first = generator.step(state)
    if marginalization == "token":
        beams = _beam_search(generator, state, first, log_prior, num_beams, max_answer_tokens)
        candidates = [[max(found, key=found.get)] for found in beams]
        log_likelihoods = _rescore(generator, state, first, candidates, n_docs)
    else:
        # Within one passage the prior changes no order; what is left of it is whether the passage is there.
        present = torch.zeros_like(log_prior).masked_fill(log_prior == -math.inf, -math.inf).view(-1, 1)
        beams = _beam_search(generator, state, first, present, num_beams, max_answer_tokens)
        by_question = [beams[row : row + n_docs] for row in range(0, len(beams), n_docs)]
        # Equal candidates fall together in a dict, which unlike a set keeps their order from run to run.
        candidates = [list({tokens: None for found in docs for tokens in found}) for docs in by_question]
        if decoding == "thorough":
            log_likelihoods = _rescore(generator, state, first, candidates, n_docs)
        else:
            log_likelihoods = [
                {tokens: [found.get(tokens, -math.inf) for found in docs] for tokens in union}
                for docs, union in zip(by_question, candidates, strict=True)
            ]

    answers = []
    for question, prior in enumerate(priors):
        joint = {
            tokens: [p + q if p > -math.inf else -math.inf for p, q in zip(prior, per_doc, strict=True)]
            for tokens, per_doc in log_likelihoods[question].items()
        }
        if marginalization == "token":
            scores = beams[question]
        else:
            scores = {tokens: _logsumexp(per_doc) for tokens, per_doc in joint.items()}
        best = max(joint, key=scores.get)
        ids, finished = list(best[:-1]), len(best) < max_answer_tokens
        answers.append(Answer(generator.decode(ids), ids, scores[best], joint[best], finished))
    return answers


def _beam_search(
    generator: Generator,
    state: DecoderState,
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
    present = log_prior > -math.inf

    def marginal(log_probs: Tensor) -> Tensor:  # [G * beams * D, V] -> [G, beams, V]
        joint = log_probs.view(groups, -1, docs, vocab) + log_prior[:, None, :, None]
        # Not left to the sum: what the generator says to a missing passage may be NaN.
        return joint.masked_fill_(~present[:, None, :, None], -math.inf).logsumexp(2)

    def pick(hypotheses: Tensor, beams: Tensor) -> Tensor:  # [G, n, T], [G, m] -> [G, m, T]
        return hypotheses.gather(1, beams[..., None].expand(-1, -1, max_answer_tokens))

    # Rows go by group, beam, document. A context's keys and values were computed once: its beams get copies.
    doc = torch.arange(docs, device=device)
    group = torch.arange(groups, device=device)[:, None, None]
    state = generator.fork(state, (group * docs + doc).expand(groups, num_beams, docs).flatten())
    log_probs = marginal(first).expand(groups, num_beams, vocab)
    live_scores = torch.full((groups, num_beams), -math.inf, device=device)
    finished_scores = live_scores.clone()
    live_scores[:, 0] = 0.0  # one beam at first, or every token would be found num_beams times
    # What is not written yet is EOS, so a hypothesis that ends needs nothing appended.
    live = torch.full((groups, num_beams, max_answer_tokens), eos, device=device)
    finished = live.clone()
    done = torch.zeros((groups, 1), dtype=torch.bool, device=device)

    for step in range(max_answer_tokens):
        scores = live_scores[..., None] + log_probs
        if step == max_answer_tokens - 1:
            scores = scores.masked_fill(torch.arange(vocab, device=device) != eos, -math.inf)
        best, index = scores.flatten(1).topk(2 * num_beams)
        parent, token = index // vocab, index % vocab

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
        if done.all():
            break
        if num_beams > 1:
            generator.reorder(state, ((group * num_beams + parent[..., None]) * docs + doc).flatten())
        log_probs = marginal(generator.step(state, token.repeat_interleave(docs, dim=1).flatten()))

    if not (finished_scores[:, 0] > -math.inf)[present.any(1)].all():
        raise ValueError("the generator's probabilities are not finite: check its weights or use fp32")
    return [
        {tuple(ids[: ids.index(eos) + 1]): p for ids, p in zip(rows, scores, strict=True) if p > -math.inf}
        for rows, scores in zip(finished.tolist(), finished_scores.tolist(), strict=True)
    ]


def _rescore(
    generator: Generator,
    state: DecoderState,
    first: Tensor,
    candidates: list[list[tuple[int, ...]]],
    n_docs: int,
) -> list[dict[tuple[int, ...], list[float]]]:
    """log p(y|x,z) of every candidate (tokens with EOS) of B questions under each of the question's passages.

    `state` and `first` [B * n_docs, V] as in `_beam_search`: the contexts' keys and values are used again.
    """
    pairs = [
        (question, tokens, doc)
        for question, union in enumerate(candidates)
        for tokens in union
        for doc in range(n_docs)
    ]
    pairs.sort(key=lambda pair: len(pair[1]))  # alike lengths together, for little padding
    longest = len(pairs[-1][1])
    # No more rows than the beam search had, so that the caches need no more memory than there.
    searched = max(len(first), len(pairs) // n_docs)
    at_once = max(1, min(searched, LOGITS_AT_ONCE // (longest * first.shape[-1])))
    scores = [{tokens: [-math.inf] * n_docs for tokens in union} for union in candidates]
    for begin in range(0, len(pairs), at_once):
        chunk = pairs[begin : begin + at_once]
        width = len(chunk[-1][1])
        rows = torch.tensor([question * n_docs + doc for question, _, doc in chunk], device=first.device)
        padded = [tokens + (generator.eos_token_id,) * (width - len(tokens)) for _, tokens, _ in chunk]
        targets = torch.tensor(padded, device=first.device)
        lengths = torch.tensor([len(tokens) for _, tokens, _ in chunk], device=first.device)
        log_probs = first[rows, targets[:, 0]][:, None]
        if width > 1:
            logits = generator.advance(generator.fork(state, rows), targets[:, :-1])
            later = logits.float().log_softmax(-1).gather(2, targets[:, 1:, None]).squeeze(2)
            log_probs = torch.cat([log_probs, later], dim=1)
        padding = torch.arange(width, device=first.device) >= lengths[:, None]
        totals = log_probs.masked_fill(padding, 0.0).sum(1).tolist()
        for (question, tokens, doc), total in zip(chunk, totals, strict=True):
            scores[question][tokens][doc] = total
    return scores


def _logsumexp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values)) if top > -math.inf else top
