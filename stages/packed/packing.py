"""Rows without padding: real tokens side by side in one long row, and attention that stays inside its own row.

On a GPU in half precision attention is FlashAttention's variable-length kernel (Dao 2023, arXiv:2307.08691); elsewhere
it is torch's, row by row on a CPU where rows are long, else padded for that one operation.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
LONG_ROW = 64  # tokens; from there on a CPU attends to a row at a time faster than to all rows with their padding


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

    def filled(self, total: int, rows: int) -> "Packing":
        """With `rows` rows more, which share the tokens up to `total` evenly; none of them is longer than `width`."""
        device, tokens = self.index.device, len(self.index)
        starts = tokens + torch.arange(rows + 1, device=device) * (total - tokens) // rows
        lengths = starts[1:] - starts[:-1]
        row = torch.arange(rows, device=device).repeat_interleave(lengths, output_size=total - tokens)
        positions = torch.arange(tokens, total, device=device) - starts[row]
        return Packing(
            torch.cat([self.index, (self.rows + row) * self.width + positions]),
            torch.cat([self.positions, positions]),
            torch.cat([self.offsets, starts[1:].to(torch.int32)]),
            self.rows + rows,
            self.width,
        )

    def joined(self, times: int) -> "Packing":
        """The same tokens in rows [R / times, times * L], each the real tokens of `times` neighbouring rows end to end."""
        width = times * self.width
        row = torch.div(self.index, width, rounding_mode="floor")
        offsets = self.offsets[::times].contiguous()
        positions = torch.arange(len(self.index), device=self.index.device) - offsets[row]
        return Packing(row * width + positions, positions, offsets, self.rows // times, width)

    def repeated(self, times: int) -> tuple["Packing", Tensor, Tensor]:
        """Every row `times` times, copies side by side: [times * R, L].

        Beside it which token each token of these rows is [times * tokens], and where each token's copies are [tokens, times].
        """
        number, width = torch.arange(times, device=self.index.device), self.width
        lengths, row = self.offsets[1:] - self.offsets[:-1], self.row()
        starts = times * self.offsets[:-1, None] + number * lengths[:, None]  # of each row's copies
        places = starts[row] + self.positions[:, None]
        # By scattering alone, which a CUDA graph can record.
        of, copied = torch.empty((2, places.numel()), dtype=torch.long, device=row.device)
        tokens = torch.arange(len(row), device=row.device)
        of[places.flatten()] = tokens[:, None].expand_as(places).flatten()
        copied[places.flatten()] = (times * row[:, None] + number).flatten()
        positions = self.positions[of]
        offsets = torch.cat([starts.flatten(), times * self.offsets[-1:]]).to(torch.int32)
        return Packing(copied * width + positions, positions, offsets, times * self.rows, width), of, places

    def row(self) -> Tensor:
        """The row of each token: [tokens]."""
        return torch.div(self.index, self.width, rounding_mode="floor")

    def widened(self, width: int) -> "Packing":
        """The same tokens of rows [R, width]."""
        index = self.row() * width + self.positions
        return Packing(index, self.positions, self.offsets, self.rows, width)

    def pack(self, padded: Tensor) -> Tensor:
        """[R, L, ...] to [tokens, ...]."""
        return padded.flatten(0, 1)[self.index]

    def unpack(self, packed: Tensor) -> Tensor:
        """[tokens, ...] to [R, L, ...], zero at padding."""
        padded = packed.new_zeros((self.rows * self.width, *packed.shape[1:]))
        return padded.index_copy(0, self.index, packed).unflatten(0, (self.rows, self.width))


@dataclass
class PackedAnswers:
    """Contexts and their answers as the packed models score them: `tokens` real tokens, `answers` of answers.

    A context an answer, or `together` neighbouring ones, which it reads as one; `alone` asks for its log p under each of them
    too. With a `log_prior` it attends to each context's tokens as much as their context weighs.
    """

    ids: Tensor  # [tokens]
    tokens: Packing
    read: Tensor  # [answers] what the prediction starts from: a decoder's input, or the place of a prompt's token
    targets: Tensor  # [answers]
    answers: Packing
    together: int = 1
    alone: bool = False
    log_prior: Tensor | None = None  # [contexts]; not of what CUDA graphs record

    def filled(self, tokens: int, answers: int, rows: int) -> "PackedAnswers":
        """With `rows` more answers of token 0 and their contexts, up to these numbers of tokens: the others do not see them."""
        return PackedAnswers(
            F.pad(self.ids, (0, tokens - len(self.ids))),
            self.tokens.filled(tokens, rows * self.together),
            *(F.pad(part, (0, answers - len(part))) for part in (self.read, self.targets)),
            self.answers.filled(answers, rows),
            self.together,
            self.alone,
        )

    def widened(self, context: int, answer: int) -> "PackedAnswers":
        """The same, as if the longest context and the longest answer had these numbers of tokens."""
        return replace(self, tokens=self.tokens.widened(context), answers=self.answers.widened(answer))

    def tensors(self) -> list[Tensor]:
        """All that differs from one batch to another of the same sizes."""
        of_packings = [part for p in (self.tokens, self.answers) for part in (p.index, p.positions, p.offsets)]
        return [self.ids, self.read, self.targets, *of_packings]

    def of_tensors(self, tensors: list[Tensor]) -> "PackedAnswers":
        """Of the same sizes, with these `tensors()`."""
        ids, read, targets, *parts = tensors
        tokens, answers = (
            Packing(*three, packing.rows, packing.width)
            for three, packing in ((parts[:3], self.tokens), (parts[3:], self.answers))
        )
        return PackedAnswers(ids, tokens, read, targets, answers, self.together, self.alone)


def attention(
    query: Tensor, key: Tensor, value: Tensor, asking: Packing, asked: Packing, dropout: float, causal: bool = False,
    scale: float | None = None, window: int | None = None, key_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of packed [tokens, heads, d] queries, each over the keys of the row of the same number.

    Keys and values may have fewer heads, each shared by as many neighbouring ones of the queries. `scale` None is
    1 / sqrt(d). Where it is `causal` the queries of a row are the last of its keys' positions, and see none behind their own;
    with a `window`, which wants that, their own and the window - 1 before it. `key_bias` [asked tokens] is added to every
    logit of its key.
    """
    if key_bias is not None:
        width = query.shape[-1]
        scale = scale or width**-0.5
        given = asking_bias(query), *biased(key, value, key_bias / scale)
        return attention(*given, asking, asked, dropout, causal, scale, window)[..., :width]
    query, key, value = in_autocast_dtype(query, key, value)
    if query.is_cuda and query.dtype in HALF and has_flash():
        # torch.nn.attention.varlen's kernel; its public function (torch 2.11 to 2.13) has no dropout.
        return torch.ops.aten._flash_attention_forward(
            query, key, value, asking.offsets, asked.offsets, asking.width, asked.width, dropout, causal, False,
            scale=scale, window_size_left=None if window is None else window - 1,
        )[0]  # fmt: skip
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    if query.device.type == "cpu" and asking.width >= LONG_ROW and window is None and not torch.compiler.is_compiling():
        lengths = [(packing.offsets[1:] - packing.offsets[:-1]).tolist() for packing in (asking, asked)]
        if (asking is asked or not causal) and min(map(min, lengths)) > 0:
            return _row_by_row(query, key, value, *lengths, dropout, causal, scale)
    padded = [p.unpack(t).transpose(1, 2) for p, t in ((asking, query), (asked, key), (asked, value))]
    # Within a row padding stands behind all that is real: a causal query sees none of it, and torch computes half of it all.
    plain = causal and window is None and asking is asked
    mask = None if plain else _mask(asking, asked, causal, window)
    mixed = F.scaled_dot_product_attention(*padded, attn_mask=mask, dropout_p=dropout, is_causal=plain, scale=scale)
    return asking.pack(mixed.transpose(1, 2))


