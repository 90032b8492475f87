"""Decoder-only generators: the marginals by hand, library families one by one, prompts, GGUF, LoRA, checkpoints."""

import copy

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig

from stages.evaluation.states import start
from stages.generation.causal import Causal, causal_from
from stages.generation.generator import generator_from, load_generator, load_saved_generator
from stages.generation.lora import add_lora
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.settings.retrieval import Lora
from stages.training.trainer import Trainer
from tests.generation.test_generator import batch, bpe_tokenizer, next_token, tiny_model
from tests.rag.test_families import CAUSAL, answers_of, rag_of
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS, TITLES, tokenizer

EVERYTHING = list(range(len(QUESTIONS)))
EOS = 2


def losses(rag, marginal="sequence"):
    return rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING), marginal=marginal).nll


@pytest.mark.parametrize("family", CAUSAL)
def test_marginals_are_the_formula_over_plain_forwards(family):
    """Each prompt and answer alone, without padding, with the full vocabulary at every position."""
    rag = rag_of(family)
    for parameter in rag.generator_model.parameters():
        parameter.data.mul_(3)
    found = {marginal: losses(rag, marginal) for marginal in ("sequence", "token")}
    passages = [
        rag.passages.tokens[a:b].tolist()
        for a, b in zip(rag.passages.offsets[:-1], rag.passages.offsets[1:], strict=True)
    ]
    with torch.no_grad():
        examples = rag.examples(QUESTIONS, ANSWERS)
        rows, scores = rag.retrieve(rag.encode_questions(rag.batch(examples, EVERYTHING)))
        for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
            words = tokenizer("generator")
            asked = words(f"\nQuestion: {question}", add_special_tokens=False)["input_ids"][: LENGTHS.question_tokens]
            cue = words("\nAnswer:", add_special_tokens=False)["input_ids"]
            target = words(f" {answer}", add_special_tokens=False)["input_ids"] + [EOS]
            start = words("a")["input_ids"]
            per_doc = []
            for row in rows[i].tolist():
                prefix = [0] if start[0] == 0 else []
                room = LENGTHS.context_tokens - len(prefix) - len(asked) - len(cue)
                prompt = prefix + passages[row][:room] + asked + cue
                log_probs = rag.generator_model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
                per_doc.append([log_probs[len(prompt) - 1 + t, token] for t, token in enumerate(target)])
            per_doc = torch.tensor(per_doc)
            prior = scores[i].log_softmax(0)
            sequence = -(prior + per_doc.sum(1)).logsumexp(0)
            token = -(prior[:, None] + per_doc).logsumexp(0).sum()
            torch.testing.assert_close(found["sequence"][i], sequence, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found["token"][i], token, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found["sequence"], found["token"])


@pytest.mark.parametrize("family", CAUSAL)
def test_gradient_reaches_the_question_encoder_and_is_the_finite_difference(family):
    rag = rag_of(family)
    rag.n_docs = len(TITLES)  # every passage retrieved: the set cannot change under a small step
    for parameter in rag.generator_model.parameters():
        parameter.data.mul_(3)
    losses(rag).sum().backward()
    weight = rag.question_encoder.question_encoder.encode_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    analytic = (weight.grad * direction).sum().item()
    step = 1e-3
    with torch.no_grad():
        weight += step * direction
        above = losses(rag).double().sum()
        weight -= 2 * step * direction
        below = losses(rag).double().sum()
    assert abs(analytic) > 1e-2
    assert analytic == pytest.approx(((above - below) / (2 * step)).item(), rel=3e-2)


def test_only_answer_positions_reach_the_vocabulary():
    generator = generator_from(tiny_model("llama", 60), bpe_tokenizer())
    seen = []
    generator.model.lm_head.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape)))
    input_ids, mask, targets = batch()
    contexts = generator.encode(input_ids, mask)
    generator.logits(contexts, targets)
    state = start(generator, contexts)
    state.first()
    next_token(state, targets[:, 0])
    assert seen == [(3, 5, 60), (3, 60), (3, 60)]


SIZES = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=32, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
MIXED = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
LIBRARY = {
    "bloom": dict(n_layer=2, n_head=2),  # ALiBi, no position_ids
    "cohere": dict(logit_scale=1.5),
    "gemma2": MIXED | dict(final_logit_softcapping=2.0),
    "gpt_neox": dict(rotary_pct=0.5),
    "granite": dict(logits_scaling=1.5, embedding_multiplier=2.0, residual_multiplier=0.5),
    "mistral": dict(sliding_window=4),
    "mixtral": dict(num_local_experts=2),
    "opt": dict(ffn_dim=32, word_embed_proj_dim=16),
    "phi": {},
    "qwen3": {},
}


