"""`catalog_cross_entropy_backward`: with p the softmax, a row's logits have the gradient

    grad · (p - (1 - smoothing) [its own target] - smoothing / N)

and from it come those of users, table and bias, in two passes without atomics, which take the scores again:

- `_grad_users`: a block keeps a tile of rows and goes over one split of the items; `_finish_users` adds the
  splits up in their order, so that a row's gradient is the same bits in any batch.
- `_grad_items`: a block keeps a tile of items and goes over the rows (where items are few, over a part of
  them). With negatives these are the negatives' gradients; rows of the table are made of them and of the
  rows' own targets by `_collect`, which sums what belongs to one item in the order of a stable sort.

The smoothing's share is the same for every item and enters at the end, as a product with a sum of all items
or of all rows. The target's share does not: p - 1 is taken before it is rounded to the operands' dtype, as it
cancels.
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
    losses,
    not_hits,
    own_scores,
    row_sums,
    rows_of_call,
    sums_of_items,
)
from .launch import native_head_dim

# Rows whose partial sums, one for each split of the items, stand in memory at a time.
GROUP = 8192
# Blocks that the items' pass wants, and rows that one of them has at least.
BLOCKS, FEWEST_ROWS = 512, 512


# --- the rows' gradients ------------------------------------------------------------------------------------


@triton.jit
def _add_grad_user(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    ids, target, lse, rest, share = context[0], context[1], context[2], context[3], context[4]
    HAS_BIAS: tl.constexpr = context[5]
    SAMPLED: tl.constexpr = context[6]
    HAS_REST: tl.constexpr = context[7]
    GAIN: tl.constexpr = context[8]
    PRECISION: tl.constexpr = context[9]
    if SAMPLED:
        s = not_hits(s, ids, target, event, shown)
    if not HAS_BIAS:
        # Rounded as in the forward, where it is the lse of a row whose target takes all: no product may be
        # fused with what follows.
        s = tl.fma(s, tl.zeros_like(s) + unit, tl.zeros_like(s))
    x = s - lse[:, None]
    if HAS_REST:
        x -= rest[:, None]
    d = _weights(x, GAIN)
    if not SAMPLED:
        n = event + tl.arange(0, s.shape[1])
        d = tl.where(n[None, :] == target[:, None], d - share, d)
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
    rest,
    partial,
    factor,
    share,
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
    HAS_REST: tl.constexpr,
    GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a split of the items gives to a tile of rows, times 2^GAIN · temperature / grad, `[splits, T, D]`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < row_count
    own = tl.load(target + row, mask=valid, other=-1)
    of_row = tl.load(lse + row, mask=valid, other=float("inf"))
    rest_of_row = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_REST:
        rest_of_row = tl.load(rest + row, mask=valid, other=0.0)
    q = st.load_rows(users, row, row * 0, users_stride, 0, valid, D, BLOCK_D)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, item_count)
    (total,) = st.stream(
        _add_grad_user, (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),),
        (ids, own, of_row, rest_of_row, share, HAS_BIAS, SAMPLED, HAS_REST, GAIN, PRECISION),
        q, items, items_stride, bias, 1, factor, first, last, last, own, D, BLOCK_D, BLOCK_N, HAS_BIAS, False, PRECISION, 1.0,
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
    table_sum,
    grad_users,
    factor,
    even,
    row_count,
    splits,
    table_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLED: tl.constexpr,
    SMOOTHING: tl.constexpr,
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
    if SMOOTHING:
        d = tl.arange(0, BLOCK_D)
        total -= even * tl.load(table_sum + d, mask=d < D, other=0.0)[None, :]
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
    item, added, target, lse = context[0], context[1], context[2], context[3]
    rest, grad, share = context[4], context[5], context[6]
    NEEDS_TABLE: tl.constexpr = context[7]
    NEEDS_BIAS: tl.constexpr = context[8]
    SAMPLED: tl.constexpr = context[9]
    HAS_REST: tl.constexpr = context[10]
    GAIN: tl.constexpr = context[11]
    PRECISION: tl.constexpr = context[12]
    n = event + tl.arange(0, s.shape[1])
    hit = item[:, None] == tl.load(target + n, mask=shown, other=-1)[None, :]
    s = tl.fma(s, tl.zeros_like(s) + unit, tl.broadcast_to(added[:, None], s.shape))
    if SAMPLED:
        s = tl.where(hit, -float("inf"), s)
    x = s - tl.load(lse + n, mask=shown, other=float("inf"))[None, :]
    if HAS_REST:
        x -= tl.load(rest + n, mask=shown, other=0.0)[None, :]
    d = _weights(x, GAIN)
    if not SAMPLED:
        d = tl.where(hit, d - share, d)
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
    rest,
    grad,
    scale,
    users_sum,
    grad_sum,
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
    SMOOTHING: tl.constexpr,
    HAS_REST: tl.constexpr,
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
        (number, added, target, lse, rest, grad, share,
         NEEDS_TABLE, NEEDS_BIAS, SAMPLED, HAS_REST, GAIN, PRECISION),
        q, users, users_stride, users, 0, factor, first, last, last, item,
        D, BLOCK_D, BLOCK_N, False, False, PRECISION, 1.0,
        (items + item.to(tl.int64) * items_stride, shown),
    )  # fmt: skip
    total *= 2.0**-GAIN
    of_bias *= 2.0**-GAIN
    if SMOOTHING:
        d = tl.arange(0, BLOCK_D)
        here = tl.where(part == 0, even, 0.0)
        of_bias -= here * tl.load(grad_sum)
        total -= here * tl.load(users_sum + d, mask=d < D, other=0.0)[None, :]
    of_bias *= tl.load(scale)
    total *= tl.load(scale)
    if NEEDS_TABLE:
        grad_items += part.to(tl.int64) * item_count * D
        total = tl.where(shown[:, None], total * factor, 0.0)
        st.store_rows(grad_items, item, item * 0, D, 0, valid, total, D, BLOCK_D)
    if NEEDS_BIAS:
        at = grad_bias + part.to(tl.int64) * item_count + item
        tl.store(at, of_bias.to(grad_bias.dtype.element_ty), mask=valid)


# --- with negatives -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["row_count"])
def _own_changes(
    users,
    table,
    target,
    target_bias,
    lse,
    rest,
    grad,
    change,
    factor,
    row_count,
    users_stride,
    table_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the logits that rows have for their own targets, grad · (p - 1)."""
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    of_row = tl.load(lse + row, mask=row < row_count, other=float("inf"))
    kept = of_row != float("inf")
    q = st.load_rows(users, row, row * 0, users_stride, 0, kept, D, BLOCK_D)
    own = own_scores(
        q, users + row.to(tl.int64) * users_stride, kept, first, row_count, table, table_stride, target,
        target_bias, factor, D, BLOCK_D, BLOCK_N, HAS_BIAS, PRECISION,
    )  # fmt: skip
    if not HAS_BIAS:
        own = tl.fma(own, tl.zeros_like(own) + factor, tl.zeros_like(own))
    x = own - of_row
    if HAS_REST:
        x -= tl.load(rest + row, mask=kept, other=0.0)
    p = tl.exp2(x * st.LOG2E)
    d = tl.where(kept, tl.load(grad + row, mask=kept, other=0.0) * (p - 1.0), 0.0)
    tl.store(change + row, d, mask=row < row_count)


