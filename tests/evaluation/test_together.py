"""Passages read together, from retrieval to the predictions: the same columns, and what a single passage says stays."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stages.evaluation.answering import answer, evaluate, retrieve
from stages.generation import marginalization
from stages.generation.generator import generator_from
from stages.rag.opening import open_rag
from tests.evaluation.test_answering import ASKED, GOLD_ROWS, PASSAGES, SETTINGS
from tests.evaluation.test_decoding import check
from tests.rag.test_families import rag_of as family_of
from tests.rag.test_model import lose
from tests.tiny_rag import ANSWERS, LENGTHS, QUESTIONS, tiny_rag, tokenizer

EOS = 2


def rag_of(kind, n_docs=3):
    rag, generator = tiny_rag(), tiny_rag().generator
    if kind == "llama":
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=3 * LENGTHS.context_tokens + LENGTHS.answer_tokens, vocab_size=8192, bos_token_id=0,
            pad_token_id=1, eos_token_id=2, initializer_range=0.3,
        )  # fmt: skip
        generator = generator_from(AutoModelForCausalLM.from_config(config).eval(), tokenizer("generator"))
    return open_rag(
        rag.encoder, generator, rag.index, rag.passages, n_docs, LENGTHS, torch.device("cpu"), reading="together"
    )  # fmt: skip


def evaluated(rag, reading="together", settings=SETTINGS):
    return evaluate(rag, ASKED, PASSAGES, GOLD_ROWS, settings, "sequence", reading=reading)


BOTH = pytest.mark.parametrize("kind", ["bart", "llama"])


@BOTH
def test_evaluation_reads_together_and_shows_the_same_columns(kind):
    rag = rag_of(kind)
    metrics, predictions = evaluated(rag)
    each, apart = evaluated(rag, "each")
    assert metrics.keys() == each.keys() and metrics["recall_at_5"] == each["recall_at_5"]
    assert metrics["closed_book_f1"] == each["closed_book_f1"] and metrics["oracle_f1"] == each["oracle_f1"]
    for row, other in zip(predictions, apart, strict=True):
        assert row.keys() == other.keys()
        assert [p["id"] for p in row["passages"]] == [p["id"] for p in other["passages"]]
        assert sum(p["posterior"] for p in row["passages"]) == pytest.approx(1, abs=1e-4)
    assert [row["log_prob"] for row in predictions] != pytest.approx([row["log_prob"] for row in apart], abs=1e-2)


@BOTH
def test_batching_changes_no_answer_and_decoding_is_read_as_nothing(kind):
    rag = rag_of(kind)
    examples = rag.examples(QUESTIONS, ANSWERS)
    found = retrieve(rag, examples, 3, 4)
    prior = marginalization.log_prior(found.scores)

    def answers(**changes):
        settings = SETTINGS.model_copy(update=changes)
        return list(answer(rag, examples, found.rows, prior, settings, "sequence", "", reading="together"))

    whole = answers(batch_size=9)
    assert answers(batch_size=9, decoding="fast") == whole
    for one, other in zip(whole, answers(batch_size=1), strict=True):
        check(one, (*other.token_ids, EOS), other.log_prob, other.doc_log_probs, LENGTHS.answer_tokens)


@BOTH
def test_a_question_without_passages_gets_its_closed_book_answer(kind):
    rag = rag_of(kind)
    lose(rag)
    settings = SETTINGS.model_copy(update={"batch_size": 9})
    metrics, predictions = evaluated(rag, settings=settings)
    assert metrics["questions_without_passages"] == 1 and predictions[0]["passages"] == []
    assert predictions[0]["prediction"] == predictions[0]["without_passage"]["prediction"]
    none = torch.zeros(1, 1)
    [closed] = answer(rag, rag.examples(QUESTIONS[:1], ANSWERS[:1]), none.long() - 1, none, settings, "sequence", "")
    assert predictions[0]["log_prob"] == pytest.approx(closed.log_prob, abs=1e-4)


@BOTH
def test_one_passage_a_question_is_answered_as_when_read_by_itself(kind):
    rag = rag_of(kind, n_docs=1)
    for one, other in zip(*(evaluated(rag, way)[1] for way in ("each", "together")), strict=True):
        assert one == other


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_passage_of_twice_the_prior_is_answered_from_as_one_that_stands_there_twice(family):
    rag = family_of(family)
    examples = rag.examples(QUESTIONS, ANSWERS)
    rows = retrieve(rag, examples, 3, 4).rows
    prior = torch.tensor([3 / 6, 2 / 6, 1 / 6]).log().expand(9, -1)

    def answers(rows, prior, reading, batch_size=9):
        settings = SETTINGS.model_copy(update={"batch_size": batch_size, "num_beams": 3})
        return list(answer(rag, examples, rows, prior, settings, "sequence", "", reading=reading))

    found = answers(rows, prior, "weighted")
    copies = answers(torch.cat([rows, rows[:, [0, 0, 1]]], 1), torch.zeros(9, 6).log_softmax(1), "together")
    plain = answers(rows, prior, "together")
    for one, other in zip(found, copies, strict=True):
        assert one.token_ids == other.token_ids and one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    assert [one.log_prob for one in found] != pytest.approx([one.log_prob for one in plain], abs=1e-2)
    for one, other in zip(found, answers(rows, prior, "weighted", batch_size=1), strict=True):
        check(one, (*other.token_ids, EOS), other.log_prob, other.doc_log_probs, LENGTHS.answer_tokens)


def test_weighted_a_question_without_passages_gets_its_closed_book_answer():
    rag = family_of("bart")
    lose(rag)
    metrics, predictions = evaluated(rag, "weighted", SETTINGS.model_copy(update={"batch_size": 9}))
    assert metrics["questions_without_passages"] == 1 and predictions[0]["passages"] == []
    assert predictions[0]["prediction"] == predictions[0]["without_passage"]["prediction"]


def test_a_prompt_of_all_passages_must_fit_into_the_model():
    rag = rag_of("llama")
    opened = partial(open_rag, rag.encoder, rag.generator, rag.index, rag.passages, 4, LENGTHS, torch.device("cpu"))
    many = LENGTHS.context_tokens * 4 + LENGTHS.answer_tokens
    with pytest.raises(ValueError, match=f"retriever.n_docs: 4 .* {many} positions, but the generator has"):
        opened(reading="together")
    opened(reading="each")
