import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    LongT5Config,
    MT5Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from stages.evaluation.states import start
from stages.generation.generator import generator_from, load_generator
from stages.generation.tokenizer import passage_tokens

BOS, PAD, EOS = 0, 1, 2
T5_SIZES = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=2, num_heads=2)
BART_SIZES = dict(
    d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2
) | dict(encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64)
LLAMA_SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
) | dict(max_position_embeddings=64, bos_token_id=BOS)
CAUSAL = {
    "gpt2": (GPT2Config, dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=BOS)),
    "llama": (LlamaConfig, LLAMA_SIZES),
    "qwen2": (Qwen2Config, LLAMA_SIZES | dict(tie_word_embeddings=True)),
}
FAMILIES = CAUSAL | {
    "bart": (BartConfig, BART_SIZES | dict(bos_token_id=BOS)),
    "t5": (T5Config, T5_SIZES),
    "t5-v1.1": (T5Config, T5_SIZES | dict(tie_word_embeddings=False, feed_forward_proj="gated-gelu")),
    "mt5": (MT5Config, T5_SIZES),
    "longt5-local": (LongT5Config, T5_SIZES | dict(local_radius=3)),
    "longt5-global": (
        LongT5Config,
        T5_SIZES | dict(local_radius=3, encoder_attention_type="transient-global", global_block_size=4),
    ),
}


def next_token(state, tokens):
    """Feed `tokens` [R], one a hypothesis; log p of the next, fp32 [R, V]."""
    return state.advance(tokens[:, None])[:, -1].float().log_softmax(-1)


def bpe_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentences = [
        "Paris / Paris is in France. // Where is Paris?",
        "Rome / Rome is in Italy. // Where is Rome?",
        "user\nassistant\n\nQuestion: \nAnswer: P",
    ]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(family, vocab_size):
    """A random model whose predictions depend strongly on what it read."""
    config_class, sizes = FAMILIES[family]
    ids = dict(vocab_size=vocab_size, pad_token_id=PAD, eos_token_id=EOS)
    if family in CAUSAL:
        model = AutoModelForCausalLM.from_config(config_class(**ids, **sizes))
    else:
        start = EOS if family == "bart" else PAD
        model = AutoModelForSeq2SeqLM.from_config(config_class(**ids, **sizes, decoder_start_token_id=start))
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6 if family in CAUSAL else 0.3)
        if family == "bart":
            model.final_logits_bias.normal_()
        elif family not in CAUSAL:
            model.get_input_embeddings().weight.mul_(10)  # T5 scales its outputs down
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_model(request.param, len(tokenizer)).half().save_pretrained(path)
    return path


@pytest.fixture
def generator(folder):
    return load_generator(str(folder))


def is_causal(generator):
    return not generator.model.config.is_encoder_decoder


