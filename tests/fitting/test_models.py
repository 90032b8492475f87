"""What would be refused after hours is refused before anything runs, and what fits is not looked at again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    MBartConfig,
    MBartForConditionalGeneration,
)

from stages import inputs
from stages.fitting.models import check
from stages.machine.entry import run
from stages.params import Params

ROOT = Path(__file__).resolve().parents[2]
ENCODER, GENERATOR = ROOT / "data/tiny/encoder", ROOT / "data/tiny/generator"
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=7168)


@pytest.fixture
def values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["models"] |= {
        "question_encoder": str(ENCODER), "context_encoder": str(ENCODER), "generator": str(GENERATOR)
    }  # fmt: skip
    values["runtime"]["device"] = "cpu"
    values["retriever"]["steps"] = 0
    return values


def refused(values, match, **changes):
    """`changes`: section.key with a double underscore for the dot."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    with pytest.raises(ValueError, match=match) as error:
        check(Params.model_validate(values))
    assert "\n" not in str(error.value)


def with_tokenizer(model, folder, source):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def test_what_is_shipped_fits_and_takes_no_weights(values, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    check(Params.model_validate(values))
    values["models"] |= {
        "reranker": str(ENCODER),
        "lora": dict(rank=4, alpha=8, dropout=0, target_modules=None, base="bf16"),
    }
    check(Params.model_validate(values))


def test_only_decoder_only_generators_that_see_the_whole_text_read_in_parallel(values, tmp_path):
    values["recipes"]["new"] |= {"reading": "parallel", "retriever_gradient": "emdr2"}
    refused(values, "recipes: reading: parallel is of decoder-only generators; one of type bart .* use that")
    sizes = SIZES | dict(vocab_size=8192, max_position_embeddings=512)
    for family, more in (("llama", {}), ("mistral", dict(sliding_window=8))):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | more))
        values["models"]["generator"] = with_tokenizer(model, tmp_path / family, GENERATOR)
        if family == "llama":
            check(Params.model_validate(values))
    refused(
        values, "reading: parallel wants a generator of type gemma, .* is of type mistral or .* use reading: together"
    )
    values["recipes"]["new"] |= {"reading": "weighted", "retriever_gradient": "exact"}
    refused(values, "reading: weighted wants a generator of type gemma, .* is of type mistral")


def test_a_generator_that_cannot_be_used(values, tmp_path):
    config = MBartConfig(
        vocab_size=8192, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    folder = with_tokenizer(MBartForConditionalGeneration(config), tmp_path / "mbart", GENERATOR)
    refused(values, "models.generator: .* is of type mbart; supported are bart", models__generator=folder)
    refused(
        values, "models.chat_template: true, but bart", models__generator=str(GENERATOR), models__chat_template=True
    )


def test_lengths_beyond_the_models_positions(values, tmp_path):
    refused(values, "lengths.context_tokens: 4000 with .* but the generator has", lengths__context_tokens=4000)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=70, vocab_size=8192, eos_token_id=2)
    )
    folder = with_tokenizer(model, tmp_path / "gpt2", GENERATOR)
    refused(
        values, "takes 84 positions, but the generator has 70", lengths__context_tokens=64, models__generator=folder
    )  # fmt: skip
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = f"{' a' * 20}: {{{{ messages[0]['content'] }}}} :"
    words.save_pretrained(folder)
    values["lengths"] |= {"context_tokens": 49, "question_tokens": 33, "answer_tokens": 8}
    refused(values, "49 leaves no room for a passage: .* use [67][0-9] or more", models__chat_template=True)


def test_a_shorter_encoder_cuts_and_says_so(values, tmp_path, capsys):
    bert = BertModel(BertConfig(max_position_embeddings=64, **SIZES))
    folder = with_tokenizer(bert, tmp_path / "bert", ENCODER)
    values["models"] |= {"question_encoder": folder, "context_encoder": folder}
    check(Params.model_validate(values))
    said = capsys.readouterr().out
    assert "models.context_encoder reads 64 tokens: passages are cut there, not at lengths.passage_tokens (160)" in said
    assert "models.question_encoder reads" not in said