@torch.no_grad()
@pytest.mark.parametrize("family", LIBRARY)
def test_a_library_family_is_reproduced_with_its_scalings_and_windows(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | LIBRARY[family])).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.3)
    generator = Causal(model, None, EOS, 1, [], [], False, 64)
    input_ids, mask, targets = batch()
    expected = []
    for ids, real, target in zip(input_ids, mask.bool(), targets, strict=True):
        whole = torch.cat([ids[real], target[:-1]])[None]
        expected.append(model(input_ids=whole).logits[0, int(real.sum()) - 1 :])
    expected = torch.stack(expected).float().log_softmax(-1)
    contexts = generator.encode(input_ids, mask)

    def close(found, rows=slice(None), place=slice(None)):
        torch.testing.assert_close(found, expected[rows, place], atol=1e-4, rtol=1e-4)

    close(generator.logits(contexts, targets).log_softmax(-1))
    state = start(generator, contexts)
    first = state.first()
    branch = state.fork(torch.tensor([2, 0, 2]))
    close(torch.stack([first] + [next_token(state, token) for token in targets[:, :-1].unbind(1)], 1))
    close(branch.advance(targets[[2, 0, 2], :-1]).log_softmax(-1), [2, 0, 2], slice(1, None))
    # Two hypotheses on each context: the second one's first token was right, both go on from it.
    state = start(generator, contexts.repeat(2))
    state.first()
    begun = targets[:, 0].repeat_interleave(2)
    begun[0::2] = 33
    next_token(state, begun)
    state.reorder(torch.tensor([1, 1, 3, 3, 5, 5]))
    close(next_token(state, targets[:, 1].repeat_interleave(2))[0::2], place=2)
    assert first.exp().amax(-1).mean() > 0.04, "flat predictions would hide a mistake"


def test_a_recurrent_model_is_refused_in_one_line():
    config = AutoConfig.for_model("mamba", vocab_size=60, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="models.generator: type mamba carries a recurrent state") as caught:
        generator_from(AutoModelForCausalLM.from_config(config), bpe_tokenizer())
    assert "\n" not in str(caught.value)


def test_without_a_pad_token_nothing_is_resized_and_eos_is_scored():
    words = bpe_tokenizer()
    words.pad_token = None
    model = tiny_model("gpt2", len(words))
    size = model.get_input_embeddings().weight.shape
    generator = generator_from(model, words)
    assert generator.pad_token_id == EOS and model.get_input_embeddings().weight.shape == size
    targets, mask = generator.answer_tokens(["Rome", ""], 9)
    assert mask.sum(1).tolist() == [int((targets[0] != EOS).sum()) + 1, 1]
    words.eos_token = None
    with pytest.raises(ValueError, match="models.generator: the tokenizer has no EOS token"):
        generator_from(model, words)


