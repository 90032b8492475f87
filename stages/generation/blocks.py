"""Passages of one prompt that do not see each other: reading `parallel` or `weighted`, by decoder-only generators.

Parallel Context Windows (Ratner et al. 2023, arXiv:2212.10947), block attention (Sun et al. 2024, arXiv:2409.15355); what
Fusion-in-Decoder (Izacard & Grave 2021) is to an encoder-decoder. A prompt is a prefix (BOS, or what a chat template puts
before a message), a block for each passage, and a tail: question, cue and answer. A passage sees the prefix and itself,
the tail sees everything, nobody sees what stands behind.

- Positions. Every passage starts at the same one, behind the prefix; the tail starts behind the longest passage that is
  there (as in PCW's code; block attention gives each passage its place in the prompt). Not behind the longest that there
  may be: that would put a gap before the question, of which the model knows none. So distances stay those of a prompt
  with one passage, a single passage has exactly the likelihood that it has when read each, and the model needs the
  positions of one context however many passages there are.
- The prefix is there once, as in PCW's code: the tail would otherwise see it once for each passage.
- There is no separator, which would make the first passage another one than the rest. So the states of a passage depend on
  nothing but its tokens and the prefix, and the likelihood of an answer not on the order of the passages.
- Time and memory grow with the number of tokens, not with its square: no token sees more than a block, but the tail's.

Read `weighted`, log p(z | x) is added to the logits of the tail's attention to passage z, as an encoder-decoder's to its
passages (rag/together.py). All passages together then have the attention of one: copies of a passage, whatever their prior, are
read as that passage alone.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from stages.packed.packing import Packing, attention

# They take positions and a mask of four dimensions as they are given, and leave the rest to their attention function.
FAMILIES = ("gemma", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")


def fits(config) -> bool:
    """Whether a model of this configuration can read so: one of FAMILIES, all of whose layers see the whole text."""
    layers = getattr(config, "layer_types", None)
    seen = set(layers) <= {"full_attention"} if layers else not getattr(config, "sliding_window", None)
    return config.model_type in FAMILIES and seen


@dataclass
class Blocks:
    """The blocks of R prompts of K passages each, padded [R, L] on the right; padding counts as tail."""

    number: Tensor  # [R, L] n: of the passage of that number, from 0; the prefix is of number 0, the tail of number K
    positions: Tensor  # [R, L] what the model is told
    prefix: int  # tokens that all see, at positions 0 to prefix - 1
    passages: int  # K
    bias: Tensor | None = None  # [R, L] added to the logits of the tail's attention to each token

    @classmethod
    def of(cls, ends: Tensor, prefix: int, width: int) -> "Blocks":
        """From the columns `ends` [R, K] behind which the passages end, one after the other: a missing one where it starts."""
        column = torch.arange(width, device=ends.device).expand(len(ends), -1).contiguous()
        number = torch.searchsorted(ends.contiguous(), column, right=True)
        starts = F.pad(ends, (1, 0), value=prefix)  # the tail's last
        longest = starts.diff(dim=1).amax(1, keepdim=True)
        first = prefix + longest * (number == ends.shape[1])
        return cls(number, column - starts.gather(1, number) + first, prefix, ends.shape[1])

    def weighed(self, log_prior: Tensor) -> "Blocks":
        """The same, each passage of [R, K] of these weights."""
        of_passage = (self.number < self.passages) & (self.positions >= self.prefix)
        bias = log_prior.gather(1, self.number.clamp(max=self.passages - 1))
        return replace(self, bias=torch.where(of_passage, bias, 0.0))

    def repeat(self, times: int) -> "Blocks":
        """Every row `times` times, copies side by side."""
        return self._each(lambda part: part.repeat_interleave(times, 0))

    def select(self, rows: LongTensor) -> "Blocks":
        """The given rows in the given order."""
        return self._each(lambda part: part[rows])

    def columns(self, place: Tensor) -> "Blocks":
        """What stands at `place` [R, n] of each row."""
        return self._each(lambda part: part.gather(1, place))

    def longer(self, count: int) -> "Blocks":
        """With `count` columns more, which go on with the tail."""
        last, further = self.positions[:, -1:], torch.arange(1, count + 1, device=self.positions.device)
        return replace(
            self,
            number=F.pad(self.number, (0, count), value=self.passages),
            positions=torch.cat([self.positions, last + further], dim=1),
            bias=None if self.bias is None else F.pad(self.bias, (0, count)),
        )

    def seen(self) -> Tensor:
        """Which tokens each token sees [R, 1, L, L], for models whose rows are padded: as large as that says."""
        same = self.number[:, :, None] == self.number[:, None]
        from_tail, prefix = self.number == self.passages, self.positions < self.prefix
        column = torch.arange(self.number.shape[1], device=self.number.device)
        return ((same | from_tail[:, :, None] | prefix[:, None]) & (column <= column[:, None]))[:, None]

    def mask(self, dtype: torch.dtype, seen: Tensor | None = None) -> Tensor:
        """`seen` (None: the method's) as the library's models take it; where passages weigh, what is added to the logits."""
        seen = self.seen() if seen is None else seen
        if self.bias is None:
            return seen
        from_tail = (self.number == self.passages)[:, None, :, None]
        added = torch.where(from_tail, self.bias[:, None, None], 0.0)
        return added.masked_fill(~seen, torch.finfo(dtype).min).to(dtype)

    def _each(self, change) -> "Blocks":
        bias = None if self.bias is None else change(self.bias)
        return replace(self, number=change(self.number), positions=change(self.positions), bias=bias)


@dataclass
class PackedBlocks:
    """Where the real tokens of R prompts are, and their blocks: what `causal_attention` asks in two calls.

    In the first every token asks its own block, in the second the tails' ask their whole prompts, which stand in one piece.
    """

    prompts: Packing
    positions: Tensor  # [tokens]
    blocks: Packing  # R x (K + 1) rows, the tail is each prompt's last; empty where a passage is missing
    before: Tensor | None  # [asked] the tokens that the blocks ask, where they see a prefix beside themselves
    asked: Packing  # of `before`, or the blocks
    tail: LongTensor  # [tail tokens] which tokens these are
    tails: Packing  # R rows
    bias: Tensor | None = None  # [tokens] added to the logits of the tails' attention to each

    @classmethod
    def of(cls, blocks: Blocks, mask: Tensor) -> "PackedBlocks":
        """Of prompts whose real tokens `mask` [R, L] names. Waits for the device: their numbers shape all else."""
        prompts, parts = Packing.of(mask), blocks.passages + 1
        number = prompts.pack(blocks.number)
        block = prompts.row() * parts + number
        lengths = torch.zeros(prompts.rows * parts, dtype=torch.long, device=block.device)
        lengths.index_add_(0, block, torch.ones_like(block))
        own = _packing(lengths)
        of_tail = lengths.view(-1, parts)[:, -1]
        tail = (number == blocks.passages).nonzero().squeeze(1)
        bias = None if blocks.bias is None else prompts.pack(blocks.bias)
        made = cls(prompts, prompts.pack(blocks.positions), own, None, own, tail, _packing(of_tail), bias)
        if not blocks.prefix:
            return made
        follows = (torch.arange(len(lengths), device=lengths.device) % parts > 0) & (lengths > 0)
        asked = _packing(lengths + blocks.prefix * follows)
        row = asked.row()
        place = asked.positions - blocks.prefix * follows[row]
        before = torch.where(place < 0, prompts.offsets[row // parts] + asked.positions, own.offsets[row] + place)
        return replace(made, before=before, asked=asked)

    @property
    def offsets(self) -> Tensor:
        """[R + 1] int32: prompt r is tokens[offsets[r]:offsets[r + 1]]."""
        return self.prompts.offsets

    def pack(self, padded: Tensor) -> Tensor:
        """[R, L, ...] to [tokens, ...]."""
        return self.prompts.pack(padded)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
        """What `causal_attention` says."""
        near = (key, value) if self.before is None else (key[self.before], value[self.before])
        mixed = attention(query, *near, self.blocks, self.asked, dropout, causal=True, scale=scale)
        of_tails = attention(
            query[self.tail],
            key,
            value,
            self.tails,
            self.prompts,
            dropout,
            causal=True,
            scale=scale,
            key_bias=self.bias,
        )
        return mixed.index_copy(0, self.tail, of_tails)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing | PackedBlocks, dropout: float = 0.0,
    scale: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of packed [tokens, heads, d] queries over what stands before them in their row, as far as they see it."""
    if isinstance(packing, PackedBlocks):
        assert window is None, "what sees a window of the text cannot see all passages"
        return packing.attention(query, key, value, dropout, scale)
    return attention(query, key, value, packing, packing, dropout, causal=True, scale=scale, window=window)


def _packing(lengths: Tensor) -> Packing:
    total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
    return Packing.of_lengths(lengths, total, longest)
