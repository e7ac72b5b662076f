"""`catalog_cross_entropy`, forward: the readout of the streaming softmax that keeps the log-sum-exp alone.

Rows are training positions, events the items: the whole table, or with negatives their gathered rows, and
then a row's own target stands beside them like a self slot. The items are cut into splits by their number
alone, a block for each tile of rows and each split, and `_losses` merges a row's splits in their order: a
row's loss is the same bits in any batch.

Scores are in nats, or raw products that are a factor away from them, and a row's own target gets its score
from the same product. So where the target takes all, the loss is 0 exactly, however large the logits.

Label smoothing is not part of any loop. The mean of a row's logits is one product with the sum of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import streaming as st
from .launch import Launch, cdiv, most_registers, native_head_dim, parameters

# The items are cut into at most MOST_SPLITS of at least FEWEST_ITEMS: enough blocks for a chip where rows are
# few, and little to merge.
MOST_SPLITS, FEWEST_ITEMS = 32, 2048
SUMMED = 256  # rows that one block of `row_sums` adds up, at least


# --- on the host --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A call's rows and items in the form that the kernels take."""

    users: Tensor  # [T, D]
    table: Tensor  # [N, D]
    items: Tensor  # [n, D]: the table or the negatives' rows of it
    ids: Tensor | None  # [n] of the negatives
    bias: Tensor | None  # [n] fp32, what is added to an item's logit; -inf hides it
    target: Tensor  # [T], within the table
    target_bias: Tensor | None  # [T], as bias
    ignored: Tensor  # bool [T]
    factor: float  # 1 / temperature

    @property
    def splits(self) -> int:
        """How many splits of the items there are."""
        return min(MOST_SPLITS, -(-self.items.shape[0] // FEWEST_ITEMS))

    def split(self, block: int) -> int:
        """Items of a split, a multiple of `block`."""
        return -(-self.items.shape[0] // max(1, self.splits) // block) * block


def rows_of_call(
    users: Tensor,
    table: Tensor,
    target: Tensor,
    temperature: float,
    bias: Tensor | None,
    logq: Tensor | None,
    ignore_index: int,
    negatives: Tensor | None,
    in_batch: bool,
) -> Rows:
    """Ids are clamped, so that one outside the table is not read through. The table must have items."""
    ignored, last = target == ignore_index, table.shape[0] - 1
    table, within = st.rows_of(table), target.long().clamp(0, last)
    ids = None if negatives is None else negatives.long().clamp(0, last)
    added, of_target = _added(bias, logq, ids), _added(bias, logq, within)
    if in_batch:
        zeros = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        added = (zeros if added is None else added).masked_fill(negatives == ignore_index, -torch.inf)
        of_target = zeros if of_target is None else of_target  # the negatives are the targets: [T]
    # A copy of the negatives' rows: as many bytes as one tile of rows reads of them, and every loop runs over
    # consecutive memory.
    items = table if ids is None else table.index_select(0, ids)
    return Rows(
        st.rows_of(users), table, items, ids, added, within, of_target, ignored, 1 / temperature,
    )  # fmt: skip


def _added(bias: Tensor | None, logq: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """`bias - logq` of the items `ids`, or of all."""
    bias, logq = (
        None if x is None else (x if ids is None else x.index_select(0, ids)).float() for x in (bias, logq)
    )
    if bias is None:
        return None if logq is None else -logq
    return (bias if logq is None else bias - logq).contiguous()


def launch_for(kernel: str, rows: Rows) -> tuple[Launch, dict[str, object]]:
    """A kernel's launch parameters, and the constants that all of them take."""
    dim, dtype = rows.users.shape[1], rows.users.dtype
    launch = parameters(kernel, head_dim=dim, dtype=dtype, bias=rows.bias is not None)
    return launch, {
        "D": dim,
        "BLOCK_D": native_head_dim(dim),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PRECISION": st.precision(dtype),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": most_registers(launch.num_warps),
    }


def row_sums(x: Tensor, weight: Tensor) -> Tensor:
    """`Σ weight[r] · x[r]`, fp32 `[D]`, of `x [n, D]`, `weight [n]` fp32; rows of weight 0 are not read."""
    count, dim = x.shape
    parts = min(128, -(-count // SUMMED))
    partial = torch.empty(parts, dim, dtype=torch.float32, device=x.device)
    if parts:
        block_d = native_head_dim(dim)
        _row_sums[(parts,)](
            x, weight, partial, count, -(-count // parts), x.stride(0),
            D=dim, BLOCK_D=block_d, ROWS=4096 // block_d, maxnreg=most_registers(4),
        )  # fmt: skip
    return partial.sum(0)


def sums_of_items(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """`(Σ item [D], Σ bias, a scalar)`, both over all items; those that the bias hides are not read."""
    if rows.bias is None:
        return row_sums(rows.items, torch.ones(rows.items.shape[0], device=rows.items.device)), None
    return row_sums(rows.items, (rows.bias != -torch.inf).float()), rows.bias.sum()


# --- kernels ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "span"])
def _row_sums(
    x, weight, partial, count, span, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, count)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for row in range(first, last, ROWS):
        r = row + tl.arange(0, ROWS)
        w = tl.load(weight + r, mask=r < last, other=0.0)
        tile = st.load_events(x, row, stride, w != 0.0, False, D, BLOCK_D, ROWS)
        total = tl.fma(tile.to(tl.float32), tl.broadcast_to(w[:, None], total.shape), total)
    d = tl.arange(0, BLOCK_D)
    tl.store(partial + tl.program_id(0) * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit
def not_hits(s, ids, target, event, shown):
    """Scores `s [rows, items]` with -inf where an item is the row's own target, an accidental hit."""
    n = event + tl.arange(0, s.shape[1])
    item = tl.load(ids + n, mask=shown, other=-1)
    return tl.where(item[None, :] == target[:, None], -float("inf"), s)


@triton.jit
def _log_sum(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    m, l = state
    ids, target = context[0], context[1]
    SAMPLED: tl.constexpr = context[2]
    if SAMPLED:
        s = not_hits(s, ids, target, event, shown)
    highest = tl.maximum(m, tl.max(s, 1))
    base = tl.where(highest == -float("inf"), 0.0, highest)
    # The difference first: 0 for the highest score, whatever the rounding of a product with the unit.
    p = tl.exp2((s - base[:, None]) * (unit * st.LOG2E))
    alpha = tl.where(m == highest, 1.0, tl.exp2((m - highest) * (unit * st.LOG2E)))  # -inf - -inf is NaN
    return highest, tl.fma(l, alpha, tl.sum(p, 1))


@triton.jit(do_not_specialize=["row_count", "item_count", "split"])
def _log_sums(
    users,
    items,
    ids,
    bias,
    target,
    ignored,
    maxima,
    sums,
    factor,
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
    PRECISION: tl.constexpr,
):
    """Maximum and Σ exp(z - maximum) of a tile of rows over one split of the items, `[splits, T]` each."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = tl.load(ignored + row, mask=row < row_count, other=1) == 0
    if tl.max(kept.to(tl.int32), 0) == 0:
        return
    own = tl.load(target + row, mask=kept, other=-1)
    q = st.load_rows(users, row, row * 0, users_stride, 0, kept, D, BLOCK_D)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, item_count)
    m, l = st.stream(
        _log_sum, (tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)),
        (ids, own, SAMPLED), q, items, items_stride, bias, 1, factor, first, last, last, own,
        D, BLOCK_D, BLOCK_N, HAS_BIAS, False, PRECISION, 1.0,
        (users + row.to(tl.int64) * users_stride, kept),
    )  # fmt: skip
    at = tl.program_id(1).to(tl.int64) * row_count + row
    tl.store(maxima + at, m, mask=kept)
    tl.store(sums + at, l, mask=kept)


@triton.jit
def own_scores(
    q,
    q_at,
    kept,
    first,
    row_count,
    table,
    table_stride,
    target,
    target_bias,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [M] of rows `first …` for their own targets, the same bits as the loops over the items find: the
    diagonal of the rows' product with their targets."""
    M: tl.constexpr = q.shape[0]
    own = tl.zeros((M,), tl.float32)
    for begin in tl.range(0, M, BLOCK_N, num_stages=1):
        column = begin + tl.arange(0, BLOCK_N)
        there = (column < M) & (first + column < row_count)
        item = tl.load(target + first + column, mask=there, other=0)
        added = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_BIAS:
            added = tl.load(target_bias + first + column, mask=there, other=0.0)
            there = there & (added != -float("inf"))
        k = st.load_rows(table, item, item * 0, table_stride, 0, there, D, BLOCK_D)
        s = st.products(q, q_at, kept, k, table + item * table_stride, there, D, PRECISION)
        s, _ = st.mask_scores(s, added, factor, 0, there, item, HAS_BIAS, False, False)
        own += tl.sum(tl.where(tl.arange(0, M)[:, None] == column[None, :], s, 0.0), 1)
    return own


@triton.jit(do_not_specialize=["row_count", "table_count", "splits"])
def _losses(
    users,
    table,
    target,
    target_bias,
    ignored,
    maxima,
    sums,
    table_sum,
    bias_sum,
    loss,
    lse,
    factor,
    smoothing,
    row_count,
    table_count,
    splits,
    users_stride,
    table_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAMPLED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A row's splits merged in their order, and its loss."""
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    kept = tl.load(ignored + row, mask=row < row_count, other=1) == 0
    q = st.load_rows(users, row, row * 0, users_stride, 0, kept, D, BLOCK_D)
    own = own_scores(
        q, users + row.to(tl.int64) * users_stride, kept, first, row_count, table, table_stride, target,
        target_bias, factor, D, BLOCK_D, BLOCK_N, HAS_BIAS, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        unit = 1.0
    else:
        unit = factor
    if SAMPLED:
        m = own
        l = tl.where(own == -float("inf"), 0.0, own - own + 1.0)  # NaN where the score is
    else:
        m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * row_count + row
        m_next = tl.load(maxima + at, mask=kept, other=-float("inf"))
        l_next = tl.load(sums + at, mask=kept, other=0.0)
        highest = tl.maximum(m, m_next)
        a = tl.where(m == highest, 1.0, tl.exp2((m - highest) * (unit * st.LOG2E)))
        b = tl.where(m_next == highest, 1.0, tl.exp2((m_next - highest) * (unit * st.LOG2E)))
        m, l = highest, tl.fma(l, a, l_next * b)
    log_l = tl.log(tl.where(l == 0.0, 1.0, l))
    of_row = (m - own) * unit + log_l
    if SMOOTHING:
        d = tl.arange(0, BLOCK_D)
        total = tl.load(table_sum + d, mask=d < D, other=0.0)
        mean = tl.sum(q.to(tl.float32) * total[None, :], 1) * factor
        if HAS_BIAS:
            mean += tl.load(bias_sum)
        of_row += smoothing * (own * unit - mean / table_count)
    tl.store(loss + row, tl.where(kept, of_row, 0.0), mask=row < row_count)
    # Rounded before the sum, as the backward's scores are: where l is 1, it finds weights of exactly 1.
    highest = tl.fma(m, tl.zeros_like(m) + unit, tl.zeros_like(m))
    of_row = tl.where(kept & (l != 0.0), highest + log_l, -float("inf"))
    tl.store(lse + row, of_row, mask=row < row_count)


def catalog_cross_entropy(
    users: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logq: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    negatives: Tensor | None = None,
    in_batch: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(loss [T], lse [T])`, fp32, of `users [T, D]` over `table [N, D]`; D at most 256.

    Ignored rows have loss 0 and lse -inf. Memory beside the results: 8 bytes for each row and split, and with
    negatives their rows.
    """
    if users.shape[0] == 0 or table.shape[0] == 0:  # without items every row is ignored
        loss = torch.zeros(users.shape[0], dtype=torch.float32, device=users.device)
        return loss, torch.full_like(loss, -torch.inf)
    rows = rows_of_call(users, table, target, temperature, bias, logq, ignore_index, negatives, in_batch)
    launch, constants = launch_for("catalog_cross_entropy", rows)
    constants |= {"HAS_BIAS": rows.bias is not None, "SAMPLED": rows.ids is not None}
    count = users.shape[0]
    tiles = cdiv(count, launch.block_m)
    loss, lse = (torch.empty(count, dtype=torch.float32, device=users.device) for _ in range(2))
    maxima, sums = torch.empty(2, rows.splits, count, dtype=torch.float32, device=users.device)
    if rows.splits:
        _log_sums[(tiles, rows.splits)](
            rows.users, rows.items, rows.ids, rows.bias, rows.target, rows.ignored, maxima, sums, rows.factor,
            count, rows.items.shape[0], rows.split(launch.block_n), rows.users.stride(0),
            rows.items.stride(0), **constants,
        )  # fmt: skip
    table_sum, bias_sum = sums_of_items(rows) if label_smoothing > 0.0 else (None, None)
    _losses[(tiles,)](
        rows.users, rows.table, rows.target, rows.target_bias, rows.ignored, maxima, sums, table_sum,
        bias_sum, loss, lse, rows.factor, label_smoothing, count, rows.table.shape[0], rows.splits,
        rows.users.stride(0), rows.table.stride(0), SMOOTHING=label_smoothing > 0.0, **constants,
    )  # fmt: skip
    return loss, lse