def batch(lengths=(9, 4, 6), seed=0):
    """Contexts of different lengths, padded on the right, and targets [R, 5] that end with EOS."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    input_ids = torch.randint(4, 50, mask.shape, generator=random).masked_fill(~mask, PAD)
    targets = torch.randint(4, 50, (len(lengths), 5), generator=random)
    targets[:, -1] = EOS
    return input_ids, mask.long(), targets


def test_weights_stored_in_half_precision_are_loaded_as_float32(folder, generator):
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert {weight.dtype for weight in generator.model.parameters()} == {torch.float32}
    assert not generator.model.training


def test_token_layout_of_a_context(generator):
    passage, question = "Rome / Rome is in Italy.", "\nQuestion: Where is Rome?"
    if not is_causal(generator):
        question = " // Where is Rome?"
    [passage_ids] = passage_tokens(generator.tokenizer, ["Rome"], ["Rome is in Italy."])
    [question_ids] = generator.question_tokens(["Where is Rome?"])
    whole = generator.tokenizer(passage + question, add_special_tokens=False)["input_ids"]
    assert passage_ids + question_ids == whole
    assert passage_tokens(generator.tokenizer, [], []) == generator.question_tokens([]) == []
    if is_causal(generator):
        assert generator.tokenizer.decode(generator.context_suffix) == "\nAnswer:" and generator.context_prefix == []
        assert generator.max_positions == 64 and generator.positions_needed(40, 10) == 50
        return
    assert generator.context_suffix == [EOS]
    is_bart = generator.model.config.model_type == "bart"
    assert generator.context_prefix == ([BOS] if is_bart else [])
    assert generator.decoder_prefix == ([BOS] if is_bart else [PAD])
    assert generator.max_positions == (64 if is_bart else None)
    assert generator.positions_needed(40, 10) == 40 and generator.positions_needed(4, 10) == 11


def test_decode_gives_the_text_without_special_tokens(generator):
    [ids] = generator.tokenizer(["  Where is Rome? "], add_special_tokens=False)["input_ids"]
    assert generator.decode([BOS] + ids + [EOS, PAD]) == "Where is Rome?"
    assert generator.decode([]) == ""


def test_answers_end_with_eos_also_when_cut(generator):
    answers = ["Rome is in Italy.", "", "Rome"]
    written = [" " + answer if answer else "" for answer in answers] if is_causal(generator) else answers
    long, _, short = generator.tokenizer(written, add_special_tokens=False)["input_ids"]
    targets, mask = generator.answer_tokens(answers, max_answer_tokens=4)
    assert len(long) > 3 and targets.dtype == torch.long and mask.dtype == torch.bool
    assert targets[0].tolist() == long[:3] + [EOS]
    assert targets[1].tolist() == [EOS, PAD, PAD, PAD]
    assert targets[2][mask[2]].tolist() == short[:3] + [EOS]
    assert mask.sum(1).tolist() == [4, 1, min(len(short), 3) + 1]
    whole, _ = generator.answer_tokens(answers, max_answer_tokens=100)
    assert whole.shape[1] == len(long) + 1


@torch.no_grad()
def test_logits_step_and_advance_agree(generator):
    input_ids, mask, targets = batch()
    contexts = generator.encode(input_ids, mask)
    expected = generator.logits(contexts, targets).log_softmax(-1)
    state = start(generator, contexts)
    steps = [state.first()] + [next_token(state, token) for token in targets[:, :-1].unbind(1)]
    torch.testing.assert_close(torch.stack(steps, 1), expected, atol=1e-4, rtol=1e-4)

    state = start(generator, contexts)
    first = state.first()
    later = torch.cat([state.advance(targets[:, :2]), state.advance(targets[:, 2:-1])], 1)
    together = torch.cat([first[:, None], later.log_softmax(-1)], 1)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
    assert expected.amax(-1).exp().mean() > 0.2, "flat predictions would hide a mistake"


@torch.no_grad()
def test_logits_are_the_models_own_from_the_same_prefix(generator):
    input_ids, mask, targets = batch()
    if is_causal(generator):
        # Row by row without padding: the logits after the prompt and after every token of the answer but the last.
        ours = generator.logits(generator.encode(input_ids, mask), targets)
        for row, length in enumerate(mask.sum(1).tolist()):
            whole = torch.cat([input_ids[row, :length], targets[row, :-1]])[None]
            expected = generator.model(input_ids=whole).logits[0, length - 1 :]
            torch.testing.assert_close(ours[row], expected, atol=1e-5, rtol=1e-5)
        return
    # With labels, the library shifts them itself, starting from decoder_start_token_id.
    generator.model.config.decoder_start_token_id = generator.decoder_prefix[0]
    expected = generator.model(input_ids=input_ids, attention_mask=mask, labels=targets)
    ours = generator.logits(generator.encode(input_ids, mask), targets)
    torch.testing.assert_close(ours, expected.logits)
    loss = torch.nn.functional.cross_entropy(ours.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected.loss)


@torch.no_grad()
def test_padding_changes_nothing(generator):
    input_ids, mask, targets = batch()
    together = generator.logits(generator.encode(input_ids, mask), targets)
    for row, length in enumerate(mask.sum(1).tolist()):
        contexts = generator.encode(input_ids[row : row + 1, :length], mask[row : row + 1, :length])
        alone = generator.logits(contexts, targets[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    # What stands in the padding, of contexts and of targets, is never read.
    contexts = generator.encode(input_ids.masked_fill(mask == 0, 30), mask)
    padded = torch.cat([targets, torch.full((len(targets), 3), 40)], dim=1)
    torch.testing.assert_close(generator.logits(contexts, padded)[:, :5], together, atol=1e-4, rtol=1e-4)
    first = together[:, 0].log_softmax(-1)
    torch.testing.assert_close(start(generator, contexts).first(), first, atol=1e-4, rtol=1e-4)


def test_logits_carry_gradients_to_every_weight(generator):
    input_ids, mask, targets = batch()
    generator.model.train()
    loss = generator.logits(generator.encode(input_ids, mask), targets).log_softmax(-1)[..., EOS].sum()
    loss.backward()
    without = [name for name, weight in generator.model.named_parameters() if weight.grad is None]
    assert not without


@torch.no_grad()
def test_reorder_and_fork_move_hypotheses(generator):
    input_ids, mask, targets = batch((7, 5))
    contexts = generator.encode(input_ids, mask).repeat(2)  # rows: context 0 twice, context 1 twice
    first, second = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11, 12])
    state = start(generator, contexts)
    state.first()
    next_token(state, first)

    rows = torch.tensor([3, 0, 0])
    branch = state.fork(rows)
    branched = next_token(branch, second[:3])
    fed = torch.stack([first[rows], second[:3], second[:3]], 1)
    expected = generator.logits(contexts.select(rows), fed)[:, 2].log_softmax(-1)
    torch.testing.assert_close(branched, expected, atol=1e-4, rtol=1e-4)

    # The fork left the old state alone; now both rows of context 0 go on from its second hypothesis.
    rows = torch.tensor([1, 1, 3, 2])
    state.reorder(rows)
    fed = torch.stack([first[rows], second, second], 1)
    expected = generator.logits(contexts, fed)[:, 2].log_softmax(-1)
    torch.testing.assert_close(next_token(state, second), expected, atol=1e-4, rtol=1e-4)


def test_unsupported_family_is_named(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="models.generator: .* is of type bert; supported are bart, ") as caught:
        load_generator(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_missing_tokenizer_weights_or_folder_are_one_line(tmp_path, family):
    tokenizer = bpe_tokenizer()
    model = tiny_model(family, len(tokenizer))
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "no-tokenizer")
    model.config.save_pretrained(tmp_path / "no-weights")
    tokenizer.save_pretrained(tmp_path / "no-weights")
    tokenizer.save_pretrained(tmp_path / "pickled")
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name, reason in [
        ("empty", "cannot be loaded"),
        ("no-tokenizer", "no tokenizer"),
        ("no-weights", "cannot be loaded"),
        ("pickled", "cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=f"^models.generator: .*{name}.*{reason}") as caught:
            load_generator(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_tokenizer_of_another_model_is_refused():
    tokenizer = bpe_tokenizer()
    model = tiny_model("bart", len(tokenizer))
    assert generator_from(model, tokenizer).model is model
    with pytest.raises(ValueError, match="models.generator: .* tokens in the tokenizer, 20 in the model"):
        generator_from(tiny_model("bart", 20), tokenizer)
    tokenizer.eos_token = "<unk>"
    with pytest.raises(ValueError, match="models.generator: eos_token_id is 2 in the model, 3 in its tokenizer"):
        generator_from(model, tokenizer)
