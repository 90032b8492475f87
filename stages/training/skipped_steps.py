"""Steps whose gradient is not finite: taken by no optimizer, counted, and too many in a row an error.

The flag of a step is a tensor on its device. On a GPU nobody waits for it: the optimizer's kernel reads it and leaves
weights and moments alone, and the counts are read where the host waits anyway (logged points, checkpoints), at the
latest after as many steps as may fail in a row.
"""

import json
from pathlib import Path

import torch


class Skips:
    """Counts of one training, kept in its Progress.

    `limit` in a row end it with a ValueError. `question_ids[row]` names the questions in `file`, which then holds the
    batches of the row of skipped steps; both may be left out. `overflow`: fp16's loss scaling looks for its scale by
    trying, so its skipped steps are counted apart; they end the training too where no scale helps.
    """

    def __init__(self, limit: int, question_ids: list[str] | None = None, file: Path | None = None):
        self.limit, self.question_ids, self.file = limit, question_ids, file
        self.overflow = False
        self._pending: list[tuple[int, list[int], torch.Tensor]] = []
        self._row: list[tuple[int, list[int]]] = []

    def note(self, step: int, rows: list[int], bad: torch.Tensor, progress) -> None:
        """A step over the questions `rows`, with its flag."""
        self._pending.append((step, rows, bad))
        if not bad.is_cuda or len(self._pending) >= self.limit:
            self.settle(progress)

    def settle(self, progress) -> None:
        """Reads the flags (on a GPU this waits) into `progress`; raises ValueError at `limit` in a row."""
        if not self._pending:
            return
        flags = torch.stack([bad for _, _, bad in self._pending]).tolist()
        for (step, rows, _), bad in zip(self._pending, flags, strict=True):
            if not bad:
                progress.skipped_in_a_row, self._row = 0, []
                continue
            progress.skipped_in_a_row += 1
            self._row.append((step, rows))
            if self.overflow:
                progress.overflow_steps += 1
            else:
                progress.skipped_steps += 1
        self._pending = []
        if progress.skipped_in_a_row >= self.limit:
            raise ValueError(self._message(progress))

    def _message(self, progress) -> str:
        first, last = self._row[0][0], self._row[-1][0]
        where = ""
        if self.file is not None:
            names = self.question_ids
            batches = [
                {"step": step, "questions": [names[row] if names else row for row in rows]} for step, rows in self._row
            ]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(batches, indent=1) + "\n", encoding="utf-8")
            where = f" (their questions: {self.file})"
        return (
            f"train.max_skipped_steps: the gradient was not finite in {progress.skipped_in_a_row} steps in a row, {first} to "
            f"{last}{where}; lower train.learning_rate, use precision fp32 or bf16, or look at these questions"
        )


def step_unless(bad: torch.Tensor, optimizer, scaled: bool) -> None:
    """Takes an optimizer step unless the flag `bad` is set; without waiting for a GPU where its kernel can skip.

    `optimizer` is accelerate's. `scaled`: loss scaling looks for infinities itself. torch's fused optimizers skip by
    the attribute that GradScaler sets (torch/amp/grad_scaler.py, `_step_supports_amp_scaling`).
    """
    inner = optimizer.optimizer
    if scaled:
        optimizer.step()
    elif getattr(inner, "_step_supports_amp_scaling", False):
        inner.found_inf = bad.float()
        try:
            optimizer.step()
        finally:
            del inner.found_inf
    elif not bad:
        optimizer.step()
