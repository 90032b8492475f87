"""CUDA graphs change no number: what fills a size up is seen by nobody, and on a GPU replays are the passes."""

import numpy as np
import pytest
import torch

from stages.packed.cuda_graphs import fill
from stages.training.trainer import Trainer
from tests.generation.test_packed_bart import distance
from tests.rag.test_families import rag_of
from tests.tiny_rag import ANSWERS, NEW, QUESTIONS, SETTINGS, tiny_rag

EVERYTHING = list(range(len(QUESTIONS)))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
FAMILIES = pytest.mark.parametrize("family", ["bart", "llama"])


def filled_likelihood(rag):
    """The packed likelihood as a graph would read it, computed as usual."""
    plain, limits = (
        rag.packed.log_probs,
        (rag.lengths.context_tokens + rag.lengths.answer_tokens, rag.lengths.answer_tokens),
    )
    sizes = []

    def log_probs(packed, label_smoothing):
        filled = fill(packed.widened(*limits))
        sizes.append((len(packed.ids), len(filled.ids), len(packed.read), len(filled.read)))
        return plain(filled, label_smoothing)[: len(packed.read)]

    rag.packed.log_probs = log_probs
    return sizes


def loss_and_gradients(rag, rows=EVERYTHING, **options):
    rag.zero_grad()
    output = rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), rows), marginal="sequence", **options)
    output.nll.sum().backward()
    return output.nll.detach(), {name: p.grad.clone() for name, p in rag.named_parameters() if p.grad is not None}


@FAMILIES
@pytest.mark.parametrize("rows", [EVERYTHING, [3], [0, 4, 5]])
def test_what_fills_a_size_up_changes_neither_loss_nor_gradients(family, rows):
    rag = rag_of(family)
    expected, gradients = loss_and_gradients(rag, rows, label_smoothing=0.1)
    sizes = filled_likelihood(rag)
    found, filled_gradients = loss_and_gradients(rag, rows, label_smoothing=0.1)
    [(tokens, filled_tokens, answers, filled_answers)] = sizes
    assert tokens < filled_tokens <= 1.2 * tokens + 8 and answers < filled_answers <= 1.5 * answers + 8
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == filled_gradients.keys()
    assert distance(filled_gradients, gradients) < 1e-5


def test_few_sizes_occur():
    rag = tiny_rag()
    sizes = filled_likelihood(rag)
    random = np.random.default_rng(0)
    for _ in range(40):
        loss_and_gradients(rag, random.choice(EVERYTHING, 6, replace=False).tolist())
    assert len({(tokens, answers) for tokens, _, answers, _ in sizes}) > 30
    assert len({(tokens, answers) for _, tokens, _, answers in sizes}) < 20


def on_cuda(family, graphs, reading="each"):
    rag = rag_of(family).to("cuda")
    rag.passages = rag.passages.to(torch.device("cuda"))
    if graphs:
        rag.record_graphs(reading)
    return rag


@on_gpu
@FAMILIES
@pytest.mark.parametrize("half", [False, True])
def test_replays_give_the_loss_and_the_gradients_of_the_present_weights(family, half):
    plain, graphs = on_cuda(family, False), on_cuda(family, True)
    for scale in (1.0, 1.5, 0.7):  # other weights are read by the same recording
        for rag in (plain, graphs):
            for parameter in rag.generator_model.parameters():
                parameter.data.mul_(scale)
        for rows in (EVERYTHING, [3], EVERYTHING):
            results = []
            for rag in (plain, graphs):
                with torch.autocast("cuda", torch.bfloat16, enabled=half):
                    results.append(loss_and_gradients(rag, rows))
            (expected, gradients), (found, own) = results
            tolerance = 0.02 if half else 1e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            assert gradients.keys() == own.keys() and distance(own, gradients) < (0.05 if half else 1e-5)
    assert len(graphs.packed.graphs.graphs) == 2 and not graphs.packed.graphs.failed


@on_gpu
@pytest.mark.parametrize("gradient", ["emdr2", "none"])
@pytest.mark.parametrize("half", [False, True])
def test_replays_of_passages_read_together(gradient, half):
    plain, graphs = (on_cuda("bart", replayed, "together") for replayed in (False, True))
    for scale in (1.0, 1.5):
        results = []
        for rag in (plain, graphs):
            for parameter in rag.generator_model.parameters():
                parameter.data.mul_(scale)
            rag.zero_grad()
            batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                output = rag(batch, marginal="sequence", reading="together", retriever_gradient=gradient)
            loss = output.nll if output.retriever_loss is None else output.nll + output.retriever_loss
            loss.sum().backward()
            found = {name: p.grad.clone() for name, p in rag.named_parameters() if p.grad is not None}
            results.append((loss.detach(), found))
        (expected, gradients), (found, own) = results
        tolerance = 0.02 if half else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert gradients.keys() == own.keys() and distance(own, gradients) < (0.05 if half else 1e-5)
    assert len(graphs.packed.graphs.graphs) == 1 and not graphs.packed.graphs.failed


@on_gpu
def test_gradients_add_up_over_forward_passes_and_begin_anew_where_they_were_cleared():
    rag = on_cuda("bart", True)
    _, together = loss_and_gradients(rag)
    rag.zero_grad()
    examples = rag.examples(QUESTIONS, ANSWERS)
    for place in EVERYTHING:
        rag(rag.batch(examples, [place]), marginal="sequence").nll.sum().backward()
    summed = {name: p.grad.clone() for name, p in rag.named_parameters() if p.grad is not None}
    assert distance(summed, together) < 1e-5


@on_gpu
def test_dropout_differs_from_replay_to_replay_and_recording_takes_no_random_numbers():
    rag = on_cuda("bart", True)
    for module in rag.generator_model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.3
    rag.train()
    torch.manual_seed(5)
    noisy = [loss_and_gradients(rag)[0] for _ in range(3)]
    assert not torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[1], noisy[2])
    torch.manual_seed(5)
    again = [loss_and_gradients(rag)[0] for _ in range(3)]  # recorded already
    torch.testing.assert_close(torch.stack(again), torch.stack(noisy))


@on_gpu
def test_training_by_graphs_is_training():
    losses = []
    for graphs in (False, True):
        rag = on_cuda("bart", graphs)
        examples = rag.examples(QUESTIONS, ANSWERS)
        points = []
        Trainer(rag, NEW, SETTINGS, "no", 1, None).run(examples, examples, points.append)
        losses.append([point["val_loss_per_sequence"] for point in points if "val_loss_per_sequence" in point])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@on_gpu
def test_a_backward_pass_behind_another_forward_pass_is_refused():
    rag = on_cuda("bart", True)
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), EVERYTHING)
    first = rag(batch, marginal="sequence").nll.sum()
    rag(batch, marginal="sequence")
    with pytest.raises(AssertionError, match="later forward pass"):
        first.backward()