def test_encoders_and_rerankers_that_do_not_fit(values, tmp_path):
    bert = with_tokenizer(BertModel(BertConfig(max_position_embeddings=64, **SIZES)), tmp_path / "bert", ENCODER)
    refused(
        values, "models.context_encoder: its vectors have 16 dimensions, those of models", models__context_encoder=bert
    )
    values["models"]["context_encoder"] = str(ENCODER)
    refused(values, "models.question_encoder: .* is a BartForConditional", models__question_encoder=str(GENERATOR))
    values["models"]["question_encoder"] = str(ENCODER)
    ranking = BertForSequenceClassification(BertConfig(num_labels=3, **SIZES))
    ranking = with_tokenizer(ranking, tmp_path / "classes", ENCODER)
    refused(values, "models.reranker: .* tells 3 classes apart", models__reranker=ranking)
    short = BertForSequenceClassification(BertConfig(num_labels=1, max_position_embeddings=60, **SIZES))
    short = with_tokenizer(short, tmp_path / "short", ENCODER)
    refused(values, "models.reranker: its 60 positions leave . tokens", models__reranker=short)


def test_adapters_and_precisions_that_cannot_be(values):
    lora = dict(rank=4, alpha=8, dropout=0, target_modules=["c_attn"], base="fp32")
    refused(values, "models.lora.target_modules: no adapters for a bart", models__lora=lora)
    refused(values, "models.lora.base: 4bit needs a GPU", models__lora=lora | {"base": "4bit"})
    values["models"]["lora"] = None
    refused(values, "evaluate.precision: fp16 needs a GPU", evaluate__precision="fp16")
    values["recipes"]["new"]["precision"] = "fp16"
    refused(values, "recipes: precision: fp16 needs a GPU")


def test_several_processes_for_what_one_alone_can_do(values):
    values["train"]["index_refresh_steps"] = 20
    refused(values, "train.index_refresh_steps: 20, but 2 processes train", runtime__processes=2)


@pytest.mark.parametrize("what", ["cut", "pickle"])
@pytest.mark.parametrize("part", ["generator", "context_encoder"])
def test_weights_that_are_damaged_or_no_safetensors(values, tmp_path, part, what):
    folder = tmp_path / "mine"
    shutil.copytree(values["models"][part], folder)
    weights = folder / "model.safetensors"
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:100_000])
    else:
        weights.rename(folder / "pytorch_model.bin")
    match = (
        "model.safetensors is damaged" if what == "cut" else "mine has no weights in safetensors, others are not read"
    )
    refused(values, f"models.{part}: .*{match}", **{f"models__{part}": str(folder)})


def test_an_index_or_vectors_of_another_dimension(values, tmp_path):
    made = np.zeros((300, 8), dtype=np.float32)
    np.save("mine.npy", made)
    refused(values, "index.import_path: mine.npy holds vectors of 8 dimensions, the", index__import_path="mine.npy")
    index = faiss.IndexFlatIP(8)
    index.add(made)
    faiss.write_index(index, "mine.faiss")
    refused(values, "index.import_path: mine.faiss holds vectors of 8 dimensions", index__import_path="mine.faiss")
    Path("mine.faiss").write_text("no index, but long enough to be one " * 3)
    refused(values, "index.import_path: mine.faiss is not a FAISS index")


def test_a_kind_of_index_that_cannot_be_built(values):
    refused(values, "index.factory: 'Flot' is not a factory string", index__factory="Flot")
    refused(values, "index.factory: 'PQ7' is not a factory string", index__factory="PQ7")  # of 256 dimensions


def test_what_fitted_is_not_looked_at_again_and_loads_no_library(values, tmp_path):
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    run(inputs.main)
    [known] = Path(".checkpoints").iterdir()
    program = (
        "import sys; from stages.inputs import main; main(); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'faiss') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
    values["lengths"]["context_tokens"] = 4000
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    for _ in range(2):  # what does not fit is told each time
        with pytest.raises(SystemExit, match="error: lengths.context_tokens: 4000"):
            run(inputs.main)
    assert list(Path(".checkpoints").iterdir()) == [known] and json.loads(known.read_text())
    assert torch.get_default_device() == torch.device("cpu")


def test_another_file_to_import_under_the_same_name_is_looked_at(values):
    dimension = json.loads((ENCODER / "config.json").read_text())["hidden_size"]
    np.save("mine.npy", np.zeros((3, dimension), dtype=np.float32))
    values["index"]["import_path"] = "mine.npy"
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    run(inputs.main)
    np.save("mine.npy", np.zeros((3, 8), dtype=np.float32))
    with pytest.raises(SystemExit, match="error: index.import_path: mine.npy holds vectors of 8 dimensions"):
        run(inputs.main)
