"""`catalog_cross_entropy_backward`: with p the softmax, a row's logits have the gradient

    grad · (p - (1 - smoothing) [its own target] - smoothing / N)

and from it come those of users, table and bias, in two passes without atomics, which take the scores again:

- `_grad_users`: a block keeps a tile of rows and goes over one split of the items; `_finish_users` adds the
  splits up in their order, so that a row's gradient is the same bits in any batch.
- `_grad_items`: a block keeps a tile of items and goes over the rows (where items are few, over a part of
  them). With negatives these are the negatives' gradients; rows of the table are made of them and of the
  rows' own targets by `_collect`, which sums what belongs to one item in the order of a stable sort.

The target's share is subtracted before a weight is rounded to the operands' dtype, because p - 1 cancels. So
is the smoothing's: outside of the loop, as a product with a sum of all rows, it left 1e-7 where the exact sum
is 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import streaming as st
from .catalog_cross_entropy import (
    Rows,
    launch_for,
    not_hits,
    rows_of_call,
)
from .catalog_cross_entropy_negatives import collected, keys_of, own_changes
from .launch import cdiv

# Rows whose partial sums, one for each split of the items, stand in memory at a time.
GROUP = 8192
# Blocks that the items' pass wants, and rows that one of them has at least.
BLOCKS, FEWEST_ROWS = 512, 512


# --- the rows' gradients ------------------------------------------------------------------------------------


@triton.jit
def _add_grad_user(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    ids, target, lse, share, even = context[0], context[1], context[2], context[3], context[4]
    HAS_BIAS: tl.constexpr = context[5]
    SAMPLED: tl.constexpr = context[6]
    GAIN: tl.constexpr = context[7]
    PRECISION: tl.constexpr = context[8]
    if SAMPLED:
        s = not_hits(s, ids, target, event, shown)
    if not HAS_BIAS:
        # Rounded as in the forward, where it is the lse of a row whose target takes all: no product may be
        # fused with what follows.
        s = tl.fma(s, tl.zeros_like(s) + unit, tl.zeros_like(s))
    d = _weights(s - lse[:, None], GAIN)
    if not SAMPLED:
        n = event + tl.arange(0, s.shape[1])
        d -= tl.where(n[None, :] == target[:, None], share, even)
    return (st.dot(d.to(k.dtype), k, state[0], PRECISION),)


@triton.jit
def _weights(x, GAIN: tl.constexpr):
    """exp(x) · 2^GAIN. (In the exponent a gain costs nothing; but it rounds as a number of its size does.)"""
    if GAIN == 0.0:
        return tl.exp2(x * st.LOG2E)
    else:
        return tl.exp2(tl.fma(x, tl.zeros_like(x) + st.LOG2E, tl.full(x.shape, GAIN, tl.float32)))


@triton.jit(do_not_specialize=["row_count", "item_count", "split"])
def _grad_users(
    users,
    items,
    ids,
    bias,
    target,
    lse,
    partial,
    factor,
    share,
    even,
    row_count,
    item_count,
    split,
    users_stride,
    items_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAMPLED: tl.constexpr,
    GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From a split of the items to a tile of rows, `[splits, T, D]`, times 2^GAIN · temperature / grad."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < row_count
    own = tl.load(target + row, mask=valid, other=-1)
    of_row = tl.load(lse + row, mask=valid, other=float("inf"))
    q = st.load_rows(users, row, row * 0, users_stride, 0, valid, D, BLOCK_D)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, item_count)
    (total,) = st.stream(
        _add_grad_user, (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),),
        (ids, own, of_row, share, even, HAS_BIAS, SAMPLED, GAIN, PRECISION),
        q, items, items_stride, bias, 1, factor, first, last, last, own,
        D, BLOCK_D, BLOCK_N, HAS_BIAS, False, PRECISION, 1.0,
        (users + row.to(tl.int64) * users_stride, valid),
    )  # fmt: skip
    partial += tl.program_id(1).to(tl.int64) * row_count * D
    st.store_rows(partial, row, row * 0, D, 0, valid, total, D, BLOCK_D)


@triton.jit(do_not_specialize=["row_count", "splits"])
def _finish_users(
    table,
    target,
    lse,
    grad,
    change,
    partial,
    grad_users,
    factor,
    row_count,
    splits,
    table_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLED: tl.constexpr,
    GAIN: tl.constexpr,
):
    """The gradients of rows from what the splits gave; ignored ones, with lse = inf, get zeros."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = tl.load(lse + row, mask=row < row_count, other=float("inf")) != float("inf")
    g = tl.load(grad + row, mask=kept, other=0.0)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for split in range(splits):
        at = partial + tl.cast(split, tl.int64) * row_count * D
        total += st.load_rows(at, row, row * 0, D, 0, kept, D, BLOCK_D)
    total *= 2.0**-GAIN
    total *= g[:, None]
    if SAMPLED:
        item = tl.load(target + row, mask=kept, other=0)
        own = st.load_rows(table, item, item * 0, table_stride, 0, kept, D, BLOCK_D)
        total += tl.load(change + row, mask=kept, other=0.0)[:, None] * own.to(tl.float32)
    total = tl.where(kept[:, None], total * factor, 0.0)
    st.store_rows(grad_users, row, row * 0, D, 0, row < row_count, total, D, BLOCK_D)


