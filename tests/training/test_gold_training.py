"""Training with known positives beside the answers: equal updates however they are cut up, kills, curves, and what it is for."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from stages.bm25.hits import Hits
from stages.corpus.arrow import FOUND, PASSAGES, read_rows, write_rows
from stages.corpus.arrow import QUESTIONS as ASKED
from stages.params import load_params
from stages.rag import model
from stages.rag.prior import PriorWeights, Weights
from stages.storage.checkpoints import Checkpoints
from stages.training import opening
from stages.training.curves import tracked_name
from stages.training.progress import Window
from stages.training.trainer import Trainer
from tests.compute.test_out_of_memory import halved_and_small
from tests.compute.test_ranks import THREE_STEPS, alone, assert_same
from tests.rag.test_gold import WORDS
from tests.test_kinds_of_questions import rows
from tests.test_params import changed
from tests.tiny_rag import ANSWERS, NEW, QUESTIONS, SETTINGS, TOGETHER, reranked_rag, tiny_rag
from tests.training.test_index_refresh import refreshing_rag
from tests.training.test_trainer import SGD_STEP, assert_same_weights, killed_and_resumed, sgd, untimed  # noqa: F401
from tests.whole_way import whole_way

# Question i is about passage i; of two the gold passage is not known, one has two of them.
GOLDS = [[0], [1], [], [3], [4, 2], [5], [6], [], [8]]


def hybrid():
    rag = tiny_rag()
    rag.prior = PriorWeights(Weights(1.5, 0.4, 2.0, 1.25), learns=True)
    return rag


KINDS = {
    "dense": (tiny_rag, {}), "hybrid": (hybrid, {}), "reranked": (reranked_rag, {}), "together": (tiny_rag, TOGETHER),
    "average": (tiny_rag, {"marginalization": "average"}),
    "refreshed": (lambda: refreshing_rag(dropout=0.0), {}),
}  # fmt: skip


def run(kind="dense", folder=None, on_point=lambda point: None, rag=None, golds=GOLDS, **settings):
    make, recipe = KINDS[kind]
    rag = rag or make()
    chosen = SETTINGS.model_copy(update={"positives_weight": 0.7, **settings})
    trainer = Trainer(
        rag, NEW.model_copy(update=recipe), chosen, "no", 7, Checkpoints(folder, 2) if folder else None
    )  # fmt: skip
    hits = Hits(*reversed(WORDS.topk(4, dim=1))) if kind in ("hybrid", "reranked") else None
    validation = rag.examples(QUESTIONS, ANSWERS, hits)
    trainer.run(rag.examples(QUESTIONS, ANSWERS, hits, golds), validation, on_point)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_however_a_step_is_cut_up_the_update_is_the_same(sgd, kind):  # noqa: F811
    whole = run(kind, batch_size=8, gradient_accumulation_steps=1, max_grad_norm=1e9, **SGD_STEP)
    parts = run(kind, batch_size=2, gradient_accumulation_steps=4, max_grad_norm=1e9, **SGD_STEP)
    assert_same_weights(whole, parts, 1e-6)
    without = run(kind, golds=None, batch_size=8, gradient_accumulation_steps=1, max_grad_norm=1e9, **SGD_STEP)
    parts_that_rank = [
        name for name in ("question_encoder", "cross_encoder", "context_encoder") if getattr(whole.rag, name)
    ]
    for name in parts_that_rank:
        mine, other = (list(getattr(one.rag, name).parameters()) for one in (whole, without))
        assert max((a - b).abs().max() for a, b in zip(mine, other, strict=True)) > 1e-5, name
    for one, other in zip(whole.progress.history[1:], parts.progress.history[1:], strict=True):
        for name in ("train_loss_per_sequence", "gold_nll", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    first, of_answers = whole.progress.history[1], without.progress.history[1]
    assert first["train_loss_per_sequence"] == pytest.approx(of_answers["train_loss_per_sequence"], rel=1e-5)
    assert whole.progress.history[0] == without.progress.history[0] and "gold_nll" not in of_answers


def test_the_gradient_is_the_answers_and_so_many_times_the_gold_passages():
    rag = reranked_rag()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS, None, GOLDS), list(range(9)))

    def gradient(loss):
        rag.zero_grad()
        loss(rag(batch, marginal="sequence")).backward()
        return [p.grad.clone() for p in rag.parameters() if p.grad is not None]

    gradient(lambda output: output.gold_nll.sum())
    assert not any(p.grad is not None and p.grad.any() for p in rag.generator_model.parameters())
    trainer = Trainer(rag, NEW, SETTINGS.model_copy(update={"positives_weight": 0.7}), "no", 7, None)
    expected = gradient(lambda output: (output.nll.sum() + 0.7 * output.gold_nll.sum()) / 9)
    rag.zero_grad()
    examples = rag.examples(QUESTIONS, ANSWERS, None, GOLDS)
    trainer.accumulation.add(examples, [list(range(9))], None, 9, Window.on(trainer.accelerator.device))
    found = [p.grad for p in rag.parameters() if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_halved_equals_small_from_the_start(sgd):  # noqa: F811
    halved_and_small(run, "gold_nll")


@pytest.mark.parametrize("kind", ["dense", "reranked", "refreshed"])
def test_killed_and_resumed_equals_never_killed(tmp_path, kind):
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 3}
    settings |= {"index_refresh_steps": 2} if kind == "refreshed" else {}
    killed_at = 3 if kind == "refreshed" else 5
    whole, resumed = killed_and_resumed(partial(run, kind), tmp_path, killed_at, **settings)
    curves = [[{k: v for k, v in p.items() if k != "refresh_wait"} for p in untimed(one)] for one in (whole, resumed)]
    assert curves[0] == curves[1] and "gold_nll" in curves[0][-1]


def test_the_curve_is_of_the_questions_whose_gold_passage_is_known():
    rag = tiny_rag()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS, None, GOLDS), list(range(9)))
    expected = rag(batch, marginal="sequence").gold_nll.sum().item() / 7
    history = run(max_steps=1, warmup_steps=0, batch_size=9, gradient_accumulation_steps=1).progress.history
    assert (
        history[1]["gold_nll"] == pytest.approx(expected, rel=1e-5) and tracked_name("gold_nll") == "loss/gold_passages"
    )
    unknown = run(golds=[[]] * 8 + [[8]], max_steps=1, warmup_steps=0, batch_size=1, gradient_accumulation_steps=1)
    assert "gold_nll" not in unknown.progress.history[1]


def test_gold_passages_rise_in_the_prior_where_the_retriever_starts_wrong():
    """With answers alone, over the passages read, they need not."""
    steps = {
        "max_steps": 40,
        "batch_size": 9,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "eval_steps": 40,
    }

    def share(rag):
        """Of the gold passages in the prior over all passages."""
        with torch.no_grad():
            vectors = rag.encode_questions(rag.batch(rag.examples(QUESTIONS, ANSWERS), list(range(9))))
            prior = (vectors @ rag.index.vectors.T).softmax(1)
        return torch.stack([prior[row, gold].sum() for row, gold in enumerate(GOLDS) if gold])

    start, learned, answers_alone = share(tiny_rag()), run(**steps).rag, run(golds=None, **steps).rag
    assert start.mean() < 0.2 and share(learned).min() > 0.8 > 0.5 > share(answers_alone).mean()
    found = learned.retrieve(
        learned.encode_questions(learned.batch(learned.examples(QUESTIONS, ANSWERS), list(range(9))))
    )[0]
    assert all(found[row, 0] in gold for row, gold in enumerate(GOLDS) if gold)


def test_without_a_weight_nothing_of_it_is_computed(monkeypatch):
    monkeypatch.setattr(model, "retrieve_with_golds", None)
    trainer = run("reranked", golds=None, positives_weight=0.0)
    assert not any("gold_nll" in point for point in trainer.progress.history)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Three questions: one names its passage, of one it was found by answer, of one it is not known."""
    shipped = yaml.safe_load(changed("train.positives_weight", 0.5))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(shipped))
    monkeypatch.chdir(tmp_path)
    asked = [
        {"id": f"q{i}", "question": f"{i}?", "answers": ["a"], "positive_ids": [], "grades": None} for i in range(3)
    ]
    asked[1]["positive_ids"] = ["p2", "p0"]
    passages = [{"id": f"p{i}", "title": "", "text": f"text {i}"} for i in range(3)]
    write_rows(Path("data/prepared/passages.arrow"), PASSAGES, passages)
    for split in ("train", "validation"):
        write_rows(Path(f"data/prepared/{split}.arrow"), ASKED, asked)
    write_rows(Path("data/positives/train.arrow"), FOUND, [{"question": 2, "passage": 1}])
    return load_params(Path("params.yaml"))


