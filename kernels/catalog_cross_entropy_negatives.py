"""What `catalog_cross_entropy_backward` needs with negatives: the gradients of the logits that rows have for
their own targets, and those of the table's rows from all that concerns them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import streaming as st
from .catalog_cross_entropy import Rows, launch_for, own_scores
from .launch import cdiv, most_registers, native_head_dim


@triton.jit(do_not_specialize=["row_count"])
def _own_changes(
    users,
    table,
    target,
    target_bias,
    lse,
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
    p = tl.exp2((own - of_row) * st.LOG2E)
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


def own_changes(rows: Rows, lse: Tensor, grad: Tensor) -> Tensor:
    """[T]: see `_own_changes`. Its product is launched as the forward's, to the same bits."""
    launch, constants = launch_for("catalog_cross_entropy", rows)
    change = torch.empty_like(grad)
    _own_changes[(cdiv(grad.shape[0], launch.block_m),)](
        rows.users, rows.table, rows.target, rows.target_bias, lse, grad, change, rows.factor,
        grad.shape[0], rows.users.stride(0), rows.table.stride(0), HAS_BIAS=rows.bias is not None,
        **constants,
    )  # fmt: skip
    return change


def keys_of(ids: Tensor, items: int) -> Tensor:
    """Ids of items as they are, others (ignored ones too) as `items`."""
    ids = ids.long()
    return ids.where((ids >= 0) & (ids < items), items)


def collected(
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
        NEEDS_TABLE=needs[0], NEEDS_BIAS=needs[1], num_warps=1, maxnreg=most_registers(1),
    )  # fmt: skip
    return grad_table, grad_bias
