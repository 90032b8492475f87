"""Reading together against transformers' own decoder over concatenated states, and against reading each where they agree."""

import pytest
import torch
from transformers import LongT5Config, LongT5ForConditionalGeneration, MT5Config, MT5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from stages.generation.generator import generator_from
from stages.generation.seq2seq import Contexts
from stages.packed.cuda_graphs import fill
from stages.packed.packing import Packing
from stages.rag.opening import open_rag
from stages.rag.together import read_together
from tests.generation.test_packed_bart import distance
from tests.rag.test_families import rag_of
from tests.rag.test_model import lose
from tests.tiny_rag import ANSWERS, LENGTHS, QUESTIONS, reranked_rag, tiny_rag, tokenizer

EVERYTHING = list(range(len(QUESTIONS)))
T5_LIKE = dict(
    vocab_size=8192, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2, dropout_rate=0.0,
    pad_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
OTHERS = {
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**T5_LIKE)),
    "longt5": lambda: LongT5ForConditionalGeneration(LongT5Config(**T5_LIKE)),
}
# Found, found in part (the middle missing, the end missing), not found at all.
ROWS = torch.tensor([[4, 0, 7], [1, -1, 5], [8, 2, -1], [-1, -1, -1]])
WAYS = ["bart", "bart, padded", "t5", *OTHERS]
BOTH = pytest.mark.parametrize("way", ["bart", "bart, padded", "t5"])


def rag_by(way: str):
    if way in OTHERS:
        rag = tiny_rag()
        torch.manual_seed(0)
        generator = generator_from(OTHERS[way]().eval(), tokenizer("generator"))
        return open_rag(rag.encoder, generator, rag.index, rag.passages, 3, LENGTHS, torch.device("cpu"))
    rag = rag_of(way.split(",")[0])
    if "padded" in way:
        rag.packed = None
    return rag


def batch_of(rag, rows=EVERYTHING):
    return rag.batch(rag.examples(QUESTIONS, ANSWERS), rows)


def forward(rag, rows=EVERYTHING, gradient="emdr2", **options):
    return rag(batch_of(rag, rows), marginal="sequence", reading="together", retriever_gradient=gradient, **options)


def gradients(rag, loss):
    rag.zero_grad()
    loss.sum().backward()
    return {name: p.grad.clone() for name, p in rag.named_parameters() if p.grad is not None and p.grad.any()}


def summed(log_probs, batch):
    return log_probs.masked_fill(~batch.target_mask, 0.0).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_the_joint_likelihood_is_transformers_own_over_concatenated_states(way):
    """Theirs one question and one passage at a time, so that there is no padding anywhere."""
    rag = rag_by(way)
    batch, model = batch_of(rag, [0, 3, 5, 6]), rag.generator_model
    ids, mask = rag.contexts(batch, ROWS)
    found = summed(read_together(rag, batch, ROWS, "together").joint, batch)
    for question, passages in enumerate(ROWS.tolist()):
        read = [place for place, row in enumerate(passages) if row >= 0] or [0]
        alone = [ids[3 * question + place][mask[3 * question + place].bool()] for place in read]
        states = torch.cat([model.get_encoder()(input_ids=one[None]).last_hidden_state for one in alone], 1)
        answer = batch.targets[question][batch.target_mask[question]]
        fed = torch.tensor([*rag.generator.decoder_prefix, *answer[:-1].tolist()])
        logits = model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=fed[None]).logits[0]
        expected = logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()
        torch.testing.assert_close(found[question], expected, rtol=1e-5, atol=1e-4)


@BOTH
def test_padding_and_missing_passages_change_nothing(way):
    rag = rag_by(way)
    batch = batch_of(rag)
    rows = torch.arange(27).view(9, 3) % 9
    among = summed(read_together(rag, batch, rows, "together").joint, batch)
    for question in EVERYTHING:
        alone = batch_of(rag, [question])
        with_missing = torch.cat([torch.full((1, 2), -1), rows[[question]]], 1)
        for read in (
            rows[[question]],
            with_missing,
            rows[[question]].flip(1),
        ):  # nor, without positions, does the order
            torch.testing.assert_close(
                summed(read_together(rag, alone, read, "together").joint, alone)[0],
                among[question],
                rtol=1e-5,
                atol=1e-4,
            )


