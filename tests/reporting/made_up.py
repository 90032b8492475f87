"""Made-up experiments for the tests of the pages."""

import math
import random

from stages.evaluation.errors import kind_of
from stages.reporting.experiment import Experiment


def prediction(number: int, em: float, rank: int | None, **changes) -> dict:
    """A row of the predictions file; the gold passage stands at `rank` of three read."""
    passages = [
        {
            "id": f"p{place}", "title": f"Place {place}", "text": f"Passage {place} tells of answer {number}.",
            "prior": prior, "posterior": prior, "gold": place == rank, "has_answer": True,
        }
        for place, prior in enumerate((0.7, 0.2, 0.1), start=1)
    ]  # fmt: skip
    scores = {"prediction": f"answer {number}" if em else "else", "em": em, "f1": em}
    return {
        "id": f"q{number}", "question": f"Which answer is number {number}?", "answers": [f"answer {number}"], **scores,
        "kind": kind_of(em, em, rank, 3), "log_prob": math.log(0.9 if em else 0.3),
        "with_gold_passage": {"prediction": "given", "em": 1.0, "f1": 1.0},
        "without_passage": {"prediction": "", "em": 0.0, "f1": 0.0},
        "gold_known": True, "gold_rank": rank, "answer_rank": 1, "passages": passages, **changes,
    }  # fmt: skip


def experiment(name: str = "new", right: float = 0.6, seed: int = 0, **changes) -> Experiment:
    draw = random.Random(seed)
    rows = [
        prediction(number, float(draw.random() < right), draw.choice([1, 1, 2, 3, 9, None])) for number in range(100)
    ]  # fmt: skip
    parts = {
        "name": name, "rows": rows, "scores": {"passages": 300, "questions_per_second": 5.0},
        "training": {
            "val_loss_per_sequence": 3.5, "val_loss_before_training": 6.5, "steps": 60, "questions_seen": 960,
            "training_seconds": 44.0,
        },
        "curves": {"val_loss_per_sequence": [(0, 6.5), (4, 5.0)], "train_loss_per_sequence": [(1, 6.0), (4, 4.0)]},
        "settings": {"train.recipe": name, "train.max_steps": "60", "models.generator": "data/tiny/generator"},
    }  # fmt: skip
    return Experiment(**(parts | changes))
