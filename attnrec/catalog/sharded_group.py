"""Who holds which rows, and collectives that add up in a fixed order of ranks.

Sums are gathered and folded from rank 0 upwards, so that a result does not depend on which message came first
and is the same on every rank: `all_reduce` promises neither.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits, log-sum-exps and sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Group:
    """The ranks of a process group; one rank where torch.distributed was not started.

    Every method is a collective: all ranks call it, in the same order.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        started = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(process_group) if started else 1
        self.rank = dist.get_rank(process_group) if started else 0

    def gather(self, x: Tensor) -> Tensor:
        """`[ranks, *x.shape]`; x has the same shape on all ranks."""
        if self.size == 1 or x.numel() == 0:
            return x.expand(self.size, *x.shape)
        out = x.new_empty(self.size, *x.shape)
        # as bytes, for backends that do not know every dtype
        dist.all_gather(list(_bytes(out).chunk(self.size)), _bytes(x), group=self.process_group)
        return out

    def counts(self, count: int, device: torch.device) -> list[int]:
        """The ranks' numbers."""
        return self.gather(torch.tensor(count, device=device)).tolist()

    def gather_rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The ranks' rows one after the other, `[sum(counts), ...]`; rank r has `counts[r]`."""
        most = max(counts)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: x.shape[0]] = x
        return torch.cat([rows[:n] for rows, n in zip(self.gather(padded), counts, strict=True)])

    def exchange(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Rows `parts[r]` go to rank r; returns what the ranks sent here, `counts[r]` rows from rank r."""
        if self.size == 1:
            return list(parts)
        sent = torch.cat(list(parts))
        got = sent.new_empty(sum(counts), *sent.shape[1:])
        row = sent.element_size() * sent[:1].numel() if len(sent) else got.element_size() * got[:1].numel()
        dist.all_to_all_single(
            _bytes(got),
            _bytes(sent),
            [n * row for n in counts],
            [len(part) * row for part in parts],
            group=self.process_group,
        )
        return list(got.split(list(counts)))

    def scatter_sum(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The ranks' sum of `x [sum(counts), ...]`, of which this rank gets its `counts[rank]` rows."""
        parts = self.exchange(x.split(list(counts)), [counts[self.rank]] * self.size)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def sum(self, x: Tensor) -> Tensor:
        """The ranks' sum of x, on all of them. Twice x's bytes are sent, as in a ring."""
        if self.size == 1 or x.numel() == 0:
            return x
        chunk = -(-x.numel() // self.size)
        flat = x.new_zeros(chunk * self.size)
        flat[: x.numel()] = x.reshape(-1)
        own = self.scatter_sum(flat, [chunk] * self.size)
        return self.gather(own).reshape(-1)[: x.numel()].view(x.shape)


class SumOverRanks(torch.autograd.Function):
    """A few numbers' sum, the same on every rank; every rank's own share gets the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.gather(x).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def disconnect() -> None:
    """Ends torch.distributed in this process, once all ranks have come here. A collective.

    Gloo's threads let go of a collective's tensors a little after it has returned, need the interpreter for
    that, and abort the process where that is at its end just then: so give them the time.
    """
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Sharding:
    """Rank r of `group` holds the ids `starts[r] ... starts[r + 1] - 1`; `len(starts)` is ranks + 1."""

    group: Group
    starts: tuple[int, ...]

    @classmethod
    def even(cls, group: Group, total: int) -> Sharding:
        """As DTensor's Shard(0) and torch.chunk cut: the last ranks may have fewer rows, or none."""
        chunk = -(-total // group.size)
        return cls(group, (*(min(rank * chunk, total) for rank in range(group.size)), total))

    @property
    def first(self) -> int:
        return self.starts[self.group.rank]

    @property
    def last(self) -> int:
        """One past this rank's last id."""
        return self.starts[self.group.rank + 1]

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def total(self) -> int:
        return self.starts[-1]

    def owned(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether this rank has each of the global ids, and where: its row, or 0 for those of others."""
        own = (ids >= self.first) & (ids < self.last)
        return own, torch.where(own, ids.long() - self.first, 0)

    def own_items(self, op: str, name: str, x: Any) -> Tensor | None:
        """This rank's part of what is given per item: `[N]`, the part itself, or a DTensor `Shard(0)`."""
        if x is None:
            return None
        if isinstance(x, DTensor):
            if (
                tuple(x.placements) != (Shard(0),)
                or self.starts != Sharding.even(self.group, self.total).starts
            ):
                raise ValueError(f"{op}: {name} must be placed as the table is, got {x.placements}")
            x = x.to_local()
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.shape == (self.count,):
            return x
        if x.shape == (self.total,):
            return x[self.first : self.last]
        raise ValueError(
            f"{op}: {name} must have shape [N] = [{self.total}] or this rank's part of it, [{self.count}], "
            f"got {list(x.shape)}"
        )