def test_bos_stands_first_where_the_tokenizer_puts_it():
    from tokenizers.processors import TemplateProcessing

    words = bpe_tokenizer()
    model = tiny_model("llama", len(words))
    assert generator_from(model, words).context_prefix == []
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    generator = generator_from(model, words)
    assert generator.context_prefix == [0]
    assert 0 not in generator.context_suffix + generator.question_tokens(["Where?"])[0]


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_a_chat_template_frames_the_context_and_is_kept(tmp_path):
    words = bpe_tokenizer()
    model = tiny_model("llama", len(words))
    with pytest.raises(ValueError, match="models.chat_template: the generator's tokenizer has no usable one"):
        causal_from(model, words, chat_template=True)
    words.chat_template = TEMPLATE
    generator = causal_from(model, words, chat_template=True)
    assert words.decode(generator.context_prefix) == "<s>user\n"
    assert words.decode(generator.context_suffix) == "</s>\n<s>assistant\n"
    assert generator.answer_tokens(["Rome"], 9)[0].tolist() == [words("Rome")["input_ids"] + [EOS]]
    for part in (model, words):
        part.save_pretrained(tmp_path)
    loaded = load_saved_generator(tmp_path)
    assert loaded.context_prefix == generator.context_prefix and loaded.chat_template
    assert not load_generator(str(tmp_path)).chat_template, "params.yaml decides for a base model"
    bart = AutoModelForSeq2SeqLM.from_config(
        BartConfig(vocab_size=60, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
                   decoder_attention_heads=1, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    )  # fmt: skip
    with pytest.raises(ValueError, match="models.chat_template: true, but bart is no decoder-only model"):
        generator_from(bart, words, chat_template=True)


def write_gguf(path, model):
    """A Qwen2 model as llama.cpp's converter writes it, in fp32."""
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, value in weights.items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), value.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_starting_point_that_can_be_trained_and_saved(tmp_path):
    words = bpe_tokenizer()
    model = tiny_model("qwen2", len(words)).eval()
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "model.gguf", model)
    words.save_pretrained(folder)  # beside it: the file itself holds no tokenizer
    input_ids, mask, targets = batch()
    expected = generator_from(model, words)
    expected = expected.logits(expected.encode(input_ids, mask), targets)
    for name in (folder / "model.gguf", folder):
        generator = load_generator(str(name))
        found = generator.logits(generator.encode(input_ids, mask), targets)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.logsumexp(-1).sum().backward()
    assert all(weight.grad is not None for weight in generator.model.parameters())
    generator.model.save_pretrained(tmp_path / "saved")
    words.save_pretrained(tmp_path / "saved")
    again = load_generator(str(tmp_path / "saved"))
    assert torch.equal(again.logits(again.encode(input_ids, mask), targets), found)
    write_gguf(folder / "other.gguf", model)
    with pytest.raises(ValueError, match="models.generator: .* holds 2 GGUF files; name one of them"):
        load_generator(str(folder))
    (folder / "other.gguf").write_bytes(b"GGUF damaged")
    with pytest.raises(ValueError, match="models.generator: .*other.gguf cannot be loaded") as caught:
        load_generator(str(folder / "other.gguf"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", CAUSAL)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(family):
    plain, recomputed = rag_of(family), rag_of(family)
    settings = SETTINGS.model_copy(update={"gradient_checkpointing": True})
    Trainer(recomputed, NEW, settings, "no", 7, None)
    assert recomputed.generator_model.is_gradient_checkpointing
    gradients = []
    for rag in (plain, recomputed):
        rag.train()
        nll = losses(rag)
        nll.sum().backward()
        gradients.append((nll, [parameter.grad for parameter in rag.parameters()]))
    (nll, expected), (again, found) = gradients
    assert torch.equal(nll, again)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


LORA = Lora(rank=4, alpha=16, dropout=0.0, target_modules=None, base="fp32")


@pytest.mark.parametrize("family", ["bart", "gpt2", "llama"])
def test_lora_starts_as_the_base_trains_alone_and_is_saved_merged(family, tmp_path):
    rag = rag_of(family)
    before = losses(rag)
    base = copy.deepcopy(rag.generator_model.state_dict())
    add_lora(rag.generator_model, LORA)
    torch.testing.assert_close(losses(rag), before)
    trained = {name for name, weight in rag.generator_model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    settings = SETTINGS.model_copy(update={"max_steps": 20, "learning_rate": 2e-2, "eval_steps": 20, "batch_size": 9,
                                           "gradient_accumulation_steps": 1})  # fmt: skip
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer = Trainer(rag, NEW, settings, "no", 7, None)
    trainer.run(examples, examples, lambda point: None)
    measured = [
        point["val_loss_per_sequence"] for point in trainer.progress.history if "val_loss_per_sequence" in point
    ]
    assert measured[-1] < measured[0] - 0.5

    with_adapters = losses(rag)
    save_rag(rag, tmp_path / "model", "sequence")
    assert not [file for file in (tmp_path / "model").rglob("*") if "adapter" in file.name]
    encoder, generator = load_rag_parts(tmp_path / "model")
    again = open_rag(encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    assert torch.equal(losses(again), losses(rag))
    torch.testing.assert_close(losses(again), with_adapters, atol=1e-4, rtol=1e-4)
    merged = generator.model.state_dict()
    assert merged.keys() == base.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed and all(merged[name].dim() == 2 for name in changed)


def test_lora_on_modules_that_are_not_there_is_one_line():
    with pytest.raises(ValueError, match="models.lora.target_modules: no adapters for a llama") as caught:
        add_lora(tiny_model("llama", 60), LORA.model_copy(update={"target_modules": ["c_attn"]}))
    assert "\n" not in str(caught.value)


def test_the_checkpoint_is_two_folders_and_exact(tmp_path):
    rag = rag_of("llama")
    save_rag(rag, tmp_path / "model", "sequence")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"question_encoder", "generator", "manifest.json"}
    assert not list((tmp_path / "model").rglob("*.bin"))
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "generator")
    assert all(
        torch.equal(value, library.state_dict()[name]) for name, value in rag.generator_model.state_dict().items()
    )
    encoder, generator = load_rag_parts(tmp_path / "model")
    again = open_rag(encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    assert torch.equal(losses(again), losses(rag)) and answers_of(again) == answers_of(rag)
    weights = tmp_path / "model" / "generator" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load_rag_parts(tmp_path / "model")


def test_prompt_and_answer_must_fit_the_positions_together():
    rag = rag_of("llama")
    lengths = LENGTHS.model_copy(update={"context_tokens": 90})
    with pytest.raises(ValueError, match="lengths.context_tokens: 90 with lengths.answer_tokens 8 takes 98 positions"):
        open_rag(rag.encoder, rag.generator, rag.index, rag.passages, 3, lengths, torch.device("cpu"))
