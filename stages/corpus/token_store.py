"""Ragged rows of token ids, written once and gathered on the device: nothing is tokenized twice."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.storage import manifest


@dataclass
class TokenStore:
    """Ragged rows of token ids: row i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: Tensor  # flat; int32 or narrower
    offsets: Tensor  # [N + 1] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to(self, device: torch.device | str) -> "TokenStore":
        return TokenStore(self.tokens.to(device), self.offsets.to(device))

    @classmethod
    def from_rows(cls, rows: list[list[int]]) -> "TokenStore":
        lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64)
        flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum()))
        return cls(torch.from_numpy(flat), lengths.cumsum(0))

    @classmethod
    def open(cls, folder: Path, stage: str = "tokens") -> "TokenStore":
        """Memory-maps `tokens.npy` and `offsets.npy`, which `stage` wrote: 21 million passages need no memory until read."""
        for name in ("tokens.npy", "offsets.npy"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: not found; run `dvc repro` (or python -m stages.{stage}) first")
        manifest.check(folder, ("tokens.npy", "offsets.npy"), f"run `dvc repro --force {stage}`")
        try:
            tokens = np.load(folder / "tokens.npy", mmap_mode="c", allow_pickle=False)
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{folder}: damaged ({error}); run `dvc repro --force {stage}`") from None
        if offsets[-1] != len(tokens):
            raise ValueError(f"{folder}: tokens.npy is cut short; run `dvc repro --force {stage}`")
        return cls(torch.from_numpy(tokens), torch.from_numpy(offsets))

    def padded(self, rows: Tensor, limit: int, pad: int) -> tuple[Tensor, Tensor]:
        """The named rows cut to `limit` tokens and right-padded: ids [R, limit'] and lengths [R], where the tokens are.

        `rows` lie where the offsets are. With offsets on the host and tokens on a GPU the host never waits: the width,
        which shapes all else, is known without asking the device.
        """
        starts = self.offsets[rows]
        lengths = (self.offsets[rows + 1] - starts).clamp(max=limit)
        width = int(lengths.max()) if len(rows) else 0
        starts, lengths = starts.to(self.tokens.device), lengths.to(self.tokens.device)
        columns = torch.arange(width, device=self.tokens.device)
        inside = columns < lengths[:, None]
        ids = self.tokens[torch.where(inside, starts[:, None] + columns, 0)].long()
        return torch.where(inside, ids, pad), lengths


def write_tokens(folder: Path, chunks: Iterable[list[list[int]]], vocab_size: int) -> int:
    """Streams rows of token ids into `tokens.npy` and `offsets.npy`; returns the number of rows.

    The narrowest type that torch can index by is used: int16 where the vocabulary fits, else int32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.int16 if vocab_size <= np.iinfo(np.int16).max + 1 else np.int32)
    lengths = [np.zeros(1, dtype=np.int64)]
    with open(folder / "tokens.npy", "wb") as file:
        write_npy_header(file, dtype, (0,))
        for rows in chunks:
            lengths.append(np.array([len(row) for row in rows], dtype=np.int64))
            file.write(np.fromiter((token for row in rows for token in row), dtype=dtype).tobytes())
        offsets = np.concatenate(lengths).cumsum()
        # A .npy header leaves room for the first dimension to grow: the final one has the same length.
        file.seek(0)
        write_npy_header(file, dtype, (int(offsets[-1]),))
    np.save(folder / "offsets.npy", offsets)
    manifest.record(folder / "tokens.npy", folder / "offsets.npy")
    return len(offsets) - 1


def write_npy_header(file, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The header of a .npy file whose content is written piece by piece."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
