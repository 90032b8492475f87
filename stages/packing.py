"""Rows without padding: real tokens side by side in one long row, and attention that stays inside its own row.

On a GPU in half precision attention is FlashAttention's variable-length kernel (Dao 2023, arXiv:2307.08691); elsewhere
it is torch's, padded for that one operation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Packing:
    """Where the real tokens of R right-padded rows [R, L] are."""

    index: Tensor  # [tokens] position of each in the flattened [R * L]
    positions: Tensor  # [tokens] position of each in its row
    offsets: Tensor  # [R + 1] int32: row r is tokens[offsets[r]:offsets[r + 1]]
    rows: int
    width: int  # L, no row is longer

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """From a mask [R, L] that is true (or 1) at real tokens. Waits for the device: their number shapes all else."""
        index = mask.flatten().nonzero().squeeze(1)
        offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(index, index % mask.shape[1], offsets, *mask.shape)

    @classmethod
    def of_lengths(cls, lengths: Tensor, total: int, longest: int) -> "Packing":
        """From lengths [R] on the device, whose sum and maximum the host knows: nobody waits."""
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=total)
        positions = torch.arange(total, device=lengths.device) - offsets[row]
        return cls(row * longest + positions, positions, offsets.to(torch.int32), len(lengths), longest)

    def pack(self, padded: Tensor) -> Tensor:
        """[R, L, ...] to [tokens, ...]."""
        return padded.flatten(0, 1)[self.index]

    def unpack(self, packed: Tensor) -> Tensor:
        """[tokens, ...] to [R, L, ...], zero at padding."""
        padded = packed.new_zeros((self.rows * self.width, *packed.shape[1:]))
        return padded.index_copy(0, self.index, packed).unflatten(0, (self.rows, self.width))


def attention(
    query: Tensor, key: Tensor, value: Tensor, asking: Packing, asked: Packing, dropout: float, causal: bool = False
) -> Tensor:
    """Softmax attention of packed [tokens, heads, d] queries, each over the keys of the row of the same number."""
    if query.is_cuda and query.dtype in HALF:
        # torch.nn.attention.varlen's kernel; its public function (torch 2.11 to 2.13) has no dropout.
        return torch.ops.aten._flash_attention_forward(
            query, key, value, asking.offsets, asked.offsets, asking.width, asked.width, dropout, causal, False
        )[0]
    padded = [p.unpack(t).transpose(1, 2) for p, t in ((asking, query), (asked, key), (asked, value))]
    lengths = asked.offsets[1:] - asked.offsets[:-1]
    column = torch.arange(asked.width, device=query.device)
    mask = (column < lengths[:, None])[:, None, None]
    if causal:
        mask = mask & torch.ones(asking.width, asked.width, dtype=torch.bool, device=query.device).tril()
    return asking.pack(F.scaled_dot_product_attention(*padded, attn_mask=mask, dropout_p=dropout).transpose(1, 2))
