"""Gradients of an update on two ranks over gloo: bit for bit those that are summed plainly, begun early or not."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stages.compute import ranks
from stages.generation.lora import add_lora
from stages.settings.retrieval import Lora
from stages.training import gradient_sums
from stages.training.progress import Window
from stages.training.recipes import Update
from stages.training.trainer import Trainer
from tests.compute.test_ranks import done, start
from tests.rag.test_families import rag_of
from tests.tiny_rag import ANSWERS, NEW, QUESTIONS, SETTINGS, TOGETHER, reranked_rag
from tests.training.test_gradient_sums import record_graphs, replayed


def rag_for(case: dict):
    rag = reranked_rag() if case.get("reranked") else rag_of(case.get("generator", "bart"))
    if case.get("lora"):
        add_lora(rag.generator_model, Lora(rank=2, alpha=4, dropout=0.0, target_modules=None, base="fp32"))
    if case.get("copy"):
        rag.work_in(torch.bfloat16)
    if graphs := case.get("graphs"):
        record_graphs(rag)
        if graphs == "recorded before":
            replayed(rag, [0])
            rag.zero_grad()
    return rag


CASES = {
    "one pass": {"questions": 8, "batch_size": 4},
    "several passes, found together": {"questions": 9, "batch_size": 2},
    "a rank without questions": {"questions": 1, "batch_size": 1},
    "one pass more on one rank": {"questions": 3, "batch_size": 1},
    "graphs": {"questions": 9, "batch_size": 2, "graphs": "recorded in the update"},
    "graphs of a copy": {"questions": 8, "batch_size": 4, "copy": True, "graphs": "recorded in the update"},
    "graphs with buffers of their own": {"questions": 9, "batch_size": 2, "graphs": "recorded before"},
    "padded": {"questions": 8, "batch_size": 2, "generator": "t5"},
    "decoder-only, bf16 copy": {"questions": 8, "batch_size": 2, "generator": "llama", "copy": True},
    "bf16 copy, computed again": {"questions": 8, "batch_size": 4, "copy": True, "again": True},
    "adapters": {"questions": 8, "batch_size": 4, "generator": "llama", "lora": True},
    "reranker and prior": {"questions": 8, "batch_size": 2, "reranked": True},
    "read together": {"questions": 8, "batch_size": 2, "recipe": TOGETHER},
    "known positives": {"questions": 9, "batch_size": 2, "golds": True},
    "no gradient to the retriever": {"questions": 8, "batch_size": 4, "recipe": {"retriever_gradient": "none"}},
    "memory runs out behind the first sums": {"questions": 8, "batch_size": 4, "fails": True},
}


def gradients(case: dict, overlapped: bool) -> tuple[dict, int]:
    """What an update's gradients are before the clipping, and how many sums at least were begun within a backward pass."""
    rag = rag_for(case)
    settings = SETTINGS.model_copy(
        update={
            "batch_size": case["batch_size"],
            "gradient_checkpointing": "again" in case,
            "positives_weight": float("golds" in case),
        }
    )
    trainer = Trainer(rag, NEW.model_copy(update=case.get("recipe", {})), settings, "no", 7, None)
    rag.train()
    early = []
    if overlapped:
        finish = trainer.accumulation.sums.finish
        trainer.accumulation.sums.finish = lambda: early.append(len(trainer.accumulation.sums.sent)) or finish()
    else:
        trainer.accumulation.sums.close()
        trainer.accumulation.sums = None
    rows = list(range(case["questions"]))
    if "fails" in case and overlapped:
        fail_once(rag.question_encoder)
    elif "fails" in case:
        trainer.progress.micro_batch = 2
    golds = [[row] for row in range(len(QUESTIONS))] if "golds" in case else None
    trainer.accumulation.gradients(
        rag.examples(QUESTIONS, ANSWERS, golds=golds),
        Update([rows], len(rows), True),
        trainer.progress,
        Window.on(trainer.accelerator.device),
    )
    if not overlapped:
        sum_plainly(rag)
    assert "fails" not in case or trainer.progress.micro_batch == 2
    return {name: one.grad for name, one in rag.named_parameters() if one.grad is not None}, min(early, default=0)


def fail_once(module: torch.nn.Module) -> None:
    """On the last rank: when the gradient of a weight comes for the first time."""
    if ranks.rank() < ranks.world() - 1:
        return

    def fail(_):
        hook.remove()
        raise torch.OutOfMemoryError("out of memory, says the test")

    hook = next(module.parameters()).register_post_accumulate_grad_hook(fail)


def sum_plainly(rag) -> None:
    """One gradient after the other, when all are there."""
    for parameter in rag.parameters():
        if parameter.requires_grad and not ranks.least([int(parameter.grad is None)])[0]:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)


def compare(folder: Path) -> None:
    """Leaves the gradients that differ, and how many sums were begun early, of every case."""
    gradient_sums.BUCKET = 3000
    found = {}
    for name, case in CASES.items():
        expected, _ = gradients(case, overlapped=False)
        summed, early = gradients(case, overlapped=True)
        different = [one for one in expected.keys() | summed.keys() if not same(expected.get(one), summed.get(one))]
        found[name] = {"different": different, "early": early, "compared": len(expected)}
    (folder / f"compared-{ranks.rank()}.json").write_text(json.dumps(found))


def same(one, other) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


@pytest.mark.slow
def test_on_two_ranks_they_are_bit_for_bit_those_summed_plainly(tmp_path):
    done(start("gradients", tmp_path, 2))
    found = [json.loads((tmp_path / f"compared-{rank}.json").read_text()) for rank in range(2)]
    for name in CASES:
        assert [one[name]["different"] for one in found] == [[], []], name
        assert all(one[name]["compared"] > 4 for one in found), name
        early = [one[name]["early"] for one in found]
        assert early[0] > 0 and (early[1] > 0) == (name != "a rank without questions"), name
