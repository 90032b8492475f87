"""Curves on disk: no empty cell, the same after a kill, never written into a file that DVC linked."""

import os

from stages.training.curve_files import CurveFiles

HISTORY = [
    {"step": 0, "questions_seen": 0, "val_loss_per_sequence": 6.5},
    {"step": 2, "questions_seen": 8, "train_loss_per_sequence": 4.0, "gpu_memory_rank_1": 3.0},
    {"step": 3, "questions_seen": 12, "refresh_wait": 0.1},
    {"step": 4, "questions_seen": 16, "train_loss_per_sequence": 3.5, "val_loss_per_sequence": 5.5},
]


def texts(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_each_metric_has_rows_at_its_own_steps_alone(tmp_path):
    CurveFiles(tmp_path / "curves").write(HISTORY)
    found = texts(tmp_path / "curves")
    assert found.keys() == {
        "questions_seen.tsv", "train_loss_per_sequence.tsv", "val_loss_per_sequence.tsv", "refresh_wait.tsv",
    }  # fmt: skip
    assert found["val_loss_per_sequence.tsv"] == "step\tvalue\n0\t6.5\n4\t5.5\n"
    assert found["refresh_wait.tsv"] == "step\tvalue\n3\t0.1\n"


def test_point_by_point_and_after_a_kill_the_files_are_those_of_one_go(tmp_path):
    CurveFiles(tmp_path / "once").write(HISTORY)
    files = CurveFiles(tmp_path / "followed")
    for count in range(1, len(HISTORY) + 1):
        files.follow(HISTORY[:count])
        assert len((tmp_path / "followed/questions_seen.tsv").read_text().splitlines()) == count + 1
    assert texts(tmp_path / "followed") == texts(tmp_path / "once")
    resumed = CurveFiles(tmp_path / "followed")  # its checkpoint was of step 2: steps 3 and 4 are taken again
    resumed.follow(HISTORY[:3])
    resumed.follow(HISTORY)
    assert texts(tmp_path / "followed") == texts(tmp_path / "once")


def test_a_file_that_is_a_link_into_a_cache_is_replaced_and_not_altered(tmp_path):
    CurveFiles(tmp_path / "curves").write(HISTORY[:1])
    linked = tmp_path / "curves/val_loss_per_sequence.tsv"
    os.link(linked, tmp_path / "in_the_cache")
    CurveFiles(tmp_path / "curves").follow(HISTORY)
    assert (tmp_path / "in_the_cache").read_text() == "step\tvalue\n0\t6.5\n"
    assert linked.read_text() == "step\tvalue\n0\t6.5\n4\t5.5\n"
