"""Checkpoints: whole or not at all, the right one, never another recipe's."""

import pytest
import torch

from stages.storage import manifest
from stages.storage.checkpoints import Checkpoints, describe, fingerprint, load_weights, own_weights
from tests.tiny_rag import tiny_rag


def weights(value):
    return {"w": torch.full((3,), float(value))}


def test_latest_rotation_and_round_trip(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None and checkpoints.finished() is None
    for step in (1, 2, 3):
        checkpoints.save(step, weights(step), {"step": step, "tensor": torch.arange(step)})
    assert sorted(folder.name for folder in (tmp_path / "c").iterdir()) == ["step-00000002", "step-00000003"]
    found, state = Checkpoints(tmp_path / "c", keep=2).latest()
    assert (
        torch.equal(found["w"], weights(3)["w"])
        and state["step"] == 3
        and torch.equal(state["tensor"], torch.arange(3))
    )
    checkpoints.finish(weights(7), {"step": 3})
    assert [folder.name for folder in (tmp_path / "c").iterdir()] == ["finished"]
    assert torch.equal(checkpoints.finished()[0]["w"], weights(7)["w"]) and checkpoints.latest() is None


def names(folder):
    return sorted(one.name for one in folder.iterdir())


def test_best_weights_stay_as_long_as_a_checkpoint_refers_to_them(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save_best(2, weights(2))
    checkpoints.save(4, weights(4), {"step": 4}, best=2)
    checkpoints.save_best(6, weights(6))  # killed here, training goes on from step 4 with the best of step 2
    assert names(tmp_path) == ["best-00000002", "best-00000006", "step-00000004"]
    assert torch.equal(checkpoints.best(2)["w"], weights(2)["w"])
    checkpoints.save(8, weights(8), {"step": 8}, best=6)
    assert names(tmp_path) == ["best-00000006", "step-00000008"]


def test_a_checkpoint_whose_best_weights_are_gone_is_passed_over(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save_best(step, weights(step))
        checkpoints.save(step, weights(step), {"step": step}, best=step)
    (tmp_path / "best-00000002" / "weights.safetensors").unlink()
    assert checkpoints.latest()[1]["step"] == 1
    assert "best-00000002" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, file, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, weights(step), {"step": step})
    path = tmp_path / "step-00000002" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 255]) + content[-2:])
    assert checkpoints.latest()[1]["step"] == 1
    assert "step-00000002" in capsys.readouterr().err


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, weights(1), {"step": 1})
    (tmp_path / "step-00000002.unfinished").mkdir()
    (tmp_path / "step-00000002.unfinished" / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.latest()[1]["step"] == 1
    checkpoints.save(2, weights(2), {"step": 2})
    assert checkpoints.latest()[1]["step"] == 2


def test_damaged_best_stops_with_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    folder = checkpoints.save_best(1, weights(1))
    (folder / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="best.*cut short"):
        checkpoints.best(1)


def test_fingerprint_depends_on_settings_names_and_contents(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")

    def name(rate):
        return fingerprint(describe({"lr": rate}, [folder]))

    first = name(1)
    assert name(1) == first
    assert name(2) != first
    (folder / "a").write_bytes(b"2")
    second = name(1)
    assert second != first
    (folder / "a").rename(folder / "b")
    assert name(1) not in (first, second)


def test_an_edit_of_equal_length_in_the_middle_of_a_large_input_is_another_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manifest, "WHOLE_FILE_LIMIT", 1 << 20)
    file = tmp_path / "vectors.npy"
    file.write_bytes(bytes(5 << 20))
    first = fingerprint(describe({}, [file]))
    with open(file, "r+b") as stream:
        stream.seek(5 << 19)
        stream.write(b"x")
    assert fingerprint(describe({}, [file])) != first


def test_tied_weights_are_stored_once_and_come_back():
    rag, other = tiny_rag(seed=0), tiny_rag(seed=1)
    saved = own_weights(rag)
    assert len(saved) < len(rag.state_dict())
    load_weights(other, saved)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in rag.state_dict().items())
    with torch.no_grad():
        rag.generator_model.model.shared.weight.zero_()
    assert saved["generator_model.model.shared.weight"].any()
