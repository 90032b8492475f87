"""Answers from passages read in parallel, against a plain beam search over transformers' model told what to see."""

from functools import partial

import pytest
import torch

from stages.evaluation.answering import answer, evaluate, retrieve
from stages.evaluation.causal_state import CausalState
from stages.evaluation.decoding import generate
from stages.evaluation.llama_decoder import LlamaState
from stages.evaluation.states import start
from stages.generation import marginalization
from stages.rag.together import joint_contexts, prompts_together, read_together
from tests.evaluation.test_answering import ASKED, GOLD_ROWS, PASSAGES, SETTINGS
from tests.evaluation.test_decoding import beam_search, check
from tests.rag.test_model import lose
from tests.rag.test_parallel import PREFIX, ROWS, SOME, WEIGHED, batch_of, by_the_book, rag_of, some_prior, way_by
from tests.tiny_rag import ANSWERS, LENGTHS, QUESTIONS

MOST = 5
LIBRARY = ["gemma", "gpt2", "olmo2"]  # by its own cache; the others by our decoder


def answers_of(rag, rows, num_beams, some=SOME, weights=None):
    batch = batch_of(rag, some)
    ids, mask = (part.unflatten(0, rows.shape) for part in rag.contexts(batch, rows))
    prior = torch.zeros(rows.shape).masked_fill(rows < 0, float("-inf"))
    prior[(rows < 0).all(1), 0] = 0.0
    joined = partial(joint_contexts, rag, batch, rows, reading=way_by(weights), log_prior=weights)
    return generate(
        rag.generator, ids, mask, prior.log_softmax(1), num_beams=num_beams, max_answer_tokens=MOST, decoding="thorough",
        marginalization="sequence", joined=joined,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["bare", "prefix"])
@pytest.mark.parametrize(("num_beams", "weighed"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("family", ["llama", "qwen3", *LIBRARY])
def test_answers_are_a_plain_beam_searchs_over_the_librarys_model(family, weighed, num_beams, prefix):
    rag = rag_of(family, prefix)
    state = start(rag.generator, prompts_together(rag, batch_of(rag), ROWS, "parallel"))
    assert isinstance(state, CausalState if family in LIBRARY else LlamaState)
    prior = some_prior() if weighed else None
    for place, found in enumerate(answers_of(rag, ROWS, num_beams, weights=prior)):

        def next_tokens(written, place=place):
            weights = prior[place] if weighed else None
            given = SOME[place], ROWS[place].tolist(), written, rag.generator.model, weights
            return by_the_book(rag, *given)[-1].tolist()

        tokens, log_prob = beam_search(next_tokens, lambda asked: None, num_beams, MOST)[0]
        assert found.token_ids == list(tokens[:-1])
        assert found.log_prob == pytest.approx(log_prob, abs=1e-4)


@torch.no_grad()
@WEIGHED
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_answers_likelihood_is_that_of_training_and_no_order_changes_it(family, weighed):
    """Rescored, too: there several tokens are read at once."""
    rag = rag_of(family, PREFIX)
    prior = some_prior() if weighed else None
    for rows, weights in ((ROWS, prior), (ROWS.flip(1), prior.flip(1) if weighed else None)):
        prompts = prompts_together(rag, batch_of(rag), rows, way_by(weights), weights)
        state = start(rag.generator, prompts)
        first, at_once = state.first(), state.fork(torch.arange(len(rows)))
        for place, found in enumerate(answers_of(rag, rows, 3, weights=weights)):
            targets = torch.tensor([[*found.token_ids, rag.generator.eos_token_id]])
            batch = batch_of(rag, [SOME[place]])._replace(targets=targets, target_mask=torch.ones_like(targets).bool())
            given = None if prior is None else prior[[place]]
            scored = read_together(rag, batch, ROWS[[place]], way_by(given), given).joint.sum().item()
            assert found.log_prob == pytest.approx(scored, abs=1e-4)
            fed = targets[:, :-1]
            if fed.shape[1]:
                log_probs = at_once.fork(torch.tensor([place])).advance(fed).log_softmax(-1)
                rest = log_probs.gather(-1, targets[:, 1:, None]).sum()
                assert (first[place, targets[0, 0]] + rest).item() == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluation_reads_in_parallel_and_shows_the_same_columns(family):
    rag = rag_of(family)
    metrics, predictions = evaluate(rag, ASKED, PASSAGES, GOLD_ROWS, SETTINGS, "sequence", reading="parallel")
    each, others = evaluate(rag, ASKED, PASSAGES, GOLD_ROWS, SETTINGS, "sequence", reading="each")
    assert metrics.keys() == each.keys() and metrics["recall_at_5"] == each["recall_at_5"]
    assert metrics["closed_book_f1"] == each["closed_book_f1"] and metrics["oracle_f1"] == each["oracle_f1"]
    for row, other in zip(predictions, others, strict=True):
        assert row.keys() == other.keys() and [p["id"] for p in row["passages"]] == [p["id"] for p in other["passages"]]
        assert sum(p["posterior"] for p in row["passages"]) == pytest.approx(1, abs=1e-4)
    assert [row["log_prob"] for row in predictions] != pytest.approx([row["log_prob"] for row in others], abs=1e-2)


def test_batching_changes_no_answer_and_without_passages_it_is_the_closed_books():
    rag = rag_of("llama", PREFIX)
    lose(rag)
    examples = rag.examples(QUESTIONS, ANSWERS)
    found = retrieve(rag, examples, 3, 4)
    prior = marginalization.log_prior(found.scores)

    def answers(batch_size, rows, prior):
        settings = SETTINGS.model_copy(update={"batch_size": batch_size})
        return list(answer(rag, examples, rows, prior, settings, "sequence", "", reading="parallel"))

    whole, alone = answers(9, found.rows, prior), answers(1, found.rows, prior)
    for one, other in zip(whole, alone, strict=True):
        check(
            one,
            (*other.token_ids, rag.generator.eos_token_id),
            other.log_prob,
            other.doc_log_probs,
            LENGTHS.answer_tokens,
        )
    none = torch.zeros(9, 1)
    closed = answers(9, none.long() - 1, none)
    lost = (found.rows < 0).all(1).nonzero().flatten().tolist()
    assert lost
    for place in lost:
        assert whole[place].token_ids == closed[place].token_ids
        assert whole[place].log_prob == pytest.approx(closed[place].log_prob, abs=1e-4)
