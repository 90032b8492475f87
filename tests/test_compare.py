"""Comparisons through DVC's experiments: temporary runs and two queue workers, nothing lost."""

import json
import time
from pathlib import Path

import pytest

from stages.compare import SWITCHES, ablate, draw, old_settings, summarise, value_of, verdict
from stages.corpus.arrow import QUESTIONS, write_rows
from stages.params import load_params
from stages.settings.runs import Recipe
from tests.test_pipeline import mlflow_of, project, run  # noqa: F401


def runs_of(folder: Path) -> dict:
    return mlflow_of(folder)[1]


def test_every_switch_of_a_recipe_is_in_the_ablation():
    params = load_params()
    assert {*SWITCHES, "reading"} == set(Recipe.model_fields)  # in which the two do not differ
    assert all(getattr(params.recipes["new"], name) != getattr(params.recipes["old"], name) for name in SWITCHES)
    assert value_of(False) == "false" and "train.recipe=old" in old_settings(3)


def test_the_ablation_of_a_recipe_that_reads_together_is_refused(monkeypatch):
    params = load_params()
    together = {"reading": "together", "retriever_gradient": "emdr2"}
    recipes = params.recipes | {"new": params.recipes["new"].model_copy(update=together)}
    monkeypatch.setattr("stages.compare.load_params", lambda: params.model_copy(update={"recipes": recipes}))
    with pytest.raises(ValueError, match="recipes.new.reading: together has no marginal .*use each"):
        ablate(2, 2, 1, 1)


@pytest.mark.parametrize("without", ["train", "validation"])
def test_the_ablation_of_data_without_answers_is_refused_before_it_begins(tmp_path, monkeypatch, without):
    params = load_params()
    evaluate = params.evaluate.model_copy(update={"split": "validation"})
    monkeypatch.setattr("stages.compare.load_params", lambda: params.model_copy(update={"evaluate": evaluate}))
    monkeypatch.setattr("stages.compare.dvc", lambda *given, **named: pytest.fail("an experiment was started"))
    monkeypatch.setattr("stages.compare.PREPARED", tmp_path)
    for split in ("train", "validation"):
        row = {"id": "q", "question": "Who?", "answers": [] if split == without else ["a"], "positive_ids": ["p"]}
        write_rows(tmp_path / f"{split}.arrow", QUESTIONS, [row])
    with pytest.raises(ValueError, match=f"{without}.arrow: the {without} questions have no answers, and an ablation"):
        ablate(2, 2, 1, 1)


def test_runs_without_em_are_no_ablation():
    results = {"new": [{"recall_at_1": 90.0, "questions_seen": 0, "steps": 0}]}
    with pytest.raises(ValueError, match="no em, the questions have no answers, and an ablation tells"):
        summarise(results)


def rows_of(*ems: float) -> list[dict]:
    return [
        {
            "em": em, "f1": em + 1, "recall_at_5": 90.0, "val_loss_per_sequence": 10 - em / 10, "questions_per_second": 7.0,
            "questions_seen": 192, "steps": 6,
        }
        for em in ems
    ]  # fmt: skip


def test_costs_are_paired_by_seed(tmp_path):
    """A switch that always takes two points costs two points, however much the seeds differ among themselves."""
    results = {"new": rows_of(30, 50, 70), "batching": rows_of(28, 48, 68), "precision": rows_of(33, 46, 71)}
    table = summarise(results)
    assert table["batching"]["em_cost"] == pytest.approx(2) and table["batching"]["em_cost_spread"] == pytest.approx(0)
    assert table["batching"]["em_spread"] == pytest.approx(20)
    assert table["batching"]["val_loss_cost"] == pytest.approx(0.2)
    assert table["new"]["em_cost"] == 0
    assert verdict("batching", table["batching"]).startswith("batching: costs +2.0 EM")
    assert "no measurable cost" in verdict("precision", table["precision"])
    assert "no measurable cost" in verdict(
        "batching", summarise({name: rows[:1] for name, rows in results.items()})["batching"]
    )
    assert "gains" in verdict("new", summarise({"new": rows_of(1, 2), "x": rows_of(5, 6)})["x"])
    draw(results, tmp_path / "ablation.svg")
    assert all(name in (tmp_path / "ablation.svg").read_text() for name in ("<svg", "</svg>"))


@pytest.mark.slow
def test_both_recipes_side_by_side(project):  # noqa: F811
    done = run(project, "python", "-m", "stages.compare", "recipes", "--steps", "5", "--questions", "4")
    table = json.loads((project / "metrics/compare.json").read_text())
    assert {name: (row["steps"], row["questions_seen"]) for name, row in table.items()} == {
        "new": (5, 160), "old": (2, 8), "old_same_questions": (40, 160),
    }  # fmt: skip
    assert "seconds_per_step" in done.stdout
    # What the recipe does not touch comes from the cache.
    assert "Running stage 'prepare'" not in done.stdout and "Running stage 'index'" not in done.stdout
    assert run(project, "git", "status", "--short").stdout.split() == ["??", "metrics/compare.json"]
    difference = json.loads(run(project, "dvc", "metrics", "diff", "old", "new", "--json").stdout)
    assert "questions_seen" in difference["metrics/train.json"]
    (project / "metrics/compare.json").unlink()


@pytest.mark.slow
def test_a_grid_of_learning_rates_with_two_workers(project):  # noqa: F811
    before = runs_of(project)
    run(
        project,
        "dvc",
        "exp",
        "run",
        "--queue",
        "-S",
        "train.learning_rate=1e-5,3e-5,5e-5",
        "-S",
        "evaluate.num_samples=4",
    )
    run(project, "dvc", "queue", "start", "-j", "2")
    try:
        while "Running" in (status := run(project, "dvc", "queue", "status").stdout) or "Queued" in status:
            time.sleep(5)
        assert status.count("Success") == 3, status
    finally:
        run(project, "dvc", "queue", "stop", "--kill", check=False)
    new = [one for name, one in runs_of(project).items() if name not in before]
    assert sorted(float(one.data.params["train.learning_rate"]) for one in new) == [1e-5, 3e-5, 5e-5]
    assert all(one.info.status == "FINISHED" and "test/em" in one.data.metrics for one in new)
    shown = run(project, "dvc", "exp", "show", "--json", "--no-pager").stdout
    assert all(rate in shown for rate in ("1e-05", "3e-05", "5e-05"))
