"""What a training left, in any layout, is where another one starts: the same vectors, the same tokens, the same loss."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, RagTokenForGeneration

from stages.encoders.cross_encoder import load_cross_encoder
from stages.encoders.loading import load_encoder
from stages.generation.generator import load_generator
from stages.generation.tokenizer import load_tokenizer
from stages.rag.folder import save_rag
from stages.rag.opening import open_rag
from stages.storage.model_folders import part_of
from tests.generation.test_causal import losses
from tests.rag.test_families import rag_of
from tests.tiny_rag import LENGTHS, TEXTS, reranked_rag


def saved(rag, folder: Path, layout: str) -> Path:
    """Also as MLflow keeps it."""
    if layout != "mlflow":
        save_rag(rag, folder, "sequence")
        return folder
    save_rag(rag, folder / "data/parts/model", "sequence")
    described = {"flavors": {"python_function": {"data": "data/parts"}}}
    (folder / "MLmodel").write_text(yaml.safe_dump(described))
    return folder


@pytest.mark.parametrize(
    ("family", "layout"),
    [("bart", "folder"), ("t5", "folder"), ("llama", "folder"), ("bart", "mlflow"), ("gpt2", "mlflow")],
)
def test_the_parts_of_an_earlier_run_are_those_that_it_left(tmp_path, family, layout):
    rag = rag_of(family)
    folder = str(saved(rag, tmp_path / "mine", layout))
    encoder = load_encoder(part_of(folder, "question_encoder"), "models.question_encoder")
    generator = load_generator(part_of(folder, "generator"))
    again = open_rag(encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    assert torch.equal(losses(again), losses(rag))
    words = load_tokenizer(part_of(folder, "generator"))
    assert words(TEXTS)["input_ids"] == rag.generator.tokenizer(TEXTS)["input_ids"]


def test_a_checkpoint_of_another_training_with_transformers(tmp_path):
    """RagTokenForGeneration, saved by its own class, without a manifest and whatever else we add."""
    rag = rag_of("bart")
    save_rag(rag, tmp_path / "made", "token")
    RagTokenForGeneration.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "theirs")
    for part in ("question_encoder_tokenizer", "generator_tokenizer"):
        AutoTokenizer.from_pretrained(tmp_path / "made" / part).save_pretrained(tmp_path / "theirs" / part)
    folder = str(tmp_path / "theirs")
    encoder = load_encoder(folder, "models.question_encoder")
    again = open_rag(encoder, load_generator(folder), rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    assert torch.equal(losses(again), losses(rag))
    with pytest.raises(ValueError, match="is a RAG checkpoint, which holds no context_encoder; name the encoder"):
        load_encoder(folder, "models.context_encoder")
    with pytest.raises(ValueError, match="models.reranker: .*model type rag"):
        load_cross_encoder(folder)
    shutil.rmtree(tmp_path / "theirs/generator_tokenizer")
    with pytest.raises(ValueError, match="^models.generator: .* (no tokenizer|cannot be loaded)") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    weights = tmp_path / "theirs/model.safetensors"
    torch.save({}, tmp_path / "theirs/pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="models.question_encoder: .* is incomplete") as error:
        load_encoder(folder, "models.question_encoder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_checkpoint_whose_models_were_once_in_half_precision_is_read_in_the_type_that_is_asked_for(tmp_path, stored):
    rag = rag_of("bart")
    save_rag(rag, tmp_path, "sequence")
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("question_encoder", "generator"):
        config[part]["dtype"] = str(stored).removeprefix("torch.")
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(str(tmp_path), "models.question_encoder").model
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), rag.question_encoder.parameters(), strict=True))
    for loading, dtype in ((None, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        model = load_generator(str(tmp_path), loading=loading).model
        assert {value.dtype for value in model.parameters()} == {dtype}
        same = zip(model.parameters(), rag.generator_model.parameters(), strict=True)
        assert all(torch.equal(a, b.to(dtype)) for a, b in same)


def test_its_reranker_and_its_context_encoder(tmp_path):
    rag = reranked_rag()
    save_rag(rag, tmp_path, "sequence")
    again = load_cross_encoder(part_of(str(tmp_path), "reranker")).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in rag.cross_encoder.state_dict().items())
    rag.encoder.save(tmp_path / "context_encoder")
    assert load_encoder(part_of(str(tmp_path), "context_encoder"), "models.context_encoder").dimension == 8


def test_a_chat_that_is_gone_on_with_as_plain_text_is_told(tmp_path, capsys):
    rag = rag_of("llama")
    rag.generator_model.config.rag_chat_template = True
    try:
        save_rag(rag, tmp_path, "sequence")
    finally:
        del rag.generator_model.config.rag_chat_template
    assert not load_generator(part_of(str(tmp_path), "generator")).chat_template
    assert "models.chat_template: false, but" in capsys.readouterr().out
