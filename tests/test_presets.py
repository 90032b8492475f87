"""The shipped parameter files: each complete, valid, and what its name says."""

from pathlib import Path

import pytest
import yaml

from stages.params import load_params

PRESETS = sorted(Path("data/presets").glob("*.yaml"))


def keys_of(values: dict, prefix: str = "") -> set[str]:
    return {
        key
        for name, value in values.items()
        for key in (keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"})
    }


def test_the_promised_presets_are_there():
    assert [path.stem for path in PRESETS] == ["decoder-only", "fid", "files", "nq", "old", "sample", "small-gpu"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_complete_valid_parameter_file(path):
    load_params(path)
    shipped = Path("params.yaml").read_text(encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    assert keys_of(yaml.safe_load(text)) == keys_of(yaml.safe_load(shipped))
    # Every knob keeps its comment.
    assert [line.partition("#")[2] for line in text.splitlines() if ":" in line.partition("#")[0]] == [
        line.partition("#")[2] for line in shipped.splitlines() if ":" in line.partition("#")[0]
    ]


def test_presets_are_what_they_say():
    preset = {path.stem: load_params(path) for path in PRESETS}
    assert preset["sample"] == load_params()
    nq, old, small = preset["nq"].train, preset["old"], preset["small-gpu"].train
    assert (nq.max_steps, nq.batch_size, nq.gradient_accumulation_steps, nq.learning_rate) == (15000, 32, 1, 3e-5)
    assert nq.eval_steps == nq.save_steps == 1000 and preset["nq"].models.generator == "facebook/bart-large"
    assert old.recipe == old.recipes["old"] and (old.train.batch_size, old.train.gradient_accumulation_steps) == (8, 4)
    assert old.train.max_steps == 3000 * 2, "a batch of 8 is two updates"
    assert (small.batch_size, small.gradient_accumulation_steps, small.gradient_checkpointing) == (1, 32, True)
    fid = preset["fid"]
    assert (fid.recipe.reading, fid.recipe.retriever_gradient, fid.retriever.n_docs) == ("together", "emdr2", 10)
    assert fid.models == preset["nq"].models and fid.data == preset["nq"].data
    assert preset["files"].data.source == "files"
    small = preset["decoder-only"]
    assert small.retriever.hybrid_depth and small.retriever.hard_negatives.count and small.train.compile
    assert preset["old"].data == preset["nq"].data == preset["small-gpu"].data