def biased(key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, heads, d + 8] that give `bias` [tokens] x scale to every query of `asking_bias`.

    It lies in one more dimension of the keys, where the queries have 1: no kernel need know of it. FlashAttention's want a
    multiple of 8.
    """
    column = bias.to(key.dtype)[:, None, None].expand(-1, key.shape[1], 1)
    return F.pad(torch.cat([key, column], -1), (0, 7)), F.pad(value, (0, 8))


def asking_bias(query: Tensor) -> Tensor:
    """Queries [..., d + 8] of `biased` keys; of what they find the first d dimensions count."""
    return F.pad(F.pad(query, (0, 1), value=1.0), (0, 7))


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, asking: list[int], asked: list[int], dropout: float, causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """`attention` without padding and without a mask, of rows of these lengths."""
    rows = zip(query.split(asking), key.split(asked), value.split(asked), strict=True)
    mixed = [
        F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in row), dropout_p=dropout, is_causal=causal, scale=scale
        )
        for row in rows
    ]
    return torch.cat([row[0].transpose(0, 1) for row in mixed])


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors as a matrix product would take them.

    Under autocast rotary embeddings leave queries and keys in fp32, which torch's own attention casts back, and which
    FlashAttention's kernels do not know.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


@torch.compiler.assume_constant_result
def has_flash() -> bool:
    """Whether FlashAttention's kernels run on this process's GPU; where not, a line says so."""
    return _has_flash()


@cache
def _has_flash() -> bool:
    capability = torch.cuda.get_device_capability()
    fits = capability >= (8, 0) and torch.backends.cuda.is_flash_attention_available()
    if not fits:
        print(
            f"FlashAttention is not used: it needs a GPU of compute capability 8.0 or more and a torch that has it; "
            f"this one has {capability[0]}.{capability[1]}",
            file=sys.stderr,
        )
    return fits


def _mask(asking: Packing, asked: Packing, causal: bool, window: int | None) -> Tensor:
    """Which keys [R, 1, 1 or queries, keys] the queries of each padded row see."""
    lengths, asks = (packing.offsets[1:] - packing.offsets[:-1] for packing in (asked, asking))
    column = torch.arange(asked.width, device=lengths.device)
    mask = (column < lengths[:, None])[:, None, None]
    if causal:
        # As FlashAttention has it since 2.1.
        place = torch.arange(asking.width, device=lengths.device)[:, None] + (lengths - asks)[:, None, None, None]
        mask = mask & (column <= place)
        if window is not None:
            mask = mask & (column > place - window)
    return mask
