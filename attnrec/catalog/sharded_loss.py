"""Cross-entropy over a table whose rows are spread over ranks, from the fused op on each rank's rows.

Every rank finds the log-sum-exp of its own rows, and the target's logit where it has the target: three
numbers a row of users at most go over the network. Backward, with the log-sum-exp of all ranks,

    d loss / d z_j = exp(z_j - lse) - [j is the target]
                   = exp(lse_own - lse) · exp(z_j - lse_own) - [j is the target]

of which the first term is the fused op's own gradient under an upstream gradient of exp(lse_own - lse). That
op knows no row without a target among its items, though. So the first item is held out of it, hidden by a
bias of -inf, and serves as every row's target: there a gradient can do nothing. What belongs to this one item
and to the targets is O(T·D), and added by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrec import ops
from attnrec.catalog.sharded_group import Sharding, wide

HELD_OUT = 0
IGNORED = -100
INF = float("inf")


class Options(NamedTuple):
    sharding: Sharding
    counts: list[int] | None  # rows of each rank where every rank has its own; None where all have the same
    temperature: float
    label_smoothing: float
    ignore_index: int

    @property
    def own_rows(self) -> slice:
        """This rank's rows among those of all ranks."""
        if self.counts is None:
            return slice(None)
        first = sum(self.counts[: self.sharding.group.rank])
        return slice(first, first + self.counts[self.sharding.group.rank])


class Logits(NamedTuple):
    """One item for each row: its logit, and what its gradient needs."""

    z: Tensor  # [T]
    items: Tensor  # [T or 1, D], wide, over the temperature; zeros where hidden

    @classmethod
    def of(cls, users: Tensor, rows: Tensor, added: Tensor | None, ids: Tensor, temperature: float) -> Logits:
        """`ids` int64 `[T]` or `[1]`, rows of this rank."""
        items = rows[ids].to(wide(rows.dtype))
        if added is not None:  # what is hidden is not computed with: it may hold a NaN
            items = items.where((added[ids] != -INF).unsqueeze(-1), 0.0)
        items = items / temperature
        z = (users.to(items.dtype) * items).sum(-1)
        return cls(z if added is None else z + added[ids], items)


