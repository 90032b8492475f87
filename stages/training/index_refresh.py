"""An index that follows its context encoder: all passages encoded anew every N steps, beside the steps.

As in REALM (Guu et al. 2020, arXiv:2002.08909, section 3.3) and RAG-end2end (Siriwardhana et al. 2023,
arXiv:2210.02627) the search runs over older vectors, while the scores of what it finds are computed anew and carry the
gradient. Theirs come into use whenever they are ready, ours at a step that is known before: the vectors of the weights
of step s from step s + N on. So a training is the same however long the encoding takes, and goes on the same after a
kill.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from stages.rag.model import Rag
from stages.search.passage_index import PassageIndex
from stages.storage.checkpoints import load_weights, own_weights

SNAPSHOT = "snapshot-"


def check_ranks(every: int, ranks: int) -> None:
    """Raises ValueError where the passages' vectors were to be refreshed on several ranks."""
    if every and ranks > 1:
        raise ValueError(
            f"train.index_refresh_steps: {every}, but {ranks} processes train and only one alone can refresh its vectors; use "
            "runtime.processes: 1 or set train.index_refresh_steps to 0"
        )


class Refresh:
    """Gives a training's search new vectors every `every` steps, up to step `last`; 0: never.

    At most two sets of vectors exist at a time: those in use and those being made. Beside them, in the host's memory,
    the weights that each was made of, which a checkpoint keeps; on the device, a copy of the encoder.
    """

    def __init__(self, rag: Rag, every: int, last: int):
        self.rag, self.every, self.last = rag, every, last
        self.snapshots: dict[int, dict[str, Tensor]] = {}  # by their step
        self.making: Future[PassageIndex] | None = None
        self.unwanted = threading.Event()
        if every:
            self.copy = rag.passage_encoder.frozen()
            self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refresh")
            # No lower priority than that of torch's own stream exists; with a stream each, their kernels take turns.
            self.stream = torch.cuda.Stream(self.copy.device) if self.copy.device.type == "cuda" else None

    def after(self, step: int) -> dict[str, float]:
        """To be called behind every step: at each N-th one the vectors begun N steps ago come into use, new ones begin.

        Returns what to log: `refresh_wait`, the seconds that the training had to wait for them.
        """
        if not self.every or step % self.every:
            return {}
        measured = {}
        if self.making:
            started = time.perf_counter()
            self._use(step - self.every)
            waited = time.perf_counter() - started
            tqdm.write(f"step {step}: passage vectors of step {step - self.every} from here on, waited {waited:.1f} s")
            measured = {"refresh_wait": waited}
        if step + self.every <= self.last:  # else they would never be used
            self._begin(step, own_weights(self.rag.passage_encoder.encoder.model))
        return measured

    def tensors(self) -> dict[str, Tensor]:
        """The weights that the vectors in use and in the making are made of, for a checkpoint."""
        return {
            f"{SNAPSHOT}{step}/{name}": value for step, held in self.snapshots.items() for name, value in held.items()
        }

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Goes on behind this step with what `tensors` gave there: the vectors are made again, those in use at once."""
        snapshots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            taken, _, name = key.removeprefix(SNAPSHOT).partition("/")
            snapshots.setdefault(int(taken), {})[name] = value
        for taken, weights in sorted(snapshots.items()):
            self._begin(taken, weights)
            if taken + self.every <= step:
                tqdm.write(f"passage vectors of step {taken} are made again")
                self._use(taken)

    def close(self) -> None:
        """Ends the encoding that nobody waits for any more."""
        self.unwanted.set()
        if self.every:
            self.thread.shutdown()
            self.making = None

    def _begin(self, step: int, weights: dict[str, Tensor]) -> None:
        self.snapshots[step] = weights
        if self.stream:
            # Vectors that went out of use give their memory to this stream: not before the last search has read them.
            self.stream.wait_stream(torch.cuda.current_stream(self.copy.device))
        self.making = self.thread.submit(self._make, weights)

    def _make(self, weights: dict[str, Tensor]) -> PassageIndex | None:
        with torch.cuda.stream(self.stream):
            load_weights(self.copy.encoder.model, weights)
            made = self.copy.index(self.unwanted.is_set)
            made = made and made.to(self.copy.device)
        if self.stream:
            self.stream.synchronize()
        return made

    def _use(self, step: int) -> None:
        """Waits for the vectors of this step's weights and searches them from here on."""
        self.rag.index, self.making = self.making.result(), None
        self.snapshots = {taken: held for taken, held in self.snapshots.items() if taken >= step}
