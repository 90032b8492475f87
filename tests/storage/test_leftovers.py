"""Checkpoints of other trainings: told apart, counted, kept from two at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.storage import leftovers
from stages.storage.checkpoints import Checkpoints, describe, fingerprint


def training(root, inputs, rate, recipe="new"):
    """Checkpoints of a training with this learning rate, as the train stage makes them."""
    description = describe({"train": {"recipe": recipe, "learning_rate": rate}, "lengths": {"a": 1}}, [inputs])
    name = fingerprint(description)
    return name, description, Checkpoints(root / leftovers.FOLDER / name, 2, description)


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "inputs").write_text("1")
    return tmp_path / "inputs"


def test_what_changed_is_named(tmp_path, inputs):
    _, _, checkpoints = training(tmp_path, inputs, 1e-3)
    checkpoints.save(40, {"w": torch.ones(2)}, {})
    inputs.write_text("2")
    name, description, _ = training(tmp_path, inputs, 5e-4)
    first, second = leftovers.lines(tmp_path, name, description)
    assert f"step-00000040) differs in train.learning_rate 0.001 -> 0.0005; inputs {inputs}" in first
    assert "1 other trainings" in second and "make clean" in second


def test_changed_code_is_named_by_module(tmp_path, inputs):
    _, description, _ = training(tmp_path, inputs, 1e-3)
    assert "storage/checkpoints.py" in description["code"] and "machine/entry.py" not in description["code"]
    changed = description | {"code": description["code"] | {"storage/checkpoints.py": "0"}}
    assert leftovers.differences(description, changed) == "code storage/checkpoints.py"


def test_nothing_to_tell(tmp_path, inputs):
    name, description, checkpoints = training(tmp_path, inputs, 1e-3)
    assert leftovers.lines(tmp_path, name, description) == []
    checkpoints.save(1, {"w": torch.ones(2)}, {})
    assert leftovers.lines(tmp_path, name, description) == []


def test_another_recipes_checkpoints_are_only_counted(tmp_path, inputs):
    _, _, checkpoints = training(tmp_path, inputs, 1e-3, "old")
    checkpoints.save(1, {"w": torch.ones(2)}, {})
    name, description, _ = training(tmp_path, inputs, 1e-3)
    [line] = leftovers.lines(tmp_path, name, description)
    assert "1 other trainings" in line


def test_a_finished_training_goes_once_the_next_stage_runs_and_an_unfinished_one_stays(tmp_path, inputs):
    name, _, checkpoints = training(tmp_path, inputs, 1e-3)
    checkpoints.save(1, {"w": torch.ones(2)}, {})
    leftovers.drop_finished(tmp_path, name)
    assert checkpoints.latest() is not None
    checkpoints.finish({"w": torch.ones(2)}, {})
    leftovers.drop_finished(tmp_path, name)
    assert not checkpoints.folder.exists()


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_finished_training_of_fewer_steps_is_offered_as_the_start(tmp_path, inputs, evaluated):
    def of_steps(steps, rate=1e-3):
        settings = {"train": {"recipe": "new", "learning_rate": rate, "max_steps": steps}}
        description = describe(settings, [inputs])
        return fingerprint(description), description

    name, description = of_steps(120)
    Checkpoints(tmp_path / leftovers.FOLDER / name, 2, description).finish({"w": torch.ones(2)}, {})
    if evaluated:
        leftovers.drop_finished(tmp_path, name)
    told = "\n".join(leftovers.lines(tmp_path, *of_steps(240)))
    assert "finished with train.max_steps 120: its learning rate had come down to zero" in told
    assert "cp -rL data/model my-model && cp -rL data/retriever/context_encoder my-model/" in told
    for other in (of_steps(120), of_steps(60), of_steps(240, rate=5e-4)):
        assert "train.max_steps 120" not in "\n".join(leftovers.lines(tmp_path, *other))
    longer, description = of_steps(240)
    checkpoints = Checkpoints(tmp_path / leftovers.FOLDER / longer, 2, description)
    checkpoints.save(130, {"w": torch.ones(2)}, {})  # which goes on, killed and started again
    assert "anew" not in "\n".join(leftovers.lines(tmp_path, longer, description))
    checkpoints.finish({"w": torch.ones(2)}, {})
    assert "anew" not in "\n".join(leftovers.lines(tmp_path, longer, description))
    inputs.write_text("2")
    assert "train.max_steps 120" not in "\n".join(leftovers.lines(tmp_path, *of_steps(240)))


HOLD = (
    "import sys, time; from pathlib import Path; from stages.storage import leftovers\n"
    "held = leftovers.lock(Path(sys.argv[1]), sys.argv[2]); print('held', flush=True); time.sleep(float(sys.argv[3]))"
)


def hold(folder, name, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), name, str(seconds)], cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_second_of_two_waits_for_the_first_and_a_killed_owner_leaves_no_lock(tmp_path):
    owner = hold(tmp_path, "abc", 3600)
    assert owner.stdout.readline() == "held\n"
    leftovers.lock(tmp_path, "other").release()
    second = hold(tmp_path, "abc", 0)
    assert "another process trains exactly this" in second.stdout.readline() and second.poll() is None
    owner.kill()
    owner.wait()
    assert second.stdout.readline() == "held\n" and second.wait() == 0
    for process in (owner, second):
        process.stdout.close()


def test_what_a_waiting_process_will_read_is_not_dropped(tmp_path, inputs):
    name, _, checkpoints = training(tmp_path, inputs, 1e-3)
    checkpoints.finish({"w": torch.ones(2)}, {})
    owner = hold(tmp_path, name, 3600)
    assert owner.stdout.readline() == "held\n"
    leftovers.drop_finished(tmp_path, name)
    assert checkpoints.is_finished()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    leftovers.drop_finished(tmp_path, name)
    assert not checkpoints.folder.exists()
