"""A decoder-only model that reads all passages in one prompt: its likelihood, what trains its retriever, its edges."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from stages.corpus.token_store import TokenStore
from stages.evaluation.answering import answer, retrieve
from stages.generation import marginalization
from stages.generation.contexts import assemble_together
from stages.generation.generator import generator_from
from stages.generation.tokenizer import passage_tokens
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.rag.together import read_together
from stages.training.trainer import Trainer
from stages.training.validation import validation_loss
from tests.evaluation.test_answering import SETTINGS as ASKING
from tests.rag.test_model import lose
from tests.tiny_rag import ANSWERS, LENGTHS, NEW, QUESTIONS, SETTINGS, tiny_rag, tokenizer

IDS = dict(vocab_size=8192, bos_token_id=0, pad_token_id=1, eos_token_id=2)
POSITIONS = 3 * LENGTHS.context_tokens + LENGTHS.answer_tokens
CONFIGS = {
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS
    ),
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=POSITIONS, **IDS,
    ),
}  # fmt: skip
EVERYTHING = list(range(len(QUESTIONS)))
TOGETHER = NEW.model_copy(update={"reading": "together", "retriever_gradient": "emdr2"})


def rag_of(family, n_docs=3):
    rag = tiny_rag()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    generator = generator_from(model, tokenizer("generator"))
    return open_rag(
        rag.encoder, generator, rag.index, rag.passages, n_docs, LENGTHS, torch.device("cpu"), reading="together"
    )


def batch_of(rag):
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    with torch.no_grad():
        rows, _ = rag.retrieve(rag.encode_questions(batch))
    return batch, rows


BOTH = pytest.mark.parametrize("family", CONFIGS)


@BOTH
@torch.no_grad()
def test_the_likelihood_is_the_librarys_model_over_the_text_of_all_passages(family):
    rag = rag_of(family)
    batch, rows = batch_of(rag)
    rows[0, 1], rows[1, 0], rows[2] = -1, -1, -1
    found = read_together(rag, batch, rows, "together").joint
    for i, asked in enumerate(rag.generator.question_tokens(QUESTIONS)):
        held = [rag.passages.tokens[rag.passages.offsets[row] : rag.passages.offsets[row + 1]] for row in rows[i]]
        there = [ids.tolist() for ids, row in zip(held, rows[i].tolist(), strict=True) if row >= 0]
        frame = rag.generator.context_prefix, rag.generator.context_suffix
        room = LENGTHS.context_tokens - len(asked) - sum(map(len, frame))
        text = [token for ids in there for token in [*rag.generator.passage_separator, *ids[:room]]]
        prompt = [*frame[0], *text[len(rag.generator.passage_separator) if there else 0 :], *asked, *frame[1]]
        target = batch.targets[i, batch.target_mask[i]]
        logits = rag.generator.model(torch.tensor([prompt + target.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
        torch.testing.assert_close(found[i, batch.target_mask[i]], expected, rtol=1e-4, atol=1e-4)


def test_passages_stand_apart_by_an_empty_line_and_the_question_comes_once():
    words = {sign: place for place, sign in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    of_bytes = Tokenizer(models.BPE(words, merges=[]))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    of_bytes = PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="</s>")
    generator = generator_from(AutoModelForCausalLM.from_config(CONFIGS["llama"]), of_bytes)
    asked, lengths = TokenStore.from_rows(generator.question_tokens(["who?"])).padded(torch.tensor([0]), 48, 0)
    ids, mask = assemble_together(
        TokenStore.from_rows(passage_tokens(of_bytes, ["A", "B", "C"], ["one", "two", "three"])), torch.tensor([[2, -1, 0]]),
        asked, lengths, limit=64, prefix=generator.context_prefix, separator=generator.passage_separator,
        suffix=generator.context_suffix, pad=0,
    )  # fmt: skip
    assert of_bytes.decode(ids[0]) == "C / three\n\nA / one\nQuestion: who?\nAnswer:" and mask.all()


@BOTH
def test_the_retriever_learns_prior_minus_posterior_and_the_generator_from_the_prompt_alone(family):
    rag = rag_of(family)
    batch, rows = batch_of(rag)
    output = rag(batch, marginal="sequence", reading="together", retriever_gradient="emdr2")
    with torch.no_grad():
        alone = rag.token_log_probs(batch, *rag.contexts(batch, rows))
    expected = marginalization.sequence_nll(output.log_prior, alone, batch.target_mask)
    torch.testing.assert_close(output.retriever_loss, expected, rtol=1e-5, atol=1e-4)
    joint = read_together(rag, batch, rows, "together").joint.masked_fill(~batch.target_mask, 0.0).sum(-1)
    torch.testing.assert_close(output.nll, -joint, rtol=1e-5, atol=1e-4)
    output.retriever_loss.sum().backward()
    assert all(p.grad is None for p in rag.generator_model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in rag.question_encoder.parameters())


@BOTH
def test_one_passage_read_together_has_its_own_likelihood(family):
    rag = rag_of(family, n_docs=1)
    batch, _ = batch_of(rag)
    with torch.no_grad():
        together = rag(batch, marginal="sequence", reading="together", retriever_gradient="none")
        each = rag(batch, marginal="sequence")
    torch.testing.assert_close(together.nll, each.nll, rtol=1e-5, atol=1e-5)


@BOTH
def test_a_question_without_passages_is_read_alone_and_nothing_is_nan(family):
    rag = rag_of(family)
    lose(rag)
    output = rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING), marginal="sequence", reading="together",
                 retriever_gradient="emdr2")  # fmt: skip
    (output.nll.sum() + output.retriever_loss.sum()).backward()
    assert torch.isfinite(output.nll).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in rag.parameters())


def test_a_decoder_only_model_learns_is_saved_and_answers_with_the_probability_that_it_was_trained_by(tmp_path):
    rag = rag_of("llama")
    settings = SETTINGS.model_copy(update={"max_steps": 40, "learning_rate": 2e-2, "eval_steps": 40, "batch_size": 9,
                                           "gradient_accumulation_steps": 1, "logging_steps": 40})  # fmt: skip
    examples = rag.examples(QUESTIONS, ANSWERS)
    trainer = Trainer(rag, TOGETHER, settings, "no", 7, None)
    trainer.run(examples, examples, lambda point: None)
    losses = [point["val_loss_per_sequence"] for point in trainer.progress.history if "val_loss_per_sequence" in point]
    assert losses[-1] < 0.5 * losses[0]
    assert validation_loss(rag, examples, "sequence", reading="together")["val_loss_per_sequence"] == losses[-1]
    save_rag(rag, tmp_path / "model", "sequence", "together")
    again = open_rag(
        *load_rag_parts(tmp_path / "model"),
        rag.index,
        rag.passages,
        3,
        LENGTHS,
        torch.device("cpu"),
        reading="together",
    )
    found = retrieve(again, examples, 3, 4)
    prior = marginalization.log_prior(found.scores)
    for i, given in enumerate(answer(again, examples, found.rows, prior, ASKING, "sequence", "", reading="together")):
        targets = torch.tensor([[*given.token_ids, again.generator.eos_token_id]])
        batch = again.batch(examples, [i])._replace(targets=targets, target_mask=torch.ones_like(targets).bool())
        with torch.no_grad():
            nll = again(batch, marginal="sequence", reading="together", retriever_gradient="none").nll.item()
        assert given.log_prob >= -nll - 1e-3  # more where candidates that read alike are one answer
