"""Checkpoints: whole or not at all, the right one, never another recipe's."""

import pytest
import torch
from tiny_rag import tiny_rag

from stages.checkpoints import Checkpoints, fingerprint, load_weights, own_weights


def weights(value):
    return {"w": torch.full((3,), float(value))}


def test_latest_rotation_and_round_trip(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None and checkpoints.best() is None
    for step in (1, 2, 3):
        checkpoints.save(step, weights(step), {"step": step, "tensor": torch.arange(step)})
    assert sorted(folder.name for folder in (tmp_path / "c").iterdir()) == ["step-00000002", "step-00000003"]
    found, state = Checkpoints(tmp_path / "c", keep=2).latest()
    assert (
        torch.equal(found["w"], weights(3)["w"])
        and state["step"] == 3
        and torch.equal(state["tensor"], torch.arange(3))
    )
    for value in (5, 6):
        checkpoints.save_best(weights(value))
    assert torch.equal(checkpoints.best()["w"], weights(6)["w"])


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
    folder = checkpoints.save_best(weights(1))
    (folder / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="best.*cut short"):
        checkpoints.best()


def test_fingerprint_depends_on_settings_names_and_contents(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    first = fingerprint({"lr": 1}, [folder])
    assert fingerprint({"lr": 1}, [folder]) == first
    assert fingerprint({"lr": 2}, [folder]) != first
    (folder / "a").write_bytes(b"2")
    second = fingerprint({"lr": 1}, [folder])
    assert second != first
    (folder / "a").rename(folder / "b")
    assert fingerprint({"lr": 1}, [folder]) not in (first, second)


def test_tied_weights_are_stored_once_and_come_back():
    rag, other = tiny_rag(seed=0), tiny_rag(seed=1)
    saved = own_weights(rag)
    assert len(saved) < len(rag.state_dict())
    load_weights(other, saved)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in rag.state_dict().items())
    with torch.no_grad():
        rag.generator_model.model.shared.weight.zero_()
    assert saved["generator_model.model.shared.weight"].any()
