"""The order in which an epoch goes through its questions, and what else is drawn anew in each."""

import torch


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a function of the seed and the epoch alone, so that a resumed run meets the same one."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def epoch_shares(count: int, seed: int, epoch: int) -> torch.Tensor:
    """A number in [0, 1) for each question [count], drawn anew each epoch; a function of seed and epoch alone, too."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) ^ 0x5EED)
    return torch.rand(count, generator=generator, dtype=torch.float64)