# --- the items' gradients -----------------------------------------------------------------------------------


@triton.jit
def _add_grad_item(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    """Scores `s [items, rows]`, `k [rows, D]`."""
    total, of_bias = state
    item, added, target = context[0], context[1], context[2]
    lse, grad, share, even = context[3], context[4], context[5], context[6]
    NEEDS_TABLE: tl.constexpr = context[7]
    NEEDS_BIAS: tl.constexpr = context[8]
    SAMPLED: tl.constexpr = context[9]
    GAIN: tl.constexpr = context[10]
    PRECISION: tl.constexpr = context[11]
    n = event + tl.arange(0, s.shape[1])
    hit = item[:, None] == tl.load(target + n, mask=shown, other=-1)[None, :]
    s = tl.fma(s, tl.zeros_like(s) + unit, tl.broadcast_to(added[:, None], s.shape))
    if SAMPLED:
        s = tl.where(hit, -float("inf"), s)
    d = _weights(s - tl.load(lse + n, mask=shown, other=float("inf"))[None, :], GAIN)
    if not SAMPLED:
        d -= tl.where(hit, share, even)
    d *= tl.load(grad + n, mask=shown, other=0.0)[None, :]
    if NEEDS_BIAS:
        of_bias += tl.sum(d, 1)
    if NEEDS_TABLE:
        total = st.dot(d.to(k.dtype), k, total, PRECISION)
    return total, of_bias


@triton.jit(do_not_specialize=["row_count", "item_count", "split"])
def _grad_items(
    users,
    items,
    ids,
    bias,
    target,
    lse,
    grad,
    scale,
    grad_items,
    grad_bias,
    factor,
    share,
    even,
    row_count,
    item_count,
    split,
    users_stride,
    items_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEEDS_TABLE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAMPLED: tl.constexpr,
    GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a part of the rows gives to a tile of items: `[parts, n, D]` and `[parts, n]`."""
    item = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    valid = item < item_count
    shown = valid
    added = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + item, mask=valid, other=-float("inf"))
        shown = added != -float("inf")
    number = item
    if SAMPLED:
        number = tl.load(ids + item, mask=valid, other=-2)
    q = st.load_rows(items, item, item * 0, items_stride, 0, shown, D, BLOCK_D)
    first = part * split
    last = tl.minimum(first + split, row_count)
    total, of_bias = st.stream(
        _add_grad_item, (tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32)),
        (number, added, target, lse, grad, share, even,
         NEEDS_TABLE, NEEDS_BIAS, SAMPLED, GAIN, PRECISION),
        q, users, users_stride, users, 0, factor, first, last, last, item,
        D, BLOCK_D, BLOCK_N, False, False, PRECISION, 1.0,
        (items + item.to(tl.int64) * items_stride, shown),
    )  # fmt: skip
    gain = tl.load(scale) * 2.0**-GAIN
    total *= gain
    of_bias *= gain
    if NEEDS_TABLE:
        grad_items += part.to(tl.int64) * item_count * D
        total = tl.where(shown[:, None], total * factor, 0.0)
        st.store_rows(grad_items, item, item * 0, D, 0, valid, total, D, BLOCK_D)
    if NEEDS_BIAS:
        at = grad_bias + part.to(tl.int64) * item_count + item
        tl.store(at, of_bias.to(grad_bias.dtype.element_ty), mask=valid)


# --- on the host --------------------------------------------------------------------------------------------


def catalog_cross_entropy_backward(
    grad_loss: Tensor,
    users: Tensor,
    table: Tensor,
    target: Tensor,
    lse: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logq: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    negatives: Tensor | None = None,
    in_batch: bool = False,
    needs_users: bool = True,
    needs_table: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(grad_users, grad_table, grad_bias)`; of shape [0] what is not needed or, without a bias, not there.

    `lse` is the forward's. 8 operations for each row, item and dimension. Memory beside the
    results: a copy of the users, fp32 partial sums of GROUP rows for each split, and with negatives their
    rows and gradients.
    """
    items = table.shape[0]
    grad_users = users.new_empty(users.shape if needs_users else 0)
    if users.shape[0] == 0 or items == 0:
        grad_table = table.new_zeros(table.shape if needs_table else 0)
        return grad_users.zero_(), grad_table, users.new_zeros(0) if bias is None else torch.zeros_like(bias)
    rows = rows_of_call(users, table, target, temperature, bias, logq, ignore_index, negatives, in_batch)
    # Of an ignored row nothing is computed with: a user of zeros, and exp(score - inf) for a weight.
    rows = replace(rows, users=rows.users.masked_fill(rows.ignored[:, None], 0.0))
    lse = lse.masked_fill(rows.ignored, torch.inf).contiguous()
    grad = grad_loss.float().masked_fill(rows.ignored, 0.0).contiguous()
    change = None if rows.ids is None else own_changes(rows, lse, grad)
    if needs_users:
        _fill_users(grad_users, rows, lse, grad, change, label_smoothing)
    needs = needs_table, bias is not None
    if not any(needs):
        return grad_users, users.new_empty(0), users.new_empty(0)
    dtypes = users.dtype, users.dtype if bias is None else bias.dtype
    of_items, of_bias = _item_gradients(rows, lse, grad, label_smoothing, needs)
    if change is not None:
        keys = torch.cat([keys_of(ids, items) for ids in (negatives, target)])
        of_items, of_bias = collected(of_items, of_bias, rows, change, keys, dtypes, needs)
    of_items, of_bias = (
        x.to(dtype) if need else users.new_empty(0)
        for x, dtype, need in zip((of_items, of_bias), dtypes, needs, strict=True)
    )
    return grad_users, of_items, of_bias


def _fill_users(
    out: Tensor,
    rows: Rows,
    lse: Tensor,
    grad: Tensor,
    change: Tensor | None,
    smoothing: float,
) -> None:
    launch, constants = launch_for("catalog_cross_entropy_backward_users", rows)
    sampled, items, gain = rows.ids is not None, rows.items.shape[0], _gain(rows)
    block_d, dim = constants["BLOCK_D"], constants["D"]
    for first in range(0, out.shape[0], GROUP):
        part = slice(first, first + GROUP)
        users, target = rows.users[part], rows.target[part]
        count = users.shape[0]
        partial = torch.empty(rows.splits, count, dim, dtype=torch.float32, device=out.device)
        if rows.splits:
            _grad_users[(cdiv(count, launch.block_m), rows.splits)](
                users, rows.items, rows.ids, rows.bias, target, lse[part],
                partial, rows.factor,
                *_shares(rows, smoothing), count, items,
                rows.split(launch.block_n), users.stride(0),
                rows.items.stride(0), HAS_BIAS=rows.bias is not None, SAMPLED=sampled,
                GAIN=gain, **constants,
            )  # fmt: skip
        _finish_users[(cdiv(count, 2048 // block_d),)](
            rows.table, target, lse[part], grad[part], change[part] if sampled else None, partial,
            out[part], rows.factor, count, rows.splits,
            rows.table.stride(0), D=dim, BLOCK_D=block_d, ROWS=2048 // block_d, SAMPLED=sampled,
            GAIN=gain,
        )  # fmt: skip


def _item_gradients(
    rows: Rows,
    lse: Tensor,
    grad: Tensor,
    smoothing: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """`(of the items [n, D], of their biases [n])`, fp32; of a table in the users' dtype where it can be."""
    launch, constants = launch_for("catalog_cross_entropy_backward_table", rows)
    count, items, dim = rows.users.shape[0], rows.items.shape[0], constants["D"]
    sampled, gain = rows.ids is not None, _gain(rows)
    tiles = cdiv(items, launch.block_m)
    parts = max(1, min(BLOCKS // max(1, tiles), cdiv(count, FEWEST_ROWS)))
    split = cdiv(cdiv(count, parts), launch.block_n) * launch.block_n
    final = parts == 1 and not sampled
    of_items = torch.empty(
        parts,
        items,
        dim if needs[0] else 0,
        dtype=rows.users.dtype if final else torch.float32,
        device=grad.device,
    )
    of_bias = torch.empty(parts, items if needs[1] else 0, dtype=torch.float32, device=grad.device)
    scale = torch.ones((), device=grad.device)
    if rows.users.dtype == torch.float16:  # whose range the product of a weight and a gradient may leave
        scale = grad.abs().amax()
        scale = scale.where(scale > 0.0, 1.0)
        grad = grad / scale
    if tiles:
        _grad_items[(tiles, parts)](
            rows.users, rows.items, rows.ids, rows.bias, rows.target, lse, grad, scale, of_items,
            of_bias, rows.factor, *_shares(rows, smoothing), count, items,
            split,
            rows.users.stride(0), rows.items.stride(0), NEEDS_TABLE=needs[0], NEEDS_BIAS=needs[1],
            HAS_BIAS=rows.bias is not None, SAMPLED=sampled,
            GAIN=gain, **constants,
        )  # fmt: skip
    return tuple(x[0] if parts == 1 else x.sum(0) for x in (of_items, of_bias))


def _shares(rows: Rows, smoothing: float) -> tuple[float, float]:
    """What is subtracted from the weight of a row's own target, and from each other one."""
    even = smoothing / rows.items.shape[0]
    return (1.0 - smoothing + even) * 2.0 ** _gain(rows), even * 2.0 ** _gain(rows)


def _gain(rows: Rows) -> float:
    """Weights are multiplied by 2^gain where they are operands: in fp16, in whose range most weights over a
    large table are not normal numbers."""
    return 14.0 if rows.users.dtype == torch.float16 else 0.0
