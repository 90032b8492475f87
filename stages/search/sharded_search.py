"""Exact search over vectors that are dealt out over the ranks' GPUs: for a corpus that is too large for each of them.

A search is a meeting: every rank brings its questions, each searches its own part of the vectors for all of them, and the
best of all parts by fp32 score are the best of the whole. Ranks may have unequally many searches, or run out of memory
between two: who has no more comes to `finish` and searches for the others until nobody has.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from stages.compute import ranks
from stages.compute.exact_search import ExactSearch, fp32_scores

NO_MORE = -1


class ShardedSearch:
    """Like ExactSearch over `vectors` [N, d], with 1/world of the bf16 copy on each rank's `device`.

    All ranks hold the same `vectors` (memory-mapped), or each its own part of them and no rank the whole. There are at
    least as many vectors as ranks.
    """

    def __init__(self, vectors: Tensor, device: torch.device, first: int | None = None):
        """`first`: the vectors are this rank's part alone, from that row of the whole on; see `part_of`."""
        if first is None:
            rows = part_of(len(vectors))
            first, vectors = rows.start, vectors[rows.start : rows.stop]
        self.part, self.first, self.device = ExactSearch(vectors, device), first, device

    def search(self, questions: Tensor, k: int) -> Tensor:
        """Rows [B, k] int64, best first, -1 where there is none; waits for every other rank's search or `finish`."""
        return self._meet(questions.detach().float(), k)

    def finish(self) -> None:
        """Takes part in the others' searches until every rank is here."""
        nothing = torch.zeros(0, self.part.vectors.shape[1], device=self.device)
        while self._meet(nothing, NO_MORE) is not None:
            pass

    @torch.no_grad()
    def _meet(self, questions: Tensor, k: int) -> Tensor | None:
        """The best rows for this rank's questions, or None where no rank has any."""
        counts, wanted = zip(*ranks.gathered([len(questions), k]), strict=True)
        k = max(wanted)
        if k == NO_MORE:
            return None
        mine = slice(sum(counts[: ranks.rank()]), sum(counts[: ranks.rank() + 1]))
        with torch.autocast(self.device.type, enabled=False):
            padded = torch.nn.functional.pad(questions, (0, 0, 0, max(counts) - len(questions)))
            everyone = torch.cat([asked[:count] for asked, count in zip(_all(padded), counts, strict=True)])
            rows = self.part.search(everyone, k)
            scores = fp32_scores(everyone, self.part.vectors[rows.to(self.part.vectors.device)].to(self.device))
            missing = (0, k - rows.shape[1])
            scores = torch.nn.functional.pad(scores, missing, value=float("-inf"))
            rows = torch.nn.functional.pad(rows + self.first, missing, value=-1)
            found = (
                torch.cat([part[mine] for part in _all(scores)], 1),
                torch.cat([part[mine] for part in _all(rows)], 1),
            )
            order = found[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
            return found[1].gather(1, order)


def part_of(count: int) -> range:
    """The rows of `count` vectors that this rank holds."""
    return range(count * ranks.rank() // ranks.world(), count * (ranks.rank() + 1) // ranks.world())


def _all(own: Tensor) -> list[Tensor]:
    """Every rank's tensor of this shape, in the order of the ranks."""
    parts = [torch.empty_like(own) for _ in range(ranks.world())]
    dist.all_gather(parts, own.contiguous())
    return parts
