"""Gradients in buckets: the sums over ranks that were there before, begun within the last backward pass, always in order."""

from functools import partial

import pytest
import torch

from stages.compute import ranks
from stages.packed import cuda_graphs
from stages.training import gradient_sums
from stages.training.gradient_sums import GradientSums
from tests.tiny_rag import ANSWERS, QUESTIONS, tiny_rag


class Begun:
    """A sum with another rank that has the same gradients."""

    def __init__(self, values):
        self.values = values

    def wait(self):
        self.values.mul_(2)


@pytest.fixture
def sent(monkeypatch):
    """The sizes of what was sent, in place of other ranks."""
    sizes = []

    def begin_sum(values):
        sizes.append(len(values))
        return Begun(values)

    monkeypatch.setattr(ranks, "begin_sum", begin_sum)
    return sizes


def numbers(*sizes, dtype=torch.float):
    return [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]


def test_buckets_are_of_one_part_and_one_type(monkeypatch):
    monkeypatch.setattr(gradient_sums, "BUCKET", 10)
    some, others = numbers(4, 6, 1, 30, 2) + numbers(2, dtype=torch.bfloat16), numbers(3)
    others.append(torch.nn.Parameter(torch.ones(5), requires_grad=False))
    sums = GradientSums([some, others])
    assert [[one.numel() for one in bucket.views] for bucket in sums.buckets] == [[4, 6], [1], [30], [2], [2], [3]]
    assert [bucket.flat.dtype for bucket in sums.buckets] == [one.dtype for one in (*some[:4], some[5], others[0])]
    assert others[1].grad is None
    for bucket in sums.buckets:
        for parameter in bucket.views:
            assert parameter.grad.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
            assert parameter.grad.data_ptr() % 16 == bucket.flat.data_ptr() % 16
    turned = torch.nn.Parameter(torch.ones(2, 3).t())
    GradientSums([[turned]])
    assert turned.grad.shape == (3, 2) and turned.grad.stride() == turned.stride()


def test_many_small_gradients_are_cut_in_one_pass():
    asked = []

    class Small:
        dtype = torch.float32

        def numel(self):
            asked.append(self)
            return 10

    small = [Small() for _ in range(3000)]
    assert list(gradient_sums.cut(small)) == [small] and len(asked) <= 2 * len(small)


def test_in_the_last_pass_what_is_complete_is_sent_in_order(monkeypatch, sent):
    monkeypatch.setattr(gradient_sums, "BUCKET", 1)
    first, second, third = parameters = numbers(64, 128, 192)
    sums = GradientSums([parameters])
    sum(one.sum() for one in parameters).backward()
    assert not sent
    sums.last_pass()
    second.sum().backward()
    assert not sent  # the first one comes before it on all ranks
    first.sum().backward()
    assert sent == [64, 128]
    with pytest.raises(AssertionError, match="behind its sum"):
        second.sum().backward()
    sums.finish()
    assert sent == [64, 128, 192]
    assert [float(one.grad[0]) for one in (first, third)] == [4, 2]
    sums.zero()
    assert not any(one.grad.any() for one in parameters)
    for one in parameters:
        one.sum().backward()
    sums.finish()
    assert sent == 2 * [64, 128, 192] and all(torch.equal(one.grad, 2 * torch.ones_like(one)) for one in parameters)


def test_what_nobody_needed_is_not_sent_and_weighs_nothing(monkeypatch, sent):
    """AdamW lets a weight decay whose gradient is zero, not one without."""
    monkeypatch.setattr(gradient_sums, "BUCKET", 64)
    used, idle, alone = parameters = numbers(4, 5, 64)
    sums = GradientSums([parameters])
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    for needed in ([used], [used, idle], [alone]):
        before = [one.detach().clone() for one in parameters]
        sums.last_pass()
        sum(one.sum() for one in needed).backward()
        sums.finish()
        assert [one.grad is not None for one in parameters] == [one in set(needed) for one in parameters]
        optimizer.step()
        sums.zero()
        moved = [not torch.equal(one, old) for one, old in zip(parameters, before, strict=True)]
        assert moved == [one in set(needed) for one in parameters]
    assert sent == [128, 128, 64]


