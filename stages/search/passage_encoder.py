"""The context encoder where it trains too, and every passage as it reads it: vectors with a gradient, and all vectors.

Passages are tokenized once; a training step encodes those that it retrieved, a refresh of the index all of them.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stages.corpus.token_store import TokenStore
from stages.encoders.encoder import Encoder, padded_rows
from stages.packed.packing import Packing
from stages.search.passage_index import PassageIndex, describe_index, flat_index, write_index
from stages.storage import manifest

BATCH_TOKENS = {"cpu": 8192, "cuda": 32768}
PASSAGES_A_TURN = 1024  # encoded between two looks at whether anybody still wants them


class PassageEncoder:
    """A context encoder and the token ids of all N passages, in the host's memory."""

    def __init__(self, encoder: Encoder, tokens: TokenStore):
        self.encoder, self.tokens = encoder, tokens
        self.packed = encoder.without_padding()

    @property
    def device(self) -> torch.device:
        return next(self.encoder.model.parameters()).device

    def vectors(self, rows: Tensor) -> Tensor:
        """Vectors [B, K, d] of the passages `rows` [B, K], with gradient to the encoder.

        A missing passage (-1) gets some vector, to be masked.
        """
        wanted = rows.clamp(min=0).flatten()
        ids, mask = padded_rows(self.tokens, wanted, self.encoder.tokenizer.pad_token_id, self.device)
        packing = Packing.of(mask)
        return self.encoder.packed_vectors(packing.pack(ids), packing, self.packed).unflatten(0, rows.shape)

    def index(self, unwanted: Callable[[], bool] = lambda: False, progress: str = "") -> PassageIndex | None:
        """All passages, encoded and searchable, in the host's memory; None as soon as `unwanted` says so.

        The encoder must be in evaluation mode.
        """
        made = flat_index(len(self.tokens), self.encoder.dimension)
        turns = range(0, len(self.tokens), PASSAGES_A_TURN)
        for start in tqdm(turns, desc=progress, unit=f" x {PASSAGES_A_TURN} passages", disable=not progress):
            if unwanted():
                return None
            turn = TokenStore(self.tokens.tokens, self.tokens.offsets[start : start + PASSAGES_A_TURN + 1])
            for first, rows in self.encoder.vectors(turn, BATCH_TOKENS[self.device.type], self.device):
                made.vectors[start + first : start + first + len(rows)] = torch.from_numpy(rows)
        return made

    def frozen(self) -> "PassageEncoder":
        """The same passages before a copy of the encoder: no training changes it, in evaluation mode, without gradient."""
        model = copy.deepcopy(self.encoder.model).eval().requires_grad_(False)
        return PassageEncoder(replace(self.encoder, model=model), self.tokens)

    def save(self, folder: Path) -> None:
        """Writes context_encoder/ and index/, the vectors of all passages by these weights and their index."""
        self.encoder.save(folder / "context_encoder")
        self.encoder.model.eval()
        made = self.index(progress="encode by the kept weights")
        (folder / "index").mkdir(parents=True, exist_ok=True)
        np.save(folder / "index" / "vectors.npy", made.vectors.numpy())
        manifest.record(folder / "index" / "vectors.npy")
        write_index(made.index, folder / "index")
        facts = {"factory": "Flat", "passages": len(self.tokens), "dimension": self.encoder.dimension}
        describe_index(folder / "index", facts, folder / "index")
