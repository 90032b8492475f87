"""Exact search by inner product: one matrix product over all vectors, which at 200,000 passages takes a GPU half a ms.

The scan reads a bf16 copy (half the memory, twice the speed) and only proposes; every answer rests on fp32 scores.
"""

import torch
from torch import Tensor

SCORES_A_CHUNK = 1 << 26  # fp32 scores held at once, 256 MiB: 32 questions x 21 million passages would take 2.7 GB
ROWS_A_COPY = 1 << 18
CANDIDATES = (64, 1024)  # beside the wanted number: tried in this order before everything is read in fp32


class ExactSearch:
    """The best passages by fp32 inner product, from a bf16 copy of the vectors on `device`.

    `vectors` [N, d] fp32 may stay elsewhere (memory-mapped on the host): only the candidates' rows are read from it.
    Vectors that are bf16 on `device` already are searched as they are, without a copy of them.

    What is guaranteed: the rows are the top k of the fp32 scores, up to the order of scores that differ by less than
    fp32 rounding. Rounding to bf16 moves a score by at most |q| |v - bf16(v)| + |q - bf16(q)| |bf16(v)| (Cauchy-
    Schwarz). Candidates suffice where the k-th best fp32 score exceeds the last candidate's bf16 score by that bound:
    no other passage can reach it. Where it does not, more candidates are taken, in the end all passages in fp32.
    """

    def __init__(self, vectors: Tensor, device: torch.device):
        self.vectors = vectors
        rounded_already = vectors.dtype == torch.bfloat16
        if rounded_already:
            self.scan = vectors.to(device)
        else:
            self.scan = torch.empty(vectors.shape, dtype=torch.bfloat16, device=device)
        largest, error = [torch.zeros((), device=device)], [torch.zeros((), device=device)]
        for first in range(0, len(vectors), ROWS_A_COPY):
            exact = vectors[first : first + ROWS_A_COPY].to(device)
            rounded = exact.bfloat16()
            if not rounded_already:
                self.scan[first : first + len(exact)] = rounded
            largest.append(rounded.float().norm(dim=1).max())
            error.append((exact - rounded.float()).norm(dim=1).max())
        self.largest, self.error = torch.stack(largest).max(), torch.stack(error).max()

    @torch.no_grad()
    def search(self, questions: Tensor, k: int) -> Tensor:
        """Rows [B, min(k, N)] int64, best first, for questions [B, d] on the scan's device."""
        with torch.autocast(questions.device.type, enabled=False):
            questions = questions.float()
            k = min(k, len(self.vectors))
            rows = torch.empty(len(questions), k, dtype=torch.int64, device=questions.device)
            open_questions = torch.arange(len(questions), device=questions.device)
            for more in CANDIDATES:
                found, certain = self._from_candidates(questions[open_questions], k, more)
                rows[open_questions] = found
                open_questions = open_questions[~certain]
                if not len(open_questions):
                    return rows
            rows[open_questions] = exact_scan(questions[open_questions], self.vectors, k)[1]
            return rows

    def _from_candidates(self, questions: Tensor, k: int, more: int) -> tuple[Tensor, Tensor]:
        """Rows [B, k] and, for each question, whether they are certainly the best [B]."""
        rounded = questions.bfloat16()
        wanted = min(k + more, len(self.vectors))
        scores, candidates = _top(rounded, self.scan, wanted)
        read = self.vectors[candidates.to(self.vectors.device)].to(questions.device)
        exact, order = fp32_scores(questions, read).sort(dim=1, descending=True, stable=True)
        bound = questions.norm(dim=1) * self.error + (questions - rounded.float()).norm(dim=1) * self.largest
        # Both sums are rounded in fp32 on their way: d terms, each far below one millionth of |q| |v|.
        bound = bound + 1e-5 * questions.norm(dim=1) * self.largest
        certain = exact[:, k - 1] >= scores[:, -1] + bound
        if wanted == len(self.vectors):
            certain = torch.ones_like(certain)
        return candidates.gather(1, order[:, :k]), certain


def exact_scan(questions: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """fp32 scores and rows [B, min(k, N)] of the best passages, best first; `vectors` [N, d] are read in chunks.

    Questions [B, d] say on which device; TF32 stays off, whatever the setting.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return _top(questions.float(), vectors, min(k, len(vectors)))
    finally:
        torch.set_float32_matmul_precision(precision)


def fp32_scores(questions: Tensor, passages: Tensor) -> Tensor:
    """Inner products [B, K] of [B, d] and [B, K, d] in true fp32.

    Not by einsum: its matrix product runs in TF32 where that is allowed, ten bits of mantissa, a sixteenth of a nat at 64.
    """
    return (questions[:, None] * passages).sum(-1)


def _top(questions: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """fp32 scores and rows [B, k] of the best of all `vectors`, in chunks that fit SCORES_A_CHUNK."""
    size = max(k, SCORES_A_CHUNK // max(1, len(questions)))
    best = rows = None
    for first in range(0, len(vectors), size):
        scores = _scores(questions, vectors[first : first + size].to(questions.device))
        values, found = scores.topk(min(k, scores.shape[1]), dim=1)
        found = found + first
        if best is not None:
            values, found = torch.cat([best, values], 1), torch.cat([rows, found], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            found = found.gather(1, order)
        best, rows = values, found
    return best, rows


def _scores(questions: Tensor, vectors: Tensor) -> Tensor:
    """fp32 scores [B, N], summed in fp32 also where both are bf16: at 64 to 128 a bf16 sum is half a nat off."""
    if questions.dtype == torch.bfloat16 and questions.is_cuda:
        return torch.mm(questions, vectors.T, out_dtype=torch.float32)
    return questions.float() @ vectors.float().T