@BOTH
def test_one_passage_read_together_is_one_passage_read(way):
    rag = rag_by(way)
    rag.n_docs = 1
    each = rag(batch_of(rag), marginal="sequence", label_smoothing=0.1)
    together = forward(rag, label_smoothing=0.1)
    torch.testing.assert_close(together.nll, each.nll, rtol=1e-5, atol=1e-5)
    assert distance(gradients(rag, together.nll), gradients(rag, each.nll)) < 1e-5
    assert together.context_tokens == each.context_tokens


@BOTH
def test_several_passages_read_together_are_another_likelihood(way):
    rag = rag_by(way)
    batch = batch_of(rag)
    both = forward(rag).nll, rag(batch, marginal="sequence").nll
    assert (both[0] - both[1]).abs().min() > 1e-4


@BOTH
def test_the_likelihoods_under_each_alone_are_those_of_reading_each(way):
    rag = rag_by(way)
    batch = batch_of(rag, [0, 3, 5, 6])
    found = read_together(rag, batch, ROWS, "together", label_smoothing=0.1, alone=True)
    expected = rag.token_log_probs(batch, *rag.contexts(batch, ROWS))
    read = (ROWS >= 0)[..., None] & batch.target_mask[:, None]
    torch.testing.assert_close(found.alone[read], expected[read], rtol=1e-5, atol=1e-5)
    assert not found.alone.requires_grad and found.joint.requires_grad and found.alone.isfinite().all()


@BOTH
def test_emdr2_teaches_the_retriever_what_rag_sequence_does_and_the_generator_nothing(way):
    rag = rag_by(way)
    output = forward(rag)
    taught = gradients(rag, output.retriever_loss)
    expected = gradients(rag, rag(batch_of(rag), marginal="sequence").nll)
    expected = {name: value for name, value in expected.items() if name.startswith("question_encoder")}
    assert expected and taught.keys() == expected.keys() and distance(taught, expected) < 1e-5
    assert all(name.startswith("generator") for name in gradients(rag, forward(rag).nll))


def test_distillation_teaches_everything_that_ranks_and_nothing_else():
    rag = reranked_rag()
    taught = gradients(rag, forward(rag, gradient="perplexity_distillation").retriever_loss)
    parts = {name.split(".")[0] for name in taught}
    assert parts == {"question_encoder", "cross_encoder", "prior"}


def test_without_a_retriever_gradient_there_is_no_loss_for_it_and_no_pass_under_each():
    rag = tiny_rag()
    output = forward(rag, gradient="none")
    assert output.retriever_loss is None and output.scored_under == 1
    assert all(name.startswith("generator") for name in gradients(rag, output.nll))
    with torch.no_grad():
        assert forward(rag).retriever_loss is None, "nobody learns from a validation"
    assert forward(rag).scored_under == pytest.approx(1 + 3 / 3)


@BOTH
def test_a_question_for_which_nothing_was_found_is_read_alone_and_teaches_the_retriever_nothing(way):
    rag = rag_by(way)
    batch = batch_of(rag, [2, 5])
    alone = rag.contexts(batch, torch.full((2, 1), -1))
    expected = -rag.token_log_probs(batch, *alone)[0, 0][batch.target_mask[0]].sum().item()
    usual = forward(rag, [2, 5])
    lose(rag)
    output = forward(rag, [2, 5])
    assert output.nll[0].item() == pytest.approx(expected, abs=1e-4)
    assert output.nll[1].item() == pytest.approx(usual.nll[1].item(), abs=1e-4)
    assert output.retriever_loss[0].item() == pytest.approx(expected, abs=1e-4)
    taught = gradients(rag, output.nll[0] + output.retriever_loss[0])
    assert all(name.startswith("generator") and value.isfinite().all() for name, value in taught.items())


