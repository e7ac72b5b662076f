"""Shapes of batches: how many candidates and events each user has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

# B, H, C, L, D: users, heads, candidates a user, events a user, head dim.
CPU_TABLE = (
    (8, 4, 256, 200, 32),
    (8, 4, 256, 1024, 32),
    (4, 4, 512, 1024, 64),
    (8, 8, 128, 512, 16),
    (2, 4, 1000, 4096, 64),
    (64, 2, 20, 50, 32),
    (256, 4, 1, 200, 32),
    (4, 2, 512, 2048, 128),
)


def log_normal(users: int, median: int, sigma: float, most: int, seed: int = 0) -> list[int]:
    """Lengths with a long tail, at least 1 and at most `most`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(users, generator=generator) * sigma).exp() * median
    return drawn.round().clamp(1, most).long().tolist()


def zipf(users: int, most: int, exponent: float = 1.0, seed: int = 0) -> list[int]:
    """Lengths `most / rank^exponent`, the ranks in random order: a few heavy users, many light ones."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randperm(users, generator=generator) + 1
    return (most / ranks.double() ** exponent).round().clamp(1, most).long().tolist()


def offsets(counts: Sequence[int]) -> Tensor:
    """Counts per user as int64 offsets `[B + 1]`."""
    return torch.tensor([0, *accumulate(counts)])
