"""The train stage: what it leaves where a training goes wrong."""

import json
import math
from pathlib import Path

import pytest

from stages.training import trainer
from tests.test_kinds_of_questions import rows
from tests.whole_way import whole_way


@pytest.mark.slow
def test_a_validation_loss_that_is_never_finite_still_leaves_a_model(tmp_path, monkeypatch, capsys):
    """It comes after hours of training; what is wrong is told by the verdict, and nobody else needs the loss."""
    monkeypatch.chdir(tmp_path)
    original = trainer.validation_loss
    not_finite = {"val_loss_per_sequence": math.nan, "val_loss_per_token": math.inf}
    monkeypatch.setattr(trainer, "validation_loss", lambda *given: original(*given) | not_finite)
    scores, _ = whole_way(rows(lambda i, valley: [valley]))
    measured = json.loads(Path("metrics/train.json").read_text())
    assert measured["steps"] == 4 and not any(name.startswith("val_loss") for name in measured)
    trained = json.loads(Path("data/model/run.json").read_text())
    assert trained["metrics"] == {} and "Validation loss nan nats a question at step 4" in trained["description"]
    assert "em" in scores and "BAD   validation loss nan -> nan" in capsys.readouterr().out
    assert "validation loss nan -&gt; nan" in Path("data/report/report.html").read_text(encoding="utf-8")
