"""The RAG model: its loss against transformers and finite differences, its checkpoint, its edges."""

import pytest
import torch
from transformers import BertConfig, BertModel, RagSequenceForGeneration, RagTokenForGeneration

from stages.encoders.encoder import Encoder
from stages.rag.folder import load_rag_parts, save_rag
from stages.rag.opening import open_rag
from stages.rag.prior import PriorWeights, Weights
from tests.tiny_rag import ANSWERS, QUESTIONS, TITLES, tiny_rag

EVERYTHING = list(range(len(QUESTIONS)))


def losses(rag, rows=EVERYTHING, marginal="sequence", **options):
    return rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), rows), marginal=marginal, **options).nll


@pytest.mark.parametrize("marginal", ["sequence", "token"])
def test_loss_equals_transformers(marginal):
    rag = tiny_rag()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    rows, scores = rag.retrieve(rag.encode_questions(batch))
    input_ids, mask = rag.contexts(batch, rows)
    kind = RagSequenceForGeneration if marginal == "sequence" else RagTokenForGeneration
    theirs = kind(question_encoder=rag.question_encoder, generator=rag.generator_model)
    # Theirs decodes from labels that start with <s> and scores what follows.
    labels = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), batch.targets], dim=1)
    expected = theirs(
        context_input_ids=input_ids, context_attention_mask=mask, doc_scores=scores, labels=labels,
        decoder_input_ids=labels, n_docs=rag.n_docs, exclude_bos_score=False, reduce_loss=False,
    ).loss  # fmt: skip
    if marginal == "token":
        expected = expected.view(len(rows), -1).sum(-1)
    torch.testing.assert_close(losses(rag, marginal=marginal), expected, rtol=1e-5, atol=1e-4)


def test_gradient_reaches_the_question_encoder_and_is_the_finite_difference():
    rag = tiny_rag(n_docs=len(TITLES))  # every passage retrieved: the set cannot change under a small step
    losses(rag).sum().backward()
    weight = rag.question_encoder.question_encoder.encode_proj.weight
    analytic = weight.grad.clone()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-3
    with torch.no_grad():
        weight += step * direction
        above = losses(rag).double().sum()
        weight -= 2 * step * direction
        below = losses(rag).double().sum()
    numeric = ((above - below) / (2 * step)).item()
    assert analytic.abs().max() > 1e-3
    assert (analytic * direction).sum().item() == pytest.approx(numeric, rel=2e-2)


@pytest.mark.parametrize("options", [{"marginal": "average"}, {"retriever_gradient": "none"}])
def test_old_switches_leave_the_question_encoder_without_any_gradient(options):
    rag = tiny_rag()
    losses(rag, **options).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in rag.question_encoder.parameters())
    assert all(p.grad is not None and p.grad.any() for p in rag.generator_model.model.encoder.layers.parameters()
               if p.dim() > 1)  # fmt: skip


@pytest.mark.parametrize("marginal", ["sequence", "token", "average"])
def test_a_question_has_the_same_loss_alone_and_among_longer_ones(marginal):
    rag = tiny_rag()
    together = losses(rag, marginal=marginal)
    alone = torch.cat([losses(rag, [row], marginal) for row in EVERYTHING])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("marginal", ["sequence", "token", "average"])
def test_index_smaller_than_n_docs(marginal):
    few, many = tiny_rag(n_docs=2, passages=2), tiny_rag(n_docs=5, passages=2)
    torch.testing.assert_close(losses(many, marginal=marginal), losses(few, marginal=marginal), rtol=1e-5, atol=1e-5)
    losses(many, marginal=marginal).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in many.parameters() if p.grad is not None)


