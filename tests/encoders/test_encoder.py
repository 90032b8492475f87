"""Encoders: order, batching, roles, lengths, and models that do not fit."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DPRContextEncoder,
    DPRQuestionEncoder,
)

from stages.corpus.token_store import TokenStore
from stages.encoders.loading import BERT_LIKE, as_role, load_encoder

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


BERT_SIZES = dict(
    vocab_size=7168, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=40, pad_token_id=1, dim=16, n_layers=1, n_heads=2, hidden_dim=32, embedding_size=16,
)  # fmt: skip


def bert_like(folder, kind="bert", **files):
    """A random model of this type with the embedded tokenizer; `files` as JSON, "__" for a slash in their names."""
    torch.manual_seed(3)
    AutoModel.from_config(AutoConfig.for_model(kind, **BERT_SIZES)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return str(folder)


def module(path, kind):
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


SENTENCE = {
    "modules": [module("", "Transformer"), module("1_Pooling", "Pooling"), module("2_Normalize", "Normalize")],
    "1_Pooling__config": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    "sentence_bert_config": {"max_seq_length": 12},
}


def vectors_of(encoder, rows):
    [(_, found)] = encoder.vectors(TokenStore.from_rows(rows), 60, torch.device("cpu"))
    return torch.from_numpy(found)


@pytest.mark.parametrize("kind", BERT_LIKE)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_bert_like_models_are_pooled_over_real_tokens(tmp_path, kind, pooling):
    encoder = load_encoder(bert_like(tmp_path, kind), KEY, pooling=pooling)
    rows = encoder.passage_rows(["t1", "", "t3"], ["a text " * 9, "short", "word " * 200], 300)
    assert max(map(len, rows)) == 38 if kind in ("roberta", "xlm-roberta", "camembert", "mpnet") else 40
    found = vectors_of(encoder, rows)
    for row, vector in zip(rows, found, strict=True):
        states = encoder.model(torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(vector, states[0] if pooling == "cls" else states.mean(0), atol=1e-5, rtol=1e-4)
    scaled = load_encoder(str(tmp_path), KEY, pooling=pooling, normalize=True)
    torch.testing.assert_close(vectors_of(scaled, rows), found / found.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert all(weight.grad is None for weight in encoder.model.parameters())
    with torch.enable_grad():
        encoder.embed(torch.tensor([rows[1]]), torch.ones(1, len(rows[1]))).sum().backward()
    assert all(weight.grad is not None for weight in encoder.model.parameters()), "a weight that never learns"


def test_a_sentence_transformers_folder_works_as_it_is(tmp_path):
    encoder = load_encoder(bert_like(tmp_path, **SENTENCE), KEY)
    assert (encoder.pooling, encoder.normalize, encoder.max_tokens) == ("mean", True, 12)
    assert len(encoder.question_rows(["why " * 40], 30)[0]) == 12
    chosen = load_encoder(str(tmp_path), KEY, pooling="cls", normalize=False)
    assert (chosen.pooling, chosen.normalize) == ("cls", False)
    assert load_encoder(bert_like(tmp_path / "plain"), KEY).pooling == "cls"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean", "embedding_dimension": 16}, "mean"),
        ({"pooling_mode_max_tokens": True}, "pools by max_tokens; supported are cls and mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pools by cls_token and mean_tokens"),
    ],
)
def test_pooling_files_old_and_new(tmp_path, config, expected):
    folder = bert_like(tmp_path, **SENTENCE | {"1_Pooling__config": config})
    if expected in ("cls", "mean"):
        assert load_encoder(folder, KEY).pooling == expected
        return
    with pytest.raises(ValueError, match=f"{KEY}: .*{expected}"):
        load_encoder(folder, KEY)


def test_other_modules_and_damaged_files_are_one_line(tmp_path):
    folder = bert_like(tmp_path, **SENTENCE | {"modules": [*SENTENCE["modules"], module("3_Dense", "Dense")]})
    with pytest.raises(ValueError, match=f"{KEY}: .*has a Dense module; supported are"):
        load_encoder(folder, KEY)
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(ValueError, match=f"{KEY}: .*modules.json is damaged") as error:
        load_encoder(folder, KEY)
    assert "\n" not in str(error.value)


def test_a_saved_encoder_loads_as_it_was(tmp_path):
    prefixes = ("query: ", "passage: ")
    for name, folder, choice in (
        ("bert", bert_like(tmp_path / "bert"), {"pooling": "mean", "normalize": True}),
        ("cls", bert_like(tmp_path / "cls", **SENTENCE), {"pooling": "cls"}),
        ("dpr", TINY, {"normalize": True}),
    ):
        encoder = load_encoder(folder, KEY, prefixes=prefixes, **choice)
        encoder.save(tmp_path / f"{name}-saved")
        again = load_encoder(str(tmp_path / f"{name}-saved"), KEY)
        same = ("pooling", "normalize", "question_prefix", "passage_prefix", "max_tokens")
        assert [getattr(again, part) for part in same] == [getattr(encoder, part) for part in same]
        rows = encoder.question_rows(["where?"], 20)
        assert again.question_rows(["where?"], 20) == rows and torch.equal(
            vectors_of(again, rows), vectors_of(encoder, rows)
        )


def test_prefixes_are_put_before_questions_and_passages(tmp_path):
    for folder in (TINY, bert_like(tmp_path)):
        plain, prefixed = load_encoder(folder, KEY), load_encoder(folder, KEY, prefixes=("query: ", "passage: "))
        assert prefixed.question_rows(["where?"], 40) == plain.question_rows(["query: where?"], 40)
        assert prefixed.passage_rows(["t"], ["x"], 40) == plain.passage_rows(["passage: t"], ["x"], 40)
        assert prefixed.passage_rows(["t"], ["x"], 40) != plain.passage_rows(["t"], ["x"], 40)


def test_a_plain_dpr_folder_is_saved_without_other_files(encoder, tmp_path):
    encoder.save(tmp_path)
    assert not {"modules.json", "config_sentence_transformers.json"} & {file.name for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="models.pooling: mean, but .* is a DPR encoder"):
        load_encoder(TINY, KEY, pooling="mean")
