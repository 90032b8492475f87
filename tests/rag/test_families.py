"""Every generator family through the whole way: trained a few steps, saved, loaded, asked."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from stages.evaluation.decoding import generate
from stages.generation import marginalization
from stages.generation.generator import generator_from
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.model import Rag
from stages.rag.opening import open_rag
from stages.training.trainer import Trainer
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS, tiny_rag, tokenizer

IDS = dict(vocab_size=8192, bos_token_id=0, pad_token_id=1, eos_token_id=2)
LLAMA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=96, **IDS,
)  # fmt: skip
CAUSAL = {
    "gpt2": GPT2Config(
        n_embd=32, n_layer=1, n_head=4, n_positions=96, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS
    ),
    "llama": LlamaConfig(**LLAMA),
    "qwen2": Qwen2Config(tie_word_embeddings=True, **LLAMA),
    "qwen3": Qwen3Config(head_dim=8, **LLAMA),
    "mistral": MistralConfig(head_dim=8, sliding_window=None, **LLAMA),
}


def rag_of(family: str) -> Rag:
    rag = tiny_rag()
    if family == "bart":
        return rag
    torch.manual_seed(0)
    if family in CAUSAL:
        # A model writes into its configuration: what LoRA's bf16 base was would be the next test's type.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CAUSAL[family])).eval()
        generator = generator_from(model, tokenizer("generator"))
        return open_rag(rag.encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    config = T5Config(
        vocab_size=8192, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    generator = generator_from(T5ForConditionalGeneration(config).eval(), tokenizer("generator"))
    return open_rag(rag.encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))


def answers_of(rag: Rag) -> list[tuple[str, float]]:
    examples = rag.examples(QUESTIONS, ANSWERS)
    with torch.no_grad():
        batch = rag.batch(examples, list(range(len(QUESTIONS))))
        rows, scores = rag.retrieve(rag.encode_questions(batch))
        ids, mask = rag.contexts(batch, rows)
    shape = (len(QUESTIONS), 3, -1)
    found = generate(
        rag.generator, ids.view(shape), mask.view(shape), marginalization.log_prior(scores), num_beams=2,
        max_answer_tokens=LENGTHS.answer_tokens, decoding="thorough", marginalization="sequence",
    )  # fmt: skip
    return [(answer.text, answer.log_prob) for answer in found]


@pytest.mark.parametrize("family", ["bart", "t5", *CAUSAL])
def test_a_family_learns_is_saved_and_answers(family, tmp_path):
    rag = rag_of(family)
    steps = 120 if family == "qwen2" else 60
    settings = SETTINGS.model_copy(update={"max_steps": steps, "learning_rate": 2e-2, "eval_steps": 60, "batch_size": 9,
                                           "gradient_accumulation_steps": 1, "logging_steps": 60})  # fmt: skip
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer = Trainer(rag, NEW, settings, "no", 7, None)
    trainer.run(examples, examples, lambda point: None)
    losses = [point["val_loss_per_sequence"] for point in trainer.progress.history if "val_loss_per_sequence" in point]
    assert losses[-1] < 0.5 * losses[0]

    asked = answers_of(rag)
    assert sum(text == answer for (text, _), answer in zip(asked, ANSWERS, strict=True)) >= 3, asked
    save_rag(rag, tmp_path / "model", "sequence")
    encoder, generator = load_rag_parts(tmp_path / "model")
    again = open_rag(encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    assert answers_of(again) == asked
