"""Evaluation on a model of random weights: its lines agree with each other and with single questions."""

import pytest
import torch
from datasets import Dataset

from stages.compute.precision import cast_weights, generator_dtype
from stages.corpus.arrow import gold_grades
from stages.evaluate import summary
from stages.evaluation.answering import answer, evaluate, retrieve
from stages.evaluation.scoring import Rules
from stages.generation import marginalization
from stages.params import load_params
from stages.settings.runs import Evaluate
from stages.verdicts.of_evaluation import evaluation_signs
from tests.rag.test_model import lose
from tests.tiny_rag import ANSWERS, QUESTIONS, TEXTS, TITLES, tiny_rag

SETTINGS = Evaluate(
    split="test", num_samples=None, decoding="thorough", num_beams=2, batch_size=4, precision="fp32", further_depths=[]
)
PASSAGES = Dataset.from_list([{"id": f"p{i}", "title": TITLES[i], "text": TEXTS[i]} for i in range(9)])
ASKED = Dataset.from_list(
    [
        {"id": f"q{i}", "question": QUESTIONS[i], "answers": [ANSWERS[i]], "positive_ids": [f"p{i}"] if i < 7 else []}
        for i in range(9)
    ]
)
GOLD_ROWS = gold_grades(ASKED, PASSAGES)


def run(rag, **changes):
    return evaluate(rag, ASKED, PASSAGES, GOLD_ROWS, SETTINGS.model_copy(update=changes), "sequence")


def test_the_lines_of_a_small_evaluation():
    rag = tiny_rag()
    metrics, predictions = run(rag)
    assert metrics["questions"] == 9 and metrics["questions_with_gold_passage"] == 7
    assert metrics["recall_at_20"] == 100.0 and metrics["recall_at_1"] <= metrics["recall_at_5"]
    found = retrieve(rag, rag.examples(QUESTIONS, ANSWERS), 20, 4)
    assert found.rows.shape == (9, 20) and (found.rows[:, 9:] == -1).all()
    first = sum(found.rows[i, 0].item() == i for i in range(7)) / 7
    assert metrics["recall_at_1"] == pytest.approx(100 * first)
    for row, given in zip(predictions, found.rows[:, :3].tolist(), strict=True):
        assert [passage["id"] for passage in row["passages"]] == [f"p{i}" for i in given]
        assert sum(passage["prior"] for passage in row["passages"]) == pytest.approx(1, abs=1e-4)
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_what_needs_a_gold_passage_is_measured_over_the_questions_that_name_one():
    metrics, predictions = run(tiny_rag())
    alone = evaluate(tiny_rag(), ASKED.select(range(7)), PASSAGES, GOLD_ROWS[:7], SETTINGS, "sequence")[0]
    assert metrics["closed_book_f1_of_oracle_questions"] == pytest.approx(alone["closed_book_f1"])
    assert metrics["oracle_f1"] == pytest.approx(alone["oracle_f1"])
    assert alone["closed_book_f1_of_oracle_questions"] == alone["closed_book_f1"]


def test_without_gold_passages_there_are_no_such_metrics_and_nothing_is_decoded_for_them(monkeypatch):
    decoded = []

    def watched(*arguments, **named):
        decoded.append(arguments[6])
        return answer(*arguments, **named)

    monkeypatch.setattr("stages.evaluation.answering.answer", watched)
    metrics, _ = evaluate(tiny_rag(), ASKED, PASSAGES, [{}] * 9, SETTINGS, "sequence")
    assert decoded == ["answer", "closed book"]
    assert not [name for name in metrics if name.startswith(("recall", "oracle")) or "of_oracle" in name]
    assert {"em", "f1", "answer_recall_at_5", "closed_book_em"} <= metrics.keys()
    assert metrics["questions_with_gold_passage"] == 0
    assert evaluation_signs(metrics, load_params().signs).tags["sign.reads_passages"] == "n/a"
    assert "answer recall@5" in summary(metrics, "test") and "gold passage" not in summary(metrics, "test")
    named = evaluate(tiny_rag(), ASKED, PASSAGES, GOLD_ROWS, SETTINGS, "sequence")[0]
    assert decoded[2:] == ["answer", "closed book", "gold passage"]
    assert ", recall@5" in summary(named, "test") and "gold passage given: EM" in summary(named, "test")


