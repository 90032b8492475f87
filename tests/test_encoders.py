"""Encoders: order, batching, roles, lengths, and models that do not fit."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, DPRContextEncoder, DPRQuestionEncoder

from stages.contexts import TokenStore
from stages.encoders import as_role, load_encoder

TINY, KEY = "data/tiny/encoder", "models.context_encoder"
TEXTS = ["short", "a somewhat longer text about airports " * 3, "x", "middle sized text", "long " * 90]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(TINY, KEY)


def test_vectors_are_those_of_each_row_alone_in_the_rows_order(encoder):
    rows = encoder.passage_rows([f"t{i}" for i in range(5)], TEXTS, 120)
    [(first, together)] = encoder.vectors(TokenStore.from_rows(rows), 150, torch.device("cpu"))
    assert first == 0
    with torch.no_grad():
        alone = [encoder.model(torch.tensor([row])).pooler_output[0].numpy() for row in rows]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-4)


def test_titles_and_texts_are_a_pair_and_the_text_is_cut(encoder):
    [row] = encoder.passage_rows(["The Title"], ["word " * 500], 40)
    assert len(row) == 40 and encoder.tokenizer.decode(row).startswith("<s> the title</s> word")


def test_questions_are_cut_to_the_limit_and_to_the_models_positions(encoder):
    question = "why " * 1000
    assert len(encoder.question_rows([question], 30)[0]) == 30
    [row] = encoder.question_rows([question], 5000)
    assert len(row) == encoder.model.config.max_position_embeddings
    assert torch.isfinite(encoder.model(torch.tensor([row])).pooler_output).all()


def test_the_two_dpr_classes_turn_into_each_other(encoder, tmp_path):
    ids = torch.tensor(encoder.question_rows(["where is it?"], 20))
    passage = as_role(encoder.model, DPRContextEncoder).eval()
    passage.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    back = load_encoder(str(tmp_path), KEY, DPRQuestionEncoder)
    expected = encoder.model(ids).pooler_output
    assert torch.equal(passage(ids).pooler_output, expected) and torch.equal(back.model(ids).pooler_output, expected)
    assert isinstance(back.model, DPRQuestionEncoder) and back.dimension == 256


def test_half_precision_on_disk_is_computed_in_fp32(encoder):
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}


def broken(tmp_path, what):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    if what == "weights":
        (folder / "model.safetensors").unlink()
    elif what == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    elif what == "config":
        (folder / "config.json").write_text("{not json")
    elif what == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "class":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["DPRReader"]}))
    return folder


@pytest.mark.parametrize("what", ["weights", "cut", "config", "tokenizer", "class"])
def test_a_broken_model_folder_is_one_line_with_its_key(tmp_path, what):
    with pytest.raises(ValueError, match=KEY) as error:
        load_encoder(str(broken(tmp_path, what)), KEY)
    assert "\n" not in str(error.value)


def test_other_models_and_missing_ones(tmp_path):
    with pytest.raises(ValueError, match=f"{KEY}: no model at"):
        load_encoder(str(tmp_path / "nothing"), KEY)
    config = BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BartForConditionalGeneration.*DPRQuestionEncoder"):
        load_encoder(str(tmp_path), KEY)
