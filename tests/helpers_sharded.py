"""What the checks of a sharded catalogue have in common, on whatever rank they run."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import make_offsets
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from attnrec import ShardedCatalog

RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
IGNORED = -100
CHECKS = {}  # by name


def check(function):
    CHECKS[function.__name__] = function
    return function


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(*shape, seed=0, largest=3, dtype=torch.float32):
    """Products and sums of them are exact, and there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def uneven(total):
    """Where the ranks' rows start: a large share, none, the rest."""
    cuts = {1: [], 2: [total], 4: [total - total // 3, total - total // 3, total - total // 9]}[RANKS]
    return [0, *cuts, total]


def even(total):
    chunk = -(-total // RANKS)
    return [min(rank * chunk, total) for rank in range(RANKS + 1)]


def catalogues(table):
    """The same catalogue, made in every way."""
    yield ShardedCatalog(table)
    starts = uneven(len(table))
    yield ShardedCatalog.from_rows(table[starts[RANK] : starts[RANK + 1]])
    if RANKS > 1:
        yield ShardedCatalog(distribute_tensor(table, init_device_mesh("cpu", (RANKS,)), [Shard(0)]))


def own(x, starts=None):
    """This rank's part of the rows of x."""
    starts = even(len(x)) if starts is None else starts
    return x[starts[RANK] : starts[RANK + 1]]


def exclusions(batch, items, seed=0):
    counts = [0 if b % 3 == 2 else (7 * b + seed) % (2 * items + 1) for b in range(batch)]
    return torch.randint(
        0, items, (sum(counts),), generator=torch.Generator().manual_seed(seed)
    ), make_offsets(counts)


def assert_same_lists(got, want):
    for x, y, what in zip(got[:2], want[:2], ("scores", "ids"), strict=True):
        assert x.dtype == y.dtype, what
        assert torch.equal(x, y), f"{what}: {x} is not {y}"
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5, equal_nan=True)


def assert_raises(error, words, function, *args, **kwargs):
    with pytest.raises(error, match=words):
        function(*args, **kwargs)
