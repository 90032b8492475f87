"""What trains the retriever beside the answers' likelihood; the generator gets no gradient.

Where passages are read together the joint likelihood has no prior in it: two losses take the prior and, as a constant, each
answer's likelihood under each passage alone. The third takes the passages that are known to be right, however they are read.
Shapes: B questions, K retrieved passages each, T answer tokens (EOS included, padded).
"""

from torch import Tensor

from stages.generation import marginalization


def emdr2(prior: Tensor, alone: Tensor, mask: Tensor) -> Tensor:
    """-log sum_z p(z|x) sg[p(y|x, z)], nats a question [B] (Sachan et al. 2021, arXiv:2106.05346, equation 6).

    Its gradient on the scores is prior minus posterior, as RAG-Sequence's. `prior` [B, K] is log p(z|x), -inf where a
    passage is missing; `alone` [B, K, T] log p(y_t | y_<t, x, z); `mask` [B, T] is true at answer tokens.
    """
    return marginalization.sequence_nll(prior, alone.detach(), mask)


def perplexity_distillation(prior: Tensor, alone: Tensor, mask: Tensor) -> Tensor:
    """KL(q || p(z|x)), q the softmax over the passages of log p(y|x, z): nats a question [B] (Izacard et al. 2022,
    arXiv:2208.03299, section 2.2).

    Its gradient on the scores is prior minus q, the posterior under a flat prior. Arguments as of `emdr2`; missing
    passages have no share in q.
    """
    missing = prior.detach().isinf()
    flat = prior.detach().masked_fill(~missing, 0.0)
    target = (flat + marginalization.answer_log_probs(alone.detach(), mask)).log_softmax(-1)
    # Where both are -inf there is nothing to differ.
    return (target.exp() * (target - prior).masked_fill(missing, 0.0)).sum(-1)


def gold_nll(scores: Tensor, gold: Tensor) -> Tensor:
    """-log sum_z p(z|x) over the gold passages z, p the softmax of `scores` [B, C] over all candidates: nats a question [B].

    With one of them it is Karpukhin et al. 2020, arXiv:2004.04906, equation 2. Its gradient on the scores is prior minus the
    gold passages' prior among themselves. `gold` [B, C] says which are gold; scores are -inf where a candidate is missing. A
    question without a gold candidate costs 0 and has no gradient.
    """
    without = ~gold.any(1, keepdim=True)
    prior = scores.masked_fill(without, 0.0).log_softmax(1)
    return -prior.masked_fill(~(gold | without), float("-inf")).logsumexp(1)


LOSS = {"emdr2": emdr2, "perplexity_distillation": perplexity_distillation}