def test_training_takes_the_positives_that_the_warm_up_takes_and_validation_none(prepared, tmp_path):
    rag = tiny_rag(passages=3)
    settings = prepared.retriever.model_copy(update={"hybrid_depth": 0})
    params = prepared.model_copy(update={"retriever": settings})
    examples, _ = opening.open_examples(params, rag, opening.open_rows())
    assert rag.batch(examples["train"], [2, 1, 0]).golds.tolist() == [[1, -1, -1], [2, 0, -1], [-1, -1, -1]]
    assert examples["validation"].golds is None and opening.POSITIVES in opening.inputs_of(params)
    off = params.model_copy(update={"train": params.train.model_copy(update={"positives_weight": 0.0})})
    examples, _ = opening.open_examples(off, rag, opening.open_rows())
    assert examples["train"].golds is None and opening.POSITIVES not in opening.inputs_of(off)
    read = opening.open_rows()
    assert opening.known_golds(read, [2, 0]) == [[1], []]
    with pytest.raises(
        ValueError, match="train.arrow: no question has a positive passage, train.positives_weight needs"
    ):
        opening.known_golds(read, [0])


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_however_many_ranks_share_an_update_it_is_the_same(crew, tmp_path, fsdp):
    settings = {"golds": GOLDS, "positives_weight": 0.7, **THREE_STEPS, "max_grad_norm": 1e9}
    crew.do("train", tmp_path / "ranks", batch_size=4, gradient_accumulation_steps=2, fsdp=fsdp, **settings)
    whole = alone(tmp_path / "alone", batch_size=8, gradient_accumulation_steps=1, **settings)
    assert_same(whole, tmp_path / "ranks", 1 if fsdp else 2)


@pytest.mark.slow
def test_through_the_pipeline_they_are_found_by_answer_where_no_warm_up_wants_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions = rows(lambda i, valley: [valley])
    for row in questions["train"]:
        del row["positive_ids"]
    whole_way(questions, retriever={"steps": 0}, train={"positives_weight": 0.5})
    assert list(read_rows(Path("data/positives/train.arrow"))["question"]) == list(range(6))
    curve = Path("data/curves/gold_nll.tsv").read_text(encoding="utf-8").split()
    assert curve[:2] == ["step", "value"] and len(curve) == 6 and float(curve[3]) > 0
