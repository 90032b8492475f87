"""What the saved folder says of itself: transformers' own `generate` gives our answers."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    GenerationConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)

from stages.encoders.encoder import Encoder
from stages.evaluation.decoding import generate
from stages.generation.marginalization import log_prior
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.storage import manifest
from stages.training.trainer import Trainer
from tests.rag.test_families import rag_of
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS

EVERYTHING = list(range(len(QUESTIONS)))
EOS = 2
SHORT = SETTINGS.model_copy(update={
    "max_steps": 40, "learning_rate": 2e-2, "eval_steps": 40, "batch_size": 9, "gradient_accumulation_steps": 1,
    "logging_steps": 40,
})  # fmt: skip


def trained(family, in_parts=False, marginal="sequence"):
    """As a base model from the hub would have it: another first token, and settings for other answers."""
    rag = rag_of(family)
    config = rag.generator_model.config
    rag.generator_model.generation_config = GenerationConfig(
        num_beams=3, length_penalty=2.0, no_repeat_ngram_size=1, forced_bos_token_id=7, eos_token_id=[EOS, 9],
        repetition_penalty=3.0, min_new_tokens=6,
    )  # fmt: skip
    if family == "bart":
        config.decoder_start_token_id, config.forced_bos_token_id, config.forced_eos_token_id = 2, 7, None
    if in_parts:
        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        bert = BertModel(BertConfig(vocab_size=7168, max_position_embeddings=48, pad_token_id=1, **sizes), False)
        encoder = Encoder(bert.eval(), rag.encoder.tokenizer, "mean")
        rag = open_rag(encoder, rag.generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    examples = rag.examples(QUESTIONS, ANSWERS)
    Trainer(rag, NEW.model_copy(update={"marginalization": marginal}), SHORT, "no", 7, None).run(
        examples, examples, lambda point: None
    )
    return rag.eval()


@torch.no_grad()
def contexts_of(rag):
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    rows, scores = rag.retrieve(rag.encode_questions(batch))
    return *rag.contexts(batch, rows), log_prior(scores)


def ours_of(rag, ids, mask, prior, num_beams, marginal="sequence"):
    return generate(
        rag.generator, ids, mask, prior, num_beams=num_beams, max_answer_tokens=LENGTHS.answer_tokens,
        decoding="thorough", marginalization=marginal,
    )  # fmt: skip


def assert_alike(ours, theirs, num_beams):
    """Where a hypothesis of several beams fills the length, transformers' forced EOS costs nothing."""
    alike = [given.token_ids == tokens[: tokens.index(EOS)] for given, tokens in zip(ours, theirs, strict=True)]
    assert all(alike) if num_beams == 1 else sum(alike) >= 0.9 * len(alike), (ours, theirs)
    assert sum(given.finished for given in ours) > len(ours) / 2, "a test of answers that end by themselves"
    assert len({given.text for given in ours}) > 2


@pytest.fixture(scope="module", params=["bart", "bart in parts", "t5", "t5 in parts", "llama", "qwen2", "gpt2"])
def saved(request, tmp_path_factory):
    rag = trained(request.param.split()[0], "parts" in request.param)
    folder = tmp_path_factory.mktemp("model")
    save_rag(rag, folder, "sequence")
    return rag, folder


@pytest.mark.parametrize("num_beams", [1, 4])
def test_transformers_generates_from_one_context_what_we_do(saved, num_beams):
    rag, folder = saved
    ids, mask, _ = contexts_of(rag)
    ours = ours_of(rag, ids[:, None], mask[:, None], torch.zeros(len(ids), 1), num_beams)
    asked = {} if num_beams == 4 else {"num_beams": 1}
    if not rag.generator_model.config.is_encoder_decoder:
        model = AutoModelForCausalLM.from_pretrained(folder / "generator")
        theirs = []
        for row, real in zip(ids, mask.bool(), strict=True):
            [whole] = model.generate(row[real][None], attention_mask=mask[:1, : real.sum()] * 0 + 1, **asked).tolist()
            theirs.append(whole[int(real.sum()) :])
    else:
        if (folder / "generator").is_dir():
            model = AutoModelForSeq2SeqLM.from_pretrained(folder / "generator")
        else:
            loaded = RagSequenceForGeneration.from_pretrained(folder)
            model = loaded.rag.generator
            asked["generation_config"] = GenerationConfig.from_pretrained(folder)
            assert model.generation_config.decoder_start_token_id == rag.generator.decoder_prefix[-1]
        theirs = [row[1:] for row in model.generate(ids, attention_mask=mask, **asked).tolist()]
    assert_alike(ours, theirs, num_beams)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_rag_token_answers_as_transformers_from_the_folder(tmp_path, num_beams):
    rag = trained("bart", marginal="token")
    save_rag(rag, tmp_path, "token")
    ids, mask, prior = contexts_of(rag)
    shape = (len(QUESTIONS), 3, -1)
    ours = ours_of(rag, ids.view(shape), mask.view(shape), prior, num_beams, "token")
    model = RagTokenForGeneration.from_pretrained(tmp_path)
    asked = {} if num_beams == 4 else {"num_beams": 1}
    theirs = model.generate(context_input_ids=ids, context_attention_mask=mask, doc_scores=prior, **asked)
    assert_alike(ours, [row[1:] for row in theirs.tolist()], num_beams)


def test_what_is_loaded_again_answers_the_same(saved):
    rag, folder = saved
    encoder, generator = load_rag_parts(folder)
    again = open_rag(encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    ids, mask, prior = contexts_of(rag)
    shape = (len(QUESTIONS), 3, -1)
    answers = [ours_of(one, ids.view(shape), mask.view(shape), prior, 2) for one in (rag, again)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_parts_of_the_rag_layout_are_those_that_transformers_loads(family, tmp_path):
    save_rag(rag_of(family), tmp_path, "sequence")
    whole = RagSequenceForGeneration.from_pretrained(tmp_path).rag
    encoder, generator = load_rag_parts(tmp_path)
    for part, expected in ((encoder.model, whole.question_encoder), (generator.model, whole.generator)):
        assert type(part) is type(expected) and not part.training
        assert len(list(part.parameters())) == len(list(expected.parameters()))  # what is tied stays tied
        weights = part.state_dict()
        assert weights.keys() == expected.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.state_dict().items())
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    manifest.record_folder(tmp_path)
    with pytest.raises(ValueError, match="damaged or not a RAG checkpoint"):
        load_rag_parts(tmp_path)