@triton.jit(do_not_specialize=["entries", "negatives", "table_count"])
def _collect(
    keys,
    order,
    of_negatives,
    bias_of_negatives,
    users,
    change,
    grad_table,
    grad_bias,
    factor,
    entries,
    negatives,
    table_count,
    users_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    NEEDS_TABLE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
):
    """One item's gradient from all entries with its key: negatives, numbers below `negatives`, and rows whose
    target it is. The block of the first of them sums them, ROWS at a time."""
    first = tl.program_id(0)
    key = tl.load(keys + first)
    before = tl.load(keys + first - 1, mask=first > 0, other=-1)
    if (key == before) | (key >= table_count):
        return
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    of_bias = tl.zeros((ROWS,), tl.float32)
    at = first
    more = True
    while more:
        e = at + tl.arange(0, ROWS)
        mine = tl.load(keys + e, mask=e < entries, other=-1) == key
        number = tl.load(order + e, mask=mine, other=0)
        negative = mine & (number < negatives)
        row = number - negatives
        d = tl.load(change + row, mask=mine & (row >= 0), other=0.0)
        if NEEDS_BIAS:
            of_bias += d + tl.load(bias_of_negatives + number, mask=negative, other=0.0)
        if NEEDS_TABLE:
            u = st.load_rows(users, row, row * 0, users_stride, 0, d != 0.0, D, BLOCK_D).to(tl.float32)
            total += (d * factor)[:, None] * u
            total += st.load_rows(of_negatives, number, number * 0, D, 0, negative, D, BLOCK_D)
        at += ROWS
        more = tl.sum(mine.to(tl.int32), 0) == ROWS
    if NEEDS_TABLE:
        d = tl.arange(0, BLOCK_D)
        tl.store(grad_table + key * D + d, tl.sum(total, 0).to(grad_table.dtype.element_ty), mask=d < D)
    if NEEDS_BIAS:
        tl.store(grad_bias + key, tl.sum(of_bias, 0).to(grad_bias.dtype.element_ty))


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

    `lse` is the forward's. 8 operations for each row, item and dimension (exact fp32: 10). Memory beside the
    results: a copy of the users, fp32 partial sums of GROUP rows for each split, and with negatives their rows
    and gradients.
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
    rest = _rest(rows, lse)
    change = None if rows.ids is None else _changes(rows, lse, rest, grad)
    if needs_users:
        _fill_users(grad_users, rows, lse, rest, grad, change, label_smoothing)
    needs = needs_table, bias is not None
    if not any(needs):
        return grad_users, users.new_empty(0), users.new_empty(0)
    dtypes = users.dtype, users.dtype if bias is None else bias.dtype
    of_items, of_bias = _item_gradients(rows, lse, rest, grad, label_smoothing, needs)
    if change is not None:
        keys = torch.cat([_keys(ids, items) for ids in (negatives, target)])
        of_items, of_bias = _collected(of_items, of_bias, rows, change, keys, dtypes, needs)
    of_items, of_bias = (
        x.to(dtype) if need else users.new_empty(0)
        for x, dtype, need in zip((of_items, of_bias), dtypes, needs, strict=True)
    )
    return grad_users, of_items, of_bias