def test_an_index_smaller_than_n_docs():
    few, many = tiny_rag(n_docs=2, passages=2), tiny_rag(n_docs=5, passages=2)
    for gradient in ("emdr2", "perplexity_distillation"):
        outputs = [forward(rag, gradient=gradient) for rag in (few, many)]
        torch.testing.assert_close(outputs[0].nll, outputs[1].nll, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs[0].retriever_loss, outputs[1].retriever_loss, rtol=1e-4, atol=1e-5)
        assert outputs[0].context_tokens == outputs[1].context_tokens
        found = gradients(many, outputs[1].nll + outputs[1].retriever_loss)
        assert all(value.isfinite().all() for value in found.values())


def assert_packed_gradients_are_the_padded_ones(loss_of):
    """In bf16, too, as near as that is to fp32 when padded; `loss_of` a Rag."""
    results = {}
    for way in ("bart", "bart, padded"):
        for half in (False, True):
            rag = rag_by(way)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_of(rag)
            assert loss.dtype == torch.float
            results[way, half] = gradients(rag, loss)
    assert distance(results["bart", False], results["bart, padded", False]) < 1e-5
    noise = distance(results["bart, padded", True], results["bart, padded", False])
    assert distance(results["bart", True], results["bart", False]) < 2 * noise < 0.2


def test_packed_gradients_are_the_padded_ones():
    def loss_of(rag):
        output = forward(rag)
        return output.nll + output.retriever_loss

    assert_packed_gradients_are_the_padded_ones(loss_of)


def test_a_working_copy_computes_it_too():
    """In bf16 without autocast: one passage read together is, to the bit, one passage read."""
    rag = tiny_rag(n_docs=1)
    rag.work_in(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        each, together = rag(batch_of(rag), marginal="sequence"), forward(rag)
        assert torch.equal(each.nll, together.nll)
        loss = together.nll + together.retriever_loss
    own = gradients(rag, loss)
    expected = gradients(rag, each.nll)
    assert all(value.dtype == torch.float for value in own.values()) and own.keys() == expected.keys()
    assert distance(own, expected) < 1e-6


@pytest.mark.parametrize("rows", [EVERYTHING, [3], [0, 4, 5]])
def test_what_fills_a_graphs_size_up_changes_neither_losses_nor_gradients(rows):
    rag = tiny_rag()
    output = forward(rag, rows)
    expected = gradients(rag, output.nll + output.retriever_loss)
    plain, sizes = rag.packed.log_probs, []

    def log_probs(packed, label_smoothing):
        filled = fill(packed.widened(rag.lengths.context_tokens, rag.lengths.answer_tokens))
        sizes.append((len(filled.ids) - len(packed.ids), filled.tokens.rows - packed.tokens.rows))
        assert filled.tokens.rows == 3 * filled.answers.rows
        return plain(filled, label_smoothing)[: len(packed.read)]

    rag.packed.log_probs = log_probs
    found = forward(rag, rows)
    [(tokens, contexts)] = sizes
    assert tokens >= contexts > 0
    torch.testing.assert_close(found.nll, output.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.retriever_loss, output.retriever_loss, rtol=1e-5, atol=1e-5)
    assert distance(gradients(rag, found.nll + found.retriever_loss), expected) < 1e-5


def test_rows_end_to_end_and_repeated():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    values = torch.arange(12).view(4, 3)
    packing, joined = Packing.of(mask), Packing.of(mask).joined(2)
    end_to_end = torch.tensor([[0, 1, 3, 0, 0, 0], [9, 10, 11, 0, 0, 0]])
    assert torch.equal(joined.unpack(packing.pack(values)), end_to_end) and joined.offsets.tolist() == [0, 3, 6]
    padded = Contexts(values[..., None].float(), mask).joined(2)
    assert padded.mask.tolist() == [[1, 1, 1]] * 2 and torch.equal(padded.states[..., 0].long(), end_to_end[:, :3])
    copies, of, places = packing.repeated(2)
    repeated = copies.unpack(packing.pack(values)[of])
    assert torch.equal(repeated, (values * mask).repeat_interleave(2, 0))
    assert torch.equal(packing.pack(values)[of][places], packing.pack(values)[:, None].expand(-1, 2))