@pytest.mark.parametrize("decoding", ["thorough", "fast"])
def test_the_answer_from_a_passage_that_was_read_is_the_one_that_decoding_from_it_alone_makes(decoding):
    rag = tiny_rag()
    settings = SETTINGS.model_copy(update={"decoding": decoding})
    examples = rag.examples(QUESTIONS, ANSWERS)
    found = retrieve(rag, examples, 3, 4)
    prior, places = marginalization.log_prior(found.scores), [place % 3 for place in range(8)] + [-1]
    answers = list(answer(rag, examples, found.rows, prior, settings, "sequence", "", alone=places))
    given = found.rows.gather(1, torch.tensor(places).clamp(min=0)[:, None])
    nothing = torch.zeros(len(places), 1)
    for one, other in zip(answers[:8], answer(rag, examples, given, nothing, settings, "sequence", ""), strict=False):
        assert one.alone.token_ids == other.token_ids and one.alone.text == other.text
        assert one.alone.finished == other.finished
        assert one.alone.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        assert one.alone.doc_log_probs == pytest.approx(other.doc_log_probs, abs=1e-4)
    assert answers[8].alone is None
    by_token = answer(rag, examples, found.rows, prior, settings, "token", "", alone=places)
    assert not any(one.alone for one in by_token), "one search over all passages says nothing of each alone"


def test_unanswerable_questions_alone_have_no_recall_to_tell():
    asked = ASKED.remove_columns("answers").add_column("answers", [["none"]] * 9)
    rules = Rules(unanswerable="none")
    metrics, _ = evaluate(tiny_rag(), asked, PASSAGES, [{}] * 9, SETTINGS, "sequence", rules=rules)
    assert metrics["questions_without_answer"] == 9 and "answer_recall_at_5" not in metrics
    assert "recall" not in summary(metrics, "test") and "on 9 test questions" in summary(metrics, "test")


@pytest.mark.parametrize("marginal", ["sequence", "token"])
@pytest.mark.parametrize("decoding", ["thorough", "fast"])
def test_a_question_without_passages_gets_its_closed_book_answer_and_is_counted(marginal, decoding):
    rag = tiny_rag()
    lose(rag)
    settings = SETTINGS.model_copy(update={"batch_size": 9, "decoding": decoding})
    metrics, predictions = evaluate(rag, ASKED, PASSAGES, GOLD_ROWS, settings, marginal)
    assert metrics["questions_without_passages"] == 1
    assert predictions[0]["passages"] == [] and len(predictions[1]["passages"]) == 3
    examples = rag.examples(QUESTIONS[:1], ANSWERS[:1])
    none = torch.zeros(1, 1)
    [closed] = answer(rag, examples, none.long() - 1, none, settings, marginal, "")
    assert predictions[0]["prediction"] == closed.text
    assert predictions[0]["log_prob"] == pytest.approx(closed.log_prob, abs=1e-4)
    assert evaluation_signs(metrics, load_params().signs).tags["sign.finds_passages"] == "bad"


def test_batching_changes_no_prediction():
    rag = tiny_rag()
    together, alone = run(rag, batch_size=9)[1], run(rag, batch_size=1)[1]
    for one, other in zip(together, alone, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["log_prob"] == pytest.approx(other["log_prob"], abs=1e-3)


def test_a_questions_log_prob_is_the_training_loss_of_its_answer():
    rag = tiny_rag()
    examples = rag.examples(QUESTIONS, ANSWERS)
    found = retrieve(rag, examples, 3, 4)
    prior = marginalization.log_prior(found.scores)
    for index, given in enumerate(answer(rag, examples, found.rows, prior, SETTINGS, "sequence", "")):
        targets = torch.tensor([[*given.token_ids, rag.generator.eos_token_id]])
        batch = rag.batch(examples, [index])._replace(targets=targets, target_mask=torch.ones_like(targets).bool())
        with torch.no_grad():
            nll = rag(batch, marginal="sequence").nll.item()
        assert -given.log_prob == pytest.approx(nll, abs=1e-3)


def test_a_generator_in_half_precision_answers_after_the_same_retrieval_with_nearly_the_same_scores():
    usual = run(tiny_rag())
    rag = tiny_rag()
    cast_weights(rag.generator_model, generator_dtype("bf16", torch.device("cpu")))
    halved = run(rag)
    names = [name for name in usual[0] if "recall" in name]
    assert [halved[0][name] for name in names] == [usual[0][name] for name in names]
    for one, other in zip(usual[1], halved[1], strict=True):
        assert [passage["prior"] for passage in one["passages"]] == [passage["prior"] for passage in other["passages"]]
        assert other["log_prob"] == pytest.approx(one["log_prob"], rel=0.05)


def test_the_precision_of_decoding_on_a_cpu():
    cpu = torch.device("cpu")
    assert [generator_dtype(name, cpu) for name in ("auto", "fp32", "bf16")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]
    with pytest.raises(ValueError, match="evaluate.precision: fp16"):
        generator_dtype("fp16", cpu)
