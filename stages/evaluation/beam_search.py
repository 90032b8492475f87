"""Beam search over groups of contexts that share their hypotheses: one a passage, or all of a question's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.evaluation.states import State
from stages.generation.generator import Generator


def beam_search(
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