class CrossEntropy(torch.autograd.Function):
    """The loss of each of this rank's rows of users. All arguments per item are this rank's part."""

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        logq: Tensor | None,
        target: Tensor,  # of all ranks' rows of users, global ids
        options: Options,
    ) -> Tensor:
        sharding, dtype = options.sharding, wide(users.dtype)
        if options.counts is not None:
            users = sharding.group.gather_rows(users, options.counts)
        added = _added(bias, logq, dtype)
        ignored = target == options.ignore_index
        own, ids = sharding.owned(target.masked_fill(ignored, -1))
        # `-inf` and no item: a rank without rows
        others = held = users.new_full(target.shape, -INF, dtype=dtype)
        aim = users.new_zeros(target.shape, dtype=dtype)
        total = aim
        if sharding.count:
            held = Logits.of(users, rows, added, ids.new_tensor([HELD_OUT]), options.temperature).z
            others = _others(users, rows, added, ignored, options.temperature)
            aim = torch.where(own, Logits.of(users, rows, added, ids, options.temperature).z, 0.0)
            if options.label_smoothing > 0.0:
                total = users.to(dtype) @ (rows.sum(0, dtype=dtype) / options.temperature)
                total = total if added is None else total + added.sum()
        found = [torch.logaddexp(others, held), aim]
        merged = sharding.group.gather(
            torch.stack([*found, total] if options.label_smoothing > 0.0 else found)
        )
        lse, aim = merged[:, 0].logsumexp(0), merged[:, 1].sum(0)
        if options.label_smoothing > 0.0:
            mean = merged[:, 2].sum(0) / sharding.total
            aim = (1.0 - options.label_smoothing) * aim + options.label_smoothing * mean
        ctx.save_for_backward(users, rows, bias, logq, ids, own, ignored, lse, others, held)
        ctx.options = options
        return (lse - aim).masked_fill(ignored, 0.0)[options.own_rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order("cross_entropy")
        users, rows, bias, logq, ids, own, ignored, lse, others, held = ctx.saved_tensors
        options: Options = ctx.options
        sharding, dtype, needs = options.sharding, wide(users.dtype), ctx.needs_input_grad
        added = _added(bias, logq, dtype)
        grad = grad.to(dtype)
        if options.counts is not None:
            grad = sharding.group.gather_rows(grad, options.counts)
        # An ignored row is not computed with: it may hold a NaN.
        grad, users = grad.masked_fill(ignored, 0.0), users.masked_fill(ignored.unsqueeze(-1), 0.0)

        of_users = users.new_zeros(users.shape, dtype=dtype)
        of_rows = torch.zeros_like(rows) if needs[1] else None
        of_bias = rows.new_zeros(rows.shape[0], dtype=dtype) if needs[2] else None
        if sharding.count:
            share = (grad * (others - lse).exp()).masked_fill(ignored | (others == -INF), 0.0)
            if bool((share != 0.0).any()):
                fused = _fused_gradient(share, users, rows, added, ignored, others, options, needs[:2])
                of_users = fused[0].to(dtype) if needs[0] else of_users
                of_rows = fused[1] if needs[1] else None
                of_bias = fused[2] if needs[2] else None
            first = ids.new_tensor([HELD_OUT])
            of_held = (grad * (held - lse).exp()).masked_fill(ignored, 0.0)
            of_target = torch.where(own, (options.label_smoothing - 1.0) * grad, 0.0)
            # one number where the target is the item held out: they nearly cancel where p is near 1
            both = ids == HELD_OUT
            of_held, of_target = of_held + of_target.where(both, 0.0), of_target.masked_fill(both, 0.0)
            by_hand = [(of_held, first.expand_as(ids)), (of_target, ids)]
            if of_bias is not None:
                of_bias[HELD_OUT] = 0.0
            for weight, of_ids in by_hand:
                items = Logits.of(users, rows, added, of_ids, options.temperature).items
                of_users = of_users + weight.unsqueeze(-1) * items
                _add_to_items(of_rows, of_bias, weight, of_ids, users, added, options.temperature)
            if options.label_smoothing > 0.0:
                even = grad * (-options.label_smoothing / sharding.total)
                of_users = of_users + torch.outer(even, rows.sum(0, dtype=dtype) / options.temperature)
                if of_rows is not None:
                    of_rows += (even @ users.to(dtype) / options.temperature).to(rows.dtype)
                if of_bias is not None:
                    of_bias += even.sum()

            of_users = of_users.masked_fill(ignored.unsqueeze(-1), 0.0)  # of which an item may hold one

        if needs[0]:
            group = sharding.group
            summed = (
                group.sum(of_users) if options.counts is None else group.scatter_sum(of_users, options.counts)
            )
            of_users = summed.to(users.dtype)
        return (
            of_users if needs[0] else None,
            of_rows,
            None if of_bias is None else of_bias.to(bias.dtype),
            *[None] * 3,
        )


def _added(bias: Tensor | None, logq: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the items' logits, `[n]`."""
    if bias is None:
        return None if logq is None else -logq.to(dtype)
    return bias.to(dtype) if logq is None else bias.to(dtype) - logq.to(dtype)


def _without_held_out(rows: Tensor, added: Tensor | None) -> Tensor:
    """The bias that hides the held-out item."""
    added = rows.new_zeros(rows.shape[0], dtype=wide(rows.dtype)) if added is None else added.clone()
    added[HELD_OUT] = -INF
    return added


def _targets(ignored: Tensor) -> Tensor:
    return torch.full(ignored.shape, HELD_OUT, device=ignored.device).masked_fill(ignored, IGNORED)


def _others(users: Tensor, rows: Tensor, added: Tensor | None, ignored: Tensor, temperature: float) -> Tensor:
    """Log-sum-exp of all items of this rank but the one held out."""
    if rows.shape[0] == 1:
        return users.new_full(users.shape[:1], -INF, dtype=wide(users.dtype))
    bias = _without_held_out(rows, added)
    _, lse = ops.call(
        "catalog_cross_entropy",
        users,
        rows,
        _targets(ignored),
        temperature=temperature,
        bias=bias,
        ignore_index=IGNORED,
    )
    return lse


def _fused_gradient(
    share: Tensor,
    users: Tensor,
    rows: Tensor,
    added: Tensor | None,
    ignored: Tensor,
    others: Tensor,
    options: Options,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.call(
        "catalog_cross_entropy_backward",
        share,
        users,
        rows,
        _targets(ignored),
        others,
        temperature=options.temperature,
        bias=_without_held_out(rows, added),
        ignore_index=IGNORED,
        needs_users=needs[0],
        needs_table=needs[1],
    )


def _add_to_items(
    of_rows: Tensor | None,
    of_bias: Tensor | None,
    weight: Tensor,
    ids: Tensor,
    users: Tensor,
    added: Tensor | None,
    temperature: float,
) -> None:
    """Adds a row's gradient `weight` of the logit of item `ids` to the item's, in the order of the rows."""
    unique, place = ids.unique(return_inverse=True)

    def summed(x: Tensor) -> Tensor:
        # embedding's gradient: its sums have a fixed order on every device, index_add_'s have not
        return torch.ops.aten.embedding_dense_backward(x, place, len(unique), -1, False)

    if of_bias is not None:
        of_bias[unique] += summed(weight.unsqueeze(-1)).squeeze(-1)
    if of_rows is not None:
        if added is not None:
            weight = weight.masked_fill(added[ids] == -INF, 0.0)
        of_items = summed(weight.unsqueeze(-1) * users.to(weight.dtype)) / temperature
        of_rows[unique] = (of_rows[unique].to(weight.dtype) + of_items).to(of_rows.dtype)


def _refuse_second_order(what: str) -> None:
    # PyTorch runs a backward pass with its recording on only where it is to be differentiated again.
    if torch.is_grad_enabled():
        raise NotImplementedError(f"ShardedCatalog.{what} has no second-order gradient")


class Lookup(torch.autograd.Function):
    """Rows of the whole table `[T, D]` by global ids of this rank's (`counts`) or of all ranks (None)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, sharding: Sharding, counts: list[int] | None) -> Tensor:
        group = sharding.group
        every = ids if counts is None else group.gather_rows(ids, counts)
        own, places = sharding.owned(every)
        found = rows.new_zeros(*every.shape, rows.shape[1])
        if sharding.count:
            found = rows[places].where(own.unsqueeze(-1), 0.0)
        ctx.save_for_backward(own, places)
        ctx.sharding, ctx.counts, ctx.shape = sharding, counts, rows.shape
        # one rank has the row and the others add zeros
        return group.sum(found) if counts is None else group.scatter_sum(found, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order("lookup")
        own, places = ctx.saved_tensors
        if ctx.counts is not None:
            grad = ctx.sharding.group.gather_rows(grad, ctx.counts)
        if not ctx.sharding.count:
            return grad.new_zeros(ctx.shape), None, None, None
        grad = grad.where(own.unsqueeze(-1), 0.0)
        return (
            torch.ops.aten.embedding_dense_backward(grad, places, ctx.shape[0], -1, False),
            None,
            None,
            None,
        )
