"""A catalogue whose rows are spread over the ranks of torch.distributed: top-k, cross-entropy, look-ups.

Every rank holds a range of ids, as DTensor's `Shard(0)` does. No rank ever holds the whole table, a row of
scores or a row of probabilities over it: what travels are users `[T, D]`, and per user k candidates of each
rank (`topk`) or three numbers (`cross_entropy`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from attnrec.catalog import sharded_checkpoint
from attnrec.catalog.filters import DTYPES
from attnrec.catalog.packed import Catalog
from attnrec.catalog.search import Answer, Exclude
from attnrec.catalog.sharded_checkpoint import Saved, evenly
from attnrec.catalog.sharded_group import Group, Sharding, SumOverRanks
from attnrec.catalog.sharded_loss import CrossEntropy, Lookup, Options
from attnrec.ops.checks import FLOATS, INTEGERS, Check, reads_values

Dtype = Literal["fp32", "bf16", "int8"]


class ShardedCatalog:
    """Rank r holds the items `starts[r] ... starts[r + 1] - 1` of one catalogue of N.

    Every method but `repr` and the properties is a collective: all ranks of the group call it in the same
    order, with the same k and options. A rank that dies or stays away ends the others' calls with an error
    after the process group's timeout (`torch.distributed.init_process_group(timeout=...)`) at the latest.
    Without torch.distributed started there is one rank, which holds everything.

    Users are the same on all ranks, and all get the same answer; with `own_users=True` every rank brings its
    own, any number, and gets theirs. What is given per item (`bias`, `logq`) is the whole `[N]`, this rank's
    part of it, or a DTensor placed as the table.
    """

    def __init__(
        self, table: Tensor | DTensor, *, group: dist.ProcessGroup | None = None, dtype: Dtype = "fp32"
    ) -> None:
        """
        Args:
            table: `[N, D]`, the same on every rank, which copies its own rows; or a DTensor placed
                `Shard(0)` on a mesh of one dimension, whose rows are used as they stand, with gradient.
            group: the ranks; all by default, or the DTensor's.
            dtype: of the filter in front of each rank's rows, as in `Catalog.pack`; made by the first `topk`.
        """
        _check_table(table)
        if isinstance(table, DTensor):
            if table.device_mesh.ndim != 1 or tuple(table.placements) != (Shard(0),):
                raise ValueError(
                    "ShardedCatalog: table must be placed Shard(0) on a mesh of one dimension, got "
                    f"{tuple(table.placements)} on {table.device_mesh}"
                )
            sharding = Sharding.even(Group(group or table.device_mesh.get_group()), len(table))
            rows = table.to_local()
        else:
            sharding = Sharding.even(Group(group), len(table))
            rows = table[sharding.first : sharding.last]
            rows = rows if table.requires_grad else rows.clone()
        self._set(rows, sharding, dtype)

    @classmethod
    def from_rows(
        cls, rows: Tensor, *, group: dist.ProcessGroup | None = None, dtype: Dtype = "fp32"
    ) -> ShardedCatalog:
        """The catalogue of which this rank's items are `rows [n, D]`, n its own: ids go on from rank to rank.

        The rows are used as they stand, with gradient.
        """
        _check_table(rows)
        ranks = Group(group)
        found = ranks.gather(torch.tensor([*rows.shape, FLOATS.index(rows.dtype)], device=rows.device))
        if (found[:, 1:] != found[0, 1:]).any():
            kinds = "; ".join(
                f"rank {rank} {n} x {d} {FLOATS[kind]}" for rank, (n, d, kind) in enumerate(found.tolist())
            )
            raise ValueError(f"ShardedCatalog: rows must have one width and dtype, got {kinds}")
        starts = [0, *found[:, 0].cumsum(0).tolist()]
        return cls.__new__(cls)._set(rows, Sharding(ranks, tuple(starts)), dtype)

    def _set(self, rows: Tensor, sharding: Sharding, dtype: Dtype) -> ShardedCatalog:
        if dtype not in DTYPES:
            raise ValueError(f"ShardedCatalog: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self._rows, self._sharding, self._dtype = rows, sharding, dtype
        self._packed: Catalog | None = None
        self._version: int | None = None  # of the rows that are packed, where they have a gradient
        return self

    def __len__(self) -> int:
        """N, the items of all ranks."""
        return self._sharding.total

    @property
    def rows(self) -> Tensor:
        """This rank's rows, `[n, D]`."""
        return self._rows

    @property
    def starts(self) -> tuple[int, ...]:
        """The ranks' first ids, and N."""
        return self._sharding.starts

    def __repr__(self) -> str:
        own, rows = self._sharding, str(self._rows.dtype).removeprefix("torch.")
        return (
            f"ShardedCatalog({own.total:,} items of dim {self._rows.shape[1]}, {rows}, {self._dtype} filter, "
            f"rank {own.group.rank} of {own.group.size} has {own.first:,} to {own.last:,})"
        )

    # --- asking ---------------------------------------------------------------------------------------------

    def topk(
        self,
        users: Tensor,
        k: int,
        *,
        exclude: Exclude | None = None,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        own_users: bool = False,
    ) -> Answer:
        """As `attnrec.catalog_topk` over the whole table: `(scores [B, k], ids [B, k], lse [B])`.

        Scores and ids are bitwise those of one process; `lse` within 1e-5, or with a filter as in
        `Catalog.topk`. Ids, also those of `exclude`, are global.
        """
        checked = Check("ShardedCatalog.topk", ("users", users))
        checked.tensor("users", users, "[B, D]", (None, self._rows.shape[1]), (self._rows.dtype,))
        checked.integer("k", k)
        if not 0 <= k <= len(self):
            checked.fail("k", f"be from 0 to the size of the catalogue N = {len(self)}", k)
        group, counts = self._sharding.group, None
        bias = self._sharding.own_items("ShardedCatalog.topk", "bias", bias)
        if exclude is not None:
            self._check_exclude(checked, exclude, users.shape[0])
        if own_users:
            counts = group.counts(users.shape[0], users.device)
            users = group.gather_rows(users, counts)
            exclude = None if exclude is None else self._gather_exclude(exclude, counts)
        scores, ids, lse = self._catalog().topk(
            users,
            min(k, self._sharding.count),
            exclude=None if exclude is None else self._own_exclude(exclude),
            bias=bias,
            temperature=temperature,
        )
        missing = (0, k - scores.shape[1])
        scores = F.pad(scores, missing, value=-float("inf"))
        ids = F.pad(ids.where(ids < 0, ids + self._sharding.first), missing, value=-1)
        found = torch.cat([scores, lse.unsqueeze(1)], dim=1)  # one message instead of two
        if counts is None:
            found, ids = group.gather(found), group.gather(ids)
        else:
            found, ids = (
                torch.stack(group.exchange(x.split(counts), [counts[group.rank]] * group.size))
                for x in (found, ids)
            )
        scores, lse = found[:, :, :k], found[:, :, k]
        # Rank by rank, so that among equal scores the lower id comes first, as in each rank's own list.
        best = scores.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
        ids = ids.transpose(0, 1).flatten(1).gather(1, best.indices[:, :k])
        return best.values[:, :k], ids, lse.logsumexp(0)

    def cross_entropy(
        self,
        users: Tensor,
        target: Tensor,
        *,
        temperature: float = 1.0,
        bias: Tensor | None = None,
        logq: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        negatives: Any = None,
        own_users: bool = False,
    ) -> Tensor:
        """As `attnrec.catalog_cross_entropy` over the whole table, with gradients to users, rows and bias.

        The gradient of the rows (and of a bias) stays on their rank. That of users is the sum over ranks, so
        that a model before this which is the same on all ranks stays so.

        With `own_users=True` "mean" and "sum" run over the rows of all ranks, and every rank gets the same
        number; its gradient reaches each rank's own users, so that what is shared before them (an encoder)
        has to add its gradients up over ranks, not average them. "none" gives this rank's rows.
        """
        op = "ShardedCatalog.cross_entropy"
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
        if negatives is not None:
            raise ValueError(
                f"{op}: negatives must be None: a few of them need no sharded table; take their rows with "
                "lookup() and call attnrec.catalog_cross_entropy"
            )
        if isinstance(logq, Tensor) and logq.requires_grad:
            raise ValueError(f"{op}: logq must not require a gradient, which it has not: detach it")
        checked = Check(op, ("users", users))
        checked.tensor("users", users, "[T, D]", (None, self._rows.shape[1]), (self._rows.dtype,))
        checked.tensor("target", target, "[T]", (users.shape[0],), INTEGERS)
        checked.number("temperature", temperature, above=0.0)
        checked.integer("ignore_index", ignore_index)
        checked.number("label_smoothing", label_smoothing)
        if not 0.0 <= label_smoothing <= 1.0:
            checked.fail("label_smoothing", "be from 0 to 1", label_smoothing)
        if reads_values(users.device):
            ids = target[target != ignore_index]
            checked.within("target", ids, 0, len(self) - 1, "the last item of the table")
        group, counts = self._sharding.group, None
        if own_users:
            counts = group.counts(users.shape[0], users.device)
            target = group.gather_rows(target, counts)
        loss = CrossEntropy.apply(
            users,
            self._rows,
            self._sharding.own_items(op, "bias", bias),
            self._sharding.own_items(op, "logq", logq),
            target,
            Options(self._sharding, counts, temperature, label_smoothing, ignore_index),
        )
        if reduction == "none":
            return loss
        total = loss.sum()
        if own_users:
            total = SumOverRanks.apply(total, group)
        return total if reduction == "sum" else total / (target != ignore_index).sum()

    def lookup(self, ids: Tensor, *, own_ids: bool = False) -> Tensor:
        """The rows `[T, D]` of global ids int `[T]`, with gradient to the ranks that hold them.

        The same ids on all ranks, or with `own_ids=True` every rank's own. Then the gradient of a row is the
        sum over the ranks that asked for it.
        """
        checked = Check("ShardedCatalog.lookup", ("ids", ids))
        checked.tensor("ids", ids, "[T]", (None,), INTEGERS)
        if reads_values(ids.device):
            checked.within("ids", ids, 0, len(self) - 1, "the last item of the table")
        counts = self._sharding.group.counts(len(ids), ids.device) if own_ids else None
        return Lookup.apply(self._rows, ids, self._sharding, counts)

    # --- changing -------------------------------------------------------------------------------------------

    def update(self, ids: Tensor, rows: Tensor) -> None:
        """Replaces the rows `[m, D]` of global ids int `[m]`; all ranks are given all of them.

        Each rank takes its own. Where an id is repeated, its last row holds. A table that was given is not
        written: see `Catalog.update`. Rows with a gradient are their optimizer's to change.
        """
        checked = self._changing("update", rows)
        checked.tensor("ids", ids, "[m]", (len(rows),), INTEGERS)
        checked.within("ids", ids, 0, len(self) - 1, "the last item of the catalogue")
        own, places = self._sharding.owned(ids)
        self._catalog().update(places[own], rows[own])
        self._rows = self._catalog().rows

    def append(self, rows: Tensor) -> range:
        """Adds items `[m, D]`, the same on all ranks, and returns their ids, `N ... N + m - 1`.

        They go to the last rank, so that no id changes and no row moves. `balance` evens the ranks out, and
        so does loading what was saved.
        """
        self._changing("append", rows)
        first, group = len(self), self._sharding.group
        if group.rank == group.size - 1:
            self._catalog().append(rows)
            self._rows = self._catalog().rows
        self._sharding = Sharding(group, (*self.starts[:-1], first + len(rows)))
        return range(first, first + len(rows))

    def balance(self) -> None:
        """Moves rows between neighbours until all ranks have as many, as a DTensor's `Shard(0)` has them."""
        self._changing("balance", self._rows)
        self._set(*evenly(self._rows, self._sharding), self._dtype)

    def _changing(self, what: str, rows: Any) -> Check:
        checked = Check(f"ShardedCatalog.{what}", ("rows", rows))
        checked.tensor("rows", rows, "[m, D]", (None, self._rows.shape[1]), (self._rows.dtype,))
        if self._rows.requires_grad:
            raise ValueError(f"ShardedCatalog.{what}: the rows have a gradient: their optimizer changes them")
        return checked

    def _catalog(self) -> Catalog:
        # Rows with a gradient are changed by their optimizer: a filter of the old ones would lose items.
        version = self._rows._version if self._rows.requires_grad else None
        if self._packed is None or version != self._version:
            self._packed, self._version = Catalog.pack(self._rows.detach(), self._dtype), version
        return self._packed

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the rows into a folder that all ranks see, by torch.distributed.checkpoint.

        Every rank writes its own, as safetensors. A write that fails on any rank raises on all of them, and
        one that is killed is not seen: the old checkpoint holds then.
        """
        rows, sharding = evenly(self._rows.detach(), self._sharding)
        sharded_checkpoint.save(Path(folder), Saved({}, sharding, {"rows": rows}, {}))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        group: dist.ProcessGroup | None = None,
        dtype: Dtype = "fp32",
        device: torch.device | str = "cpu",
    ) -> ShardedCatalog:
        """A saved catalogue, on any number of ranks: each reads its own rows.

        Raises:
            FileNotFoundError: there is none.
        """
        saved = sharded_checkpoint.load(Path(folder), Group(group), device)
        return cls.__new__(cls)._set(saved.shards["rows"], saved.sharding, dtype)

    # --- exclusions -----------------------------------------------------------------------------------------

    def _check_exclude(self, checked: Check, exclude: Exclude, users: int) -> None:
        if not (isinstance(exclude, tuple | list) and len(exclude) == 2):
            checked.fail("exclude", "be a pair (ids, offsets)", type(exclude).__name__, TypeError)
        ids, offsets = exclude
        checked.tensor("exclude ids", ids, "[X]", (None,), INTEGERS)
        checked.tensor("exclude offsets", offsets, "[B + 1]", (users + 1,), INTEGERS)
        if reads_values(ids.device):
            checked.offsets("exclude offsets", offsets, "exclude ids", ids.shape[0])
            checked.within("exclude ids", ids, 0, len(self) - 1, "the last item of the catalogue")

    def _gather_exclude(self, exclude: Exclude, counts: list[int]) -> Exclude:
        """The ranks' exclusions, user after user."""
        group, (ids, offsets) = self._sharding.group, exclude
        lengths = group.gather_rows(offsets.diff(), counts)
        ids = group.gather_rows(ids, group.counts(len(ids), ids.device))
        return ids, F.pad(lengths.cumsum(0), (1, 0))

    def _own_exclude(self, exclude: Exclude) -> Exclude:
        """Of the exclusions those among this rank's items, numbered as its rows."""
        ids, offsets = exclude
        users = torch.repeat_interleave(offsets.diff())
        own, rows = self._sharding.owned(ids)
        lengths = torch.bincount(users[own], minlength=len(offsets) - 1)
        return rows[own], F.pad(lengths.cumsum(0), (1, 0))


def _check_table(table: Any) -> None:
    """A DTensor's shape is the whole table's."""
    Check("ShardedCatalog", ("table", table)).tensor("table", table, "[N, D]", (None, None))