def test_long_question_is_kept_whole_in_its_contexts_and_works():
    rag = tiny_rag()
    question = "Which of the places is " + "very " * 60 + "far?"
    batch = rag.batch(rag.examples([question], ["10 km"]), [0])
    assert batch.question_ids.shape[1] == rag.lengths.question_tokens
    rows, _ = rag.retrieve(rag.encode_questions(batch))
    input_ids, mask = rag.contexts(batch, rows)
    assert input_ids.shape[1] <= rag.lengths.context_tokens
    asked = batch.generator_questions[0].tolist()
    for ids, real in zip(input_ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert ids[real - 1 - len(asked) : real - 1] == asked


def test_missing_passage_is_the_question_alone():
    rag = tiny_rag()
    batch = rag.batch(rag.examples(QUESTIONS[:1], ANSWERS[:1]), [0])
    ids, mask = rag.contexts(batch, torch.tensor([[-1]]))
    asked = batch.generator_questions[0][: int(batch.generator_question_lengths[0])].tolist()
    assert ids[0].tolist() == [0, *asked, 2] and mask.all()


@pytest.mark.parametrize("marginal", ["sequence", "token"])
def test_checkpoint_is_transformers_own_and_gives_the_same_loss(tmp_path, marginal):
    rag = tiny_rag()
    save_rag(rag, tmp_path, marginal)
    kind = RagTokenForGeneration if marginal == "token" else RagSequenceForGeneration
    loaded = kind.from_pretrained(tmp_path)
    for ours, theirs in (
        (rag.question_encoder, loaded.rag.question_encoder),
        (rag.generator_model, loaded.rag.generator),
    ):
        expected, found = ours.state_dict(), theirs.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.config.n_docs == rag.n_docs and not list(tmp_path.glob("*.bin"))
    encoder, generator = load_rag_parts(tmp_path)
    again = tiny_rag(seed=5)
    again.index = rag.index
    again.question_encoder.load_state_dict(encoder.model.state_dict())
    again.generator_model.load_state_dict(generator.model.state_dict())
    assert torch.equal(losses(again, marginal=marginal), losses(rag, marginal=marginal))


def test_damaged_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no trained model"):
        load_rag_parts(tmp_path)
    save_rag(tiny_rag(), tmp_path, "sequence")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load_rag_parts(tmp_path)


def test_the_score_scale_sharpens_the_prior_alone_and_its_gradient_follows():
    plain, scaled = tiny_rag(), tiny_rag()
    scaled.prior.start = Weights(score_scale=3.0)
    batch = plain.batch(plain.examples(QUESTIONS, ANSWERS), EVERYTHING)
    rows, scores = plain.retrieve(plain.encode_questions(batch))
    again, tripled = scaled.retrieve(scaled.encode_questions(batch))
    assert torch.equal(rows, again)
    torch.testing.assert_close(tripled, 3 * scores)
    torch.testing.assert_close(scaled(batch, marginal="sequence").log_prior, (3 * scores).log_softmax(-1).detach())


def test_a_bert_like_question_encoder_makes_the_checkpoint_two_folders(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=7168, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=48, pad_token_id=1,
    )  # fmt: skip
    rag = tiny_rag()
    encoder = Encoder(BertModel(config, add_pooling_layer=False).eval(), rag.encoder.tokenizer, "mean", True, "q: ")
    rag = open_rag(
        encoder,
        rag.generator,
        rag.index,
        rag.passages,
        3,
        rag.lengths,
        torch.device("cpu"),
        PriorWeights(Weights(20.0)),
    )
    losses(rag).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in rag.question_encoder.parameters())
    save_rag(rag, tmp_path, "sequence")
    encoder, generator = load_rag_parts(tmp_path)
    assert (encoder.pooling, encoder.normalize, encoder.question_prefix) == ("mean", True, "q: ")
    again = open_rag(
        encoder, generator, rag.index, rag.passages, 3, rag.lengths, torch.device("cpu"), PriorWeights(Weights(20.0))
    )
    assert torch.equal(losses(again), losses(rag))


def lose(rag, place: int = 0) -> None:
    """From now on the search finds nothing for the question at this place of every batch, as IVF does in an empty list."""
    search = rag.index.search

    def finds_less(vectors, depth):
        rows = search(vectors, depth).clone()
        rows[place] = -1
        return rows

    rag.index.search = finds_less


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("marginal", ["sequence", "token", "average"])
def test_a_question_without_passages_costs_what_its_answer_costs_under_the_question_alone(marginal, packed):
    rag = tiny_rag()
    if not packed:
        rag.packed = None
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), [2, 5])
    alone = rag.contexts(batch, torch.full((2, 1), -1))
    expected = -rag.token_log_probs(batch, *alone)[0, 0][batch.target_mask[0]].sum().item()
    usual = rag(batch, marginal=marginal)
    lose(rag)
    output = rag(batch, marginal=marginal)
    assert output.nll[0].item() == pytest.approx(expected, abs=1e-4)
    assert output.nll[1].item() == pytest.approx(usual.nll[1].item(), abs=1e-4)
    output.nll[0].backward()
    assert not any(p.grad is not None and p.grad.any() for p in rag.question_encoder.parameters())
    grads = [p.grad for p in rag.generator_model.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads) and any(grad.any() for grad in grads)
