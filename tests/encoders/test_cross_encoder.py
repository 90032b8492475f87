"""Cross-encoders: pairs put together as the tokenizer would, packed scores against the library's, what is refused."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from stages.corpus.token_store import TokenStore
from stages.encoders.cross_encoder import load_cross_encoder
from stages.encoders.reranker_warmup import asked_rows

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(40))]
QUESTIONS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
TITLES, TEXTS = ["w10", "", "w12 w13"], ["w20 w21 w22 w23", "w24", "w25 " * 20]
SIZES = dict(
    vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    initializer_range=0.5, pad_token_id=0,
)  # fmt: skip


def words_tokenizer(types: bool):
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if types else "[CLS] $A [SEP] [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )


def saved(folder, model, types=True):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero in a new model
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    words_tokenizer(types).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    return saved(tmp_path, BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=48, num_labels=1)))


@pytest.fixture
def roberta(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, max_position_embeddings=48, type_vocab_size=1, num_labels=1)
    return saved(tmp_path, RobertaForSequenceClassification(config), types=False)


def scores(encoder, dtype=None):
    """Of every question with every passage [3, 3]."""
    questions = TokenStore.from_rows(encoder.question_rows(QUESTIONS, 4))
    passages = TokenStore.from_rows(encoder.passage_rows(TITLES, TEXTS, 12))
    asked = asked_rows(questions, torch.arange(3), CPU).repeated(3)
    return encoder.scores(encoder.pairs(asked, passages, torch.arange(3).repeat(3)), dtype).view(3, 3)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_scores_are_the_librarys_of_the_tokenizers_own_pairs(kind, dtype, request):
    folder = request.getfixturevalue(kind)
    encoder = load_cross_encoder(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = encoder.tokenizer
    cut = [" ".join(question.split()[:4]) for question in QUESTIONS]
    passages = [" ".join(f"{title} {text}".split()[:12]) for title, text in zip(TITLES, TEXTS, strict=True)]
    with torch.no_grad():
        expected = torch.tensor(
            [[model(**tokenizer(one, other, return_tensors="pt")).logits.item() for other in passages] for one in cut]
        )
        found = scores(encoder, dtype)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_the_gradient_of_packed_scores_is_that_of_padded_ones(bert):
    encoder = load_cross_encoder(bert)
    scores(encoder).pow(2).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in encoder.model.named_parameters()}
    encoder.model.zero_grad()
    given = encoder.tokenizer(
        [" ".join(question.split()[:4]) for question in QUESTIONS for _ in TITLES],
        [" ".join(f"{t} {x}".split()[:12]) for t, x in zip(TITLES, TEXTS, strict=True)] * 3,
        return_tensors="pt", padding=True,
    )  # fmt: skip
    encoder.model(**given).logits.pow(2).sum().backward()
    for name, parameter in encoder.model.named_parameters():
        torch.testing.assert_close(
            packed[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_dpr_encoder_gets_a_new_head_and_is_saved_as_the_librarys(tmp_path):
    torch.manual_seed(0)
    made = load_cross_encoder("data/tiny/encoder")
    made.save(tmp_path)
    again = load_cross_encoder(str(tmp_path))
    assert all(map(torch.equal, again.model.state_dict().values(), made.model.state_dict().values()))
    torch.testing.assert_close(scores(again), scores(made), rtol=1e-5, atol=1e-6)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 1


def test_a_plain_encoder_gets_a_new_head(tmp_path):
    torch.manual_seed(0)
    plain = BertModel(BertConfig(**SIZES, max_position_embeddings=48), add_pooling_layer=False)
    made = load_cross_encoder(saved(tmp_path, plain))
    assert torch.equal(made.model.bert.encoder.layer[0].output.dense.weight, plain.encoder.layer[0].output.dense.weight)
    assert made.model.classifier.weight.shape == (1, 16) and scores(made).isfinite().all()


def test_what_is_no_reranker_is_refused_in_one_line(tmp_path, bert):
    with pytest.raises(ValueError, match="models.reranker: no model at 'data/nowhere'"):
        load_cross_encoder("data/nowhere")
    with pytest.raises(ValueError, match="models.reranker: 'data/tiny/generator' is a .*model type bart"):
        load_cross_encoder("data/tiny/generator")
    classes = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    with pytest.raises(ValueError, match="tells 3 classes apart; a reranker gives one score"):
        load_cross_encoder(saved(tmp_path / "classes", classes))
    encoder = load_cross_encoder(bert)
    assert encoder.passage_room(10, 100) == 48 - 10 - 3 and encoder.passage_room(10, 20) == 20
    with pytest.raises(ValueError, match="its 48 positions leave 5 tokens for a passage"):
        encoder.passage_room(40, 100)