def test_a_gradient_that_somebody_else_put_there_is_sent_too(sent):
    """CUDA graphs that were recorded before add to their own buffers."""
    cleared, replaced = numbers(2, 3)
    sums = GradientSums([[cleared, replaced]])
    views = cleared.grad, replaced.grad
    (cleared.sum() + replaced.sum()).backward()
    cleared.grad, replaced.grad = None, torch.full((3,), 5.0)
    sums.finish()
    assert (cleared.grad, replaced.grad) == views
    assert not cleared.grad.any() and replaced.grad.tolist() == [10, 10, 10]


def test_gradients_of_a_working_copy_come_when_they_were_handed_over(sent):
    rag = tiny_rag()
    rag.work_in(torch.bfloat16)
    sums = GradientSums.of(rag)
    arrived, handed_over = sums.arrived, []

    def watched(parameters):
        handed_over.extend(bool(one.grad.any()) for one in parameters)
        arrived(parameters)

    sums.arrived = watched
    sums.last_pass()
    rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), [0, 1]), marginal="sequence").nll.sum().backward()
    assert all(handed_over) and len(handed_over) == len(list(rag.parameters())) and len(sent) == len(sums.buckets)
    assert all(computed.grad is None for computed in rag.working.copies)


def test_afterwards_nothing_is_left(sent):
    rag = tiny_rag()
    sums = GradientSums.of(rag)
    sums.close()
    assert all(parameter.grad is None for parameter in rag.parameters())
    rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), [0]), marginal="sequence").nll.sum().backward()
    assert not sums.seen and any(parameter.grad is not None for parameter in rag.parameters())


def test_loss_scaling_drops_and_takes_steps_as_ever(sent):
    [weight] = numbers(3)
    sums = GradientSums([[weight]])
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected, scale in ((1.0, -1.0, 4.0), (float("inf"), -1.0, 2.0), (0.5, -2.0, 2.0)):
        sums.last_pass()
        scaler.scale((weight * factor).sum()).backward()
        sums.finish()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        sums.zero()
        assert weight.tolist() == [expected] * 3 and scaler.get_scale() == scale


class Replayed:
    """A CUDA graph's stand-in on a CPU: computes anew, out of autograd's sight, what a graph would."""

    def __init__(self, compute):
        self.replay = compute


def record(graphs, filled, label_smoothing):
    """As CudaGraphs._record, whose graphs need a GPU."""
    inputs = [tensor.clone() for tensor in filled.tensors()]
    static = filled.of_tensors(inputs)
    kept = {}

    @torch.enable_grad()
    def forward():
        kept["log_probs"] = graphs.log_probs(static, label_smoothing)
        log_probs.copy_(kept["log_probs"].detach())

    def backward():
        read = [graphs.computed[place] for place in graphs.gradients]
        torch._foreach_add_(
            list(graphs.gradients.values()), list(torch.autograd.grad(kept["log_probs"], read, gradient))
        )

    computed = graphs.log_probs(static, label_smoothing)
    if not graphs.graphs:
        graphs.take_gradients(torch.autograd.grad(computed, graphs.computed, torch.ones_like(computed)))
    log_probs, gradient = computed.detach().clone(), torch.zeros_like(computed)
    return cuda_graphs._Graph(inputs, log_probs, gradient, Replayed(forward), Replayed(backward))


def record_graphs(rag) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda: None)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        rag.record_graphs()
    rag.packed.graphs._record = partial(record, rag.packed.graphs)


def replayed(rag, rows) -> dict:
    rag(rag.batch(rag.examples(QUESTIONS, ANSWERS), rows), marginal="sequence").nll.sum().backward()
    return {name: one.grad.clone() for name, one in rag.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.float])
def test_graphs_add_to_the_buckets_and_say_so(sent, dtype):
    rag = tiny_rag()
    if dtype:
        rag.work_in(dtype)
    record_graphs(rag)
    sums = GradientSums.of(rag)
    buffers = {id(view) for bucket in sums.buckets for view in bucket.views.values()}
    once = replayed(rag, [0, 1, 2])
    assert {id(one) for one in rag.packed.graphs.gradients.values()} <= buffers
    for _ in range(2):
        sums.zero()
        sums.last_pass()
        found = replayed(rag, [0, 1, 2])
        assert all(torch.equal(found[name], once[name]) and once[name].any() for name in once)
        assert len(sums.sent) == len(sums.buckets)
        sums.finish()
        assert all(torch.equal(one.grad, 2 * once[name]) for name, one in rag.named_parameters())
    assert rag.packed.graphs.calls == 3
