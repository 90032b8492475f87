"""The gradients of one update: its forward and backward passes, cut up anew where memory runs out.

An update is a sum over its questions (recipes.py), so that passes of any size, on any rank, add up to the same.
"""

import math

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tqdm import tqdm

from stages.compute import ranks
from stages.compute.out_of_memory import SingleQuestion, free_memory, halved, is_out_of_memory, split
from stages.corpus.epochs import epoch_shares
from stages.rag.ahead import finds_ahead, found_ahead
from stages.rag.batches import Examples
from stages.rag.found_once import FoundOnce
from stages.rag.model import Rag
from stages.settings.runs import Recipe, Train
from stages.storage import checkpoints as checkpointing
from stages.training import fsdp
from stages.training.gradient_sums import GradientSums
from stages.training.progress import Progress, Window
from stages.training.recipes import Update

FOUND_AHEAD = 64  # questions encoded at once for the forward passes of an update: little beside a generator's contexts


class Accumulation:
    """What turns an update's questions into gradients of a Rag.

    `model` is `rag` as `accelerator` has prepared it, `optimizer` that of its weights.
    """

    def __init__(
        self, rag: Rag, model: torch.nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator, recipe: Recipe,
        settings: Train, seed: int,
    ):  # fmt: skip
        self.rag, self.model, self.optimizer, self.accelerator = rag, model, optimizer, accelerator
        self.recipe, self.settings, self.seed = recipe, settings, seed
        self.sharded = fsdp.is_sharded(rag)
        # A sharded model's gradients are sums already.
        self.sums = GradientSums.of(rag) if ranks.world() > 1 and not self.sharded else None
        self.once: FoundOnce | None = None  # the passages of the training questions, where they stay the same
        self.met = False  # whether no rank searches any more in the present update

    def gradients(self, training: Examples, update: Update, progress: Progress, window: Window) -> None:
        """The gradients of an update; where memory runs out, anew from zero in forward passes of half the size.

        Of a rank's share, and then the sums over the ranks; where one rank runs out of memory, all of them begin anew, or end
        where it had no room for a single question. With FSDP none begins anew, and who has fewer passes makes further ones
        that weigh nothing.
        """
        before, random = window.state(), checkpointing.random_state()
        drawn = self.settings.answers == "drawn"
        shares = epoch_shares(len(training), self.seed, update.epoch) if drawn else None
        while True:
            passes, groups = [], []
            failed = size = ranks.NOBODY
            self.met = False
            try:
                passes = split(self._share(update), progress.micro_batch)
                missing = fsdp.missing_passes(self.rag, len(passes))
                groups = self._together(passes, progress)
                for group in groups:
                    self.add(training, group, shares, update.divisor, window, group is groups[-1])
                for _ in range(missing):
                    self.add(training, [update.rows[:1]], shares, math.inf, Window.on(self.accelerator.device))
            except (RuntimeError, MemoryError) as error:
                if self.sharded or not (self.settings.halve_on_oom and is_out_of_memory(error)):
                    raise
                failed = max(map(len, passes))
                # A single question may fit where others' vectors are not kept beside it.
                size = halved(failed) if failed > 1 or len(groups) == len(passes) else 1
            self._meet()
            if self.sums:  # who failed takes part: others may have begun
                self.sums.finish()
            failed, size = ranks.least([failed, size])
            if size == ranks.NOBODY:
                return
            if not size:
                raise SingleQuestion
            self.zero_grad()
            free_memory()
            window.restore(before, self.accelerator.device)
            checkpointing.set_random_state(random)
            note_halving(progress, failed, size)

    def _meet(self) -> None:
        """Once an update, behind its last search: no rank has any more from here on."""
        if not self.met:
            self.rag.index.finish_searches()
        self.met = True

    def zero_grad(self) -> None:
        (self.sums.zero if self.sums else self.optimizer.zero_grad)()

    def _share(self, update: Update) -> list[list[int]]:
        """The forward passes of this rank: a share of the update's questions, batch_size together."""
        if ranks.world() == 1:
            return update.micro_batches
        return split([ranks.share(update.rows)], self.settings.batch_size)

    def _together(self, passes: list[list[int]], progress: Progress) -> list[list[list[int]]]:
        """The forward passes in groups whose questions are encoded and searched for at once, FOUND_AHEAD at most.

        Not where memory ran out, nor where the recipe forwards one question at a time on purpose.
        """
        each = self.recipe.reading == "each" and self.recipe.batching == "true_batches"
        ahead = each and finds_ahead(self.rag) and progress.micro_batch is None
        size = max(1, FOUND_AHEAD // max(map(len, passes), default=1)) if ahead else 1
        return [passes[first : first + size] for first in range(0, len(passes), size)]

    def add(
        self, training: Examples, passes: list[list[int]], shares: torch.Tensor | None, divisor: float, window: Window,
        last: bool = False,
    ) -> None:  # fmt: skip
        """Adds the gradients of these forward passes, of which all but one want `finds_ahead`; `last` of the update."""
        if window.waits.opened is None:
            window.waits.open()
        questions = [row for rows in passes for row in rows]
        batch = self.rag.batch(training, questions, shares)
        window.waits.close()
        ends = []
        with self.accelerator.autocast():
            known = self.once and self.once.of(self.rag, batch, questions)
            parts = [(batch, known)]
            if len(passes) > 1:
                sizes = [len(rows) for rows in passes]
                ends, parts = found_ahead(self.rag, batch, sizes, self.recipe.retriever_gradient, known)
        for part, found in parts:
            output = self.model(
                part,
                marginal=self.recipe.marginalization,
                retriever_gradient=self.recipe.retriever_gradient,
                label_smoothing=self.settings.label_smoothing,
                reading=self.recipe.reading,
                found=found,
            )
            loss = output.nll.sum()
            if output.retriever_loss is not None:
                loss = loss + output.retriever_loss.sum()
            if output.gold_nll is not None:
                loss = loss + self.settings.positives_weight * output.gold_nll.sum()
            if self.sums and last and part is parts[-1][0]:
                self._meet()  # on GPUs searches and sums share NCCL, where every rank must have them in the same order
                self.sums.last_pass()
            self.accelerator.backward(loss / divisor)
            window.add(part, output)
        reached = [(before, cut.grad) for before, cut in ends if cut.grad is not None]
        if reached:
            torch.autograd.backward(*zip(*reached, strict=True))
        window.waits.open()

    def close(self) -> None:
        if self.sums:
            self.sums.close()


def note_halving(progress: Progress, failed: int, size: int) -> None:
    """Keeps to passes of `size` questions from here on, and says so."""
    progress.micro_batch = size
    step = progress.step + 1
    progress.halvings.append(f"step {step}: {failed} -> {size}")
    if ranks.is_main():
        tqdm.write(
            f"out of memory at step {step} with {failed} questions a forward pass: {size} from here on, the same update "
            f"in more passes (train.batch_size: {size} saves the attempt)"
        )
