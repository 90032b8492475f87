"""What MLflow and TensorBoard are told of a training's points."""

import json

import pytest

from stages.training import curves
from stages.training.curves import Curves, earlier_metrics, tracked_name


class Tracked:
    """A tracker that remembers."""

    def __init__(self, steps=()):
        self.points, self.journal, self.steps = {}, self, set(steps)

    def logged_steps(self):
        return self.steps

    def log_metrics(self, values, step):
        self.points[step] = values


POINT = {
    "step": 5, "train_loss_per_sequence": 2.0, "skipped_steps": 0, "micro_batch": 8, "mfu": 0.3, "gpu_memory_rank_1": 4.0,
    "val_loss_per_sequence": 3.0, "something_new": 1.0,
}  # fmt: skip


def test_points_are_named_in_groups_and_say_nothing_that_is_as_usual():
    tracker = Tracked()
    told = Curves(tracker, None, {"skipped_steps": 0, "micro_batch": 8})
    told.point(POINT)
    told.point({"step": 10, "skipped_steps": 1, "micro_batch": 4})
    assert tracker.points == {
        5: {
            "loss/train": 2.0, "loss/validation": 3.0, "speed/mfu": 0.3, "speed/gpu_memory_rank_1": 4.0,
            "training/something_new": 1.0,
        },
        10: {"optimizer/skipped_steps": 1, "optimizer/micro_batch": 4},
    }  # fmt: skip


def test_losses_come_first():
    groups = {tracked_name(name).split("/")[0] for name in [*curves.TRACKED, *curves.SPEED, "new"]} | {"model", "test"}
    assert min(groups) == "loss"
    assert all(name.split("/")[0] > "loss" for name in curves.EARLIER.values())


@pytest.mark.slow
def test_tensorboard_has_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracked()
    Curves(tracker, tmp_path, {"skipped_steps": 0}).point(POINT)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(tracker.points[5])


def test_what_the_earlier_stages_measured(tmp_path):
    (tmp_path / "retriever.json").write_text(json.dumps({"val_loss": 0.5, "steps": 30}))
    (tmp_path / "lexical.json").write_text(json.dumps({"depth": 0}))
    assert earlier_metrics(tmp_path) == {"retrieval/warmup_loss": 0.5}