def _fill_users(
    out: Tensor,
    rows: Rows,
    lse: Tensor,
    rest: Tensor | None,
    grad: Tensor,
    change: Tensor | None,
    smoothing: float,
) -> None:
    launch, constants = launch_for("catalog_cross_entropy_backward_users", rows)
    sampled, items, gain = rows.ids is not None, rows.items.shape[0], _gain(rows)
    table_sum = sums_of_items(rows)[0] if smoothing > 0.0 else None
    block_d, dim = constants["BLOCK_D"], constants["D"]
    for first in range(0, out.shape[0], GROUP):
        part = slice(first, first + GROUP)
        users, target = rows.users[part], rows.target[part]
        count = users.shape[0]
        partial = torch.empty(rows.splits, count, dim, dtype=torch.float32, device=out.device)
        if rows.splits:
            _grad_users[(triton.cdiv(count, launch.block_m), rows.splits)](
                users, rows.items, rows.ids, rows.bias, target, lse[part],
                None if rest is None else rest[part], partial, rows.factor,
                (1.0 - smoothing) * 2.0**gain, count, items, rows.split(launch.block_n), users.stride(0),
                rows.items.stride(0), HAS_BIAS=rows.bias is not None, SAMPLED=sampled,
                HAS_REST=rest is not None, GAIN=gain, **constants,
            )  # fmt: skip
        _finish_users[(triton.cdiv(count, 2048 // block_d),)](
            rows.table, target, lse[part], grad[part], change[part] if sampled else None, partial, table_sum,
            out[part], rows.factor, smoothing / items if smoothing else 0.0, count, rows.splits,
            rows.table.stride(0), D=dim, BLOCK_D=block_d, ROWS=2048 // block_d, SAMPLED=sampled,
            SMOOTHING=smoothing > 0.0, GAIN=gain,
        )  # fmt: skip


def _item_gradients(
    rows: Rows,
    lse: Tensor,
    rest: Tensor | None,
    grad: Tensor,
    smoothing: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """`(of the items [n, D], of their biases [n])`: fp32; the first in the users' dtype if it is the table's."""
    launch, constants = launch_for("catalog_cross_entropy_backward_table", rows)
    count, items, dim = rows.users.shape[0], rows.items.shape[0], constants["D"]
    sampled, even, gain = rows.ids is not None, smoothing / max(1, items), _gain(rows)
    tiles = triton.cdiv(items, launch.block_m)
    parts = max(1, min(BLOCKS // max(1, tiles), triton.cdiv(count, FEWEST_ROWS)))
    split = triton.cdiv(triton.cdiv(count, parts), launch.block_n) * launch.block_n
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
    sums = (row_sums(rows.users, grad), grad.sum()) if smoothing > 0.0 else (None, None)
    if tiles:
        _grad_items[(tiles, parts)](
            rows.users, rows.items, rows.ids, rows.bias, rows.target, lse, rest, grad, scale, *sums, of_items,
            of_bias, rows.factor, (1.0 - smoothing) * 2.0**gain, even, count, items, split,
            rows.users.stride(0), rows.items.stride(0), NEEDS_TABLE=needs[0], NEEDS_BIAS=needs[1],
            HAS_BIAS=rows.bias is not None, SAMPLED=sampled, SMOOTHING=smoothing > 0.0,
            HAS_REST=rest is not None, GAIN=gain, **constants,
        )  # fmt: skip
    return tuple(x[0] if parts == 1 else x.sum(0) for x in (of_items, of_bias))


def _gain(rows: Rows) -> float:
    """Weights are multiplied by 2^gain where they are operands: in fp16, in whose range most weights over a
    large table are not normal numbers."""
    return 14.0 if rows.users.dtype == torch.float16 else 0.0


def _rest(rows: Rows, lse: Tensor) -> Tensor | None:
    """What rounding has taken from lse, `[T]`, where products are exact: in fp32 it would be the gradients'
    largest error (1e-6 of a weight at lse = 20), and is worth the forward's operations once more."""
    if rows.users.dtype != torch.float32 or st.precision(torch.float32) != "ieee":
        return None
    _, again, rest = losses(rows, 0.0, with_rest=True)
    return torch.where(rows.ignored, 0.0, again - lse + rest)


def _changes(rows: Rows, lse: Tensor, rest: Tensor | None, grad: Tensor) -> Tensor:
    """[T]: see `_own_changes`. Its product is launched as the forward's, to the same bits."""
    launch, constants = launch_for("catalog_cross_entropy", rows)
    change = torch.empty_like(grad)
    _own_changes[(triton.cdiv(grad.shape[0], launch.block_m),)](
        rows.users, rows.table, rows.target, rows.target_bias, lse, rest, grad, change, rows.factor,
        grad.shape[0], rows.users.stride(0), rows.table.stride(0), HAS_BIAS=rows.bias is not None,
        HAS_REST=rest is not None, **constants,
    )  # fmt: skip
    return change


def _keys(ids: Tensor, items: int) -> Tensor:
    """Ids of items as they are, others (ignored ones too) as `items`."""
    ids = ids.long()
    return ids.where((ids >= 0) & (ids < items), items)


def _collected(
    of_items: Tensor,
    of_bias: Tensor,
    rows: Rows,
    change: Tensor,
    keys: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of the table and the bias from those of the negatives and of the rows' own targets."""
    items, dim = rows.table.shape
    grad_table = torch.zeros(items, dim if needs[0] else 0, dtype=dtypes[0], device=keys.device)
    grad_bias = torch.zeros(items if needs[1] else 0, dtype=dtypes[1], device=keys.device)
    keys, order = keys.sort(stable=True)
    block_d = native_head_dim(dim)
    _collect[(keys.shape[0],)](
        keys, order, of_items, of_bias, rows.users, change, grad_table, grad_bias, rows.factor, keys.shape[0],
        rows.items.shape[0], items, rows.users.stride(0), D=dim, BLOCK_D=block_d, ROWS=1024 // block_d,
        NEEDS_TABLE=needs[0], NEEDS_BIAS=needs[1], num_warps=1,
    )  # fmt: skip
    return grad_table, grad_bias
