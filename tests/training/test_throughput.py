"""MFU's numerator against torch's own count of what a step multiplied; the shares logged beside it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.compute import ranks
from stages.generation.lora import add_lora
from stages.settings.retrieval import Lora
from stages.training import throughput
from stages.training.progress import distinct_share
from stages.training.throughput import DeviceGaps, matrix_rate, training_flop, weights_by_tokens
from tests.tiny_rag import ANSWERS, QUESTIONS, tiny_rag


def test_flop_are_those_of_the_matrix_products_of_a_step():
    rag = tiny_rag()
    batch = rag.batch(rag.examples(QUESTIONS, ANSWERS), [0])  # one question: nothing of it is padded
    with FlopCounterMode(display=False) as counter:
        output = rag(batch, marginal="sequence")
        output.nll.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(flop for operation, flop in counts.items() if "mm" in str(operation) and "bmm" not in str(operation))
    expected = training_flop(
        weights_by_tokens(rag.question_encoder, rag.generator_model), int(batch.question_mask.sum()),
        int(output.context_tokens), int(batch.target_mask.sum()) * rag.n_docs,
    )  # fmt: skip
    # DPR's projection sees one position a question, here it counts for all.
    assert abs(counted - expected) < 0.02 * expected


def test_a_matrix_that_does_not_learn_counts_two_thirds():
    rag = tiny_rag()
    everything = weights_by_tokens(rag.question_encoder, rag.generator_model)
    rag.generator_model.requires_grad_(False)
    frozen = weights_by_tokens(rag.question_encoder, rag.generator_model)
    assert frozen["question"] == everything["question"]
    assert frozen["context"] == pytest.approx(everything["context"] * 2 / 3)


def test_a_matrix_of_4_bits_counts_by_its_sides():
    """bitsandbytes keeps two of its weights in a byte."""
    layer = torch.nn.Linear(6, 4)
    layer.weight = torch.nn.Parameter(torch.zeros((12, 1), dtype=torch.uint8), requires_grad=False)
    assert throughput._worth(layer) == 24 * 2 / 3


def test_adapted_projections_of_contexts_run_over_the_contexts():
    rag = tiny_rag()
    rag.generator_model.requires_grad_(False)
    frozen = weights_by_tokens(rag.question_encoder, rag.generator_model)
    add_lora(rag.generator_model, Lora(rank=1, alpha=1, dropout=0, target_modules=["k_proj"], base="fp32"))
    adapted = weights_by_tokens(rag.question_encoder, rag.generator_model)
    assert all(adapted[kind] > frozen[kind] for kind in ("context", "answer"))


def test_distinct_share_is_that_of_a_set():
    for rows in ([[3, 1, 1], [3, 2, -1]], [[0, 0, 0], [0, 0, 0]], [[-1, -1, -1]], [[4, 5, 6]]):
        present = [row for some in rows for row in some if row >= 0]
        assert distinct_share(torch.tensor(rows)).item() == pytest.approx(len(set(present)) / max(1, len(present)))


def test_gaps_count_closed_pairs_only_and_the_rate_leaves_random_numbers_alone():
    gaps = DeviceGaps(torch.device("cpu"))
    gaps.close()
    assert gaps.seconds() == 0
    gaps.open()
    gaps.close()
    gaps.close()
    assert len(gaps.gaps) == 1 and gaps.seconds() >= 0
    state = torch.get_rng_state()
    assert matrix_rate(torch.device("cpu"), torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("silent", [False, True])
def test_every_ranks_gpu_use_and_their_mean(monkeypatch, silent):
    monkeypatch.setattr(throughput, "gpu_use", lambda device: {"gpu_utilization": 80.0, "gpu_memory": 50.5})
    monkeypatch.setattr(ranks, "world", lambda: 2)
    other = [-100, -100] if silent else [4000, 7050]
    monkeypatch.setattr(ranks, "gathered", lambda numbers: [numbers, other])
    found = throughput.gpu_use_of_ranks(torch.device("cuda"))
    if silent:
        assert found == {
            "gpu_utilization": 80.0, "gpu_utilization_rank_0": 80.0, "gpu_memory": 50.5, "gpu_memory_rank_0": 50.5,
        }  # fmt: skip
    else:
        assert found["gpu_utilization"] == 60.0 and found["gpu_memory"] == 60.5
        assert (found["gpu_utilization_rank_1"], found["gpu_memory_rank_1"]) == (40.0, 70.5)
    monkeypatch.setattr(ranks, "world", lambda: 1)
    assert throughput.gpu_use_of_ranks(torch.device("cuda")) == {"gpu_utilization": 80.0, "gpu_memory": 50.5}
