"""Ways to read that one family of generators alone has, through every stage, and once more where the model is asked."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stages.evaluation.asking import Asker
from stages.params import load_params
from tests.whole_way import ROOT, whole_way

pytestmark = pytest.mark.slow


def rows_of(name: str, count: int) -> list[dict]:
    return [
        {
            "id": f"{name}{n}",
            "question": f"How far is {name} {n} from the sea?",
            "answers": [f"{n} km"],
            "positive_ids": [f"p{n}"],
        }
        for n in range(count)
    ]


def decoder_only() -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3, bos_token_id=0, pad_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("llama")
    AutoTokenizer.from_pretrained(ROOT / "data/tiny/generator").save_pretrained("llama")
    return "llama"


@pytest.mark.parametrize(("reading", "gradient"), [("parallel", "emdr2"), ("weighted", "exact")])
def test_from_the_files_to_the_answer(tmp_path, monkeypatch, reading, gradient):
    monkeypatch.chdir(tmp_path)
    models = {"generator": decoder_only()} if reading == "parallel" else {}
    passages = [{"id": f"p{n}", "title": f"Place {n}", "text": f"It lies {n} km from the sea."} for n in range(12)]
    rows = {
        "passages": passages,
        "train": rows_of("Place", 12),
        "validation": rows_of("Spot", 4),
        "test": rows_of("Town", 4),
    }
    recipe = {"reading": reading, "retriever_gradient": gradient}
    metrics, predictions = whole_way(rows, models=models, recipes={"new": recipe}, retriever={"n_docs": 3})
    assert metrics["n_docs"] == 3 and len(predictions) == 4
    assert json.loads(Path("data/model/run.json").read_text())["params"]["recipe.reading"] == reading
    asked = Asker(load_params(), torch.device("cpu")).answers([row["question"] for row in predictions])
    assert [one["answer"] for one in asked] == [row["prediction"] for row in predictions]
    assert [one["log_prob"] for one in asked] == pytest.approx([row["log_prob"] for row in predictions], abs=1e-3)
    assert all(sum(one["posterior"] for one in row["passages"]) == pytest.approx(1, abs=1e-4) for row in predictions)
