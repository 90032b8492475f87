"""The order in which an epoch goes through its questions."""

import torch


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a function of the seed and the epoch alone, so that a resumed run meets the same one."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()
