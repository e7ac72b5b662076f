"""The streaming softmax: what every kernel that runs rows past a set of events shares.

A block has a tile of *rows* (candidates and heads of one user) and runs over the user's *events* tile by
tile. `stream` is that loop; a *step* function takes each tile of scores and adds it to a state, and is the
readout: the log-sum-exp, the weighted value, the weights, the heaviest events.

Scores are raw products (with a bias: products and bias in units of log2); times `factor` they are in units of
log2, so that `exp2` needs one fused multiply-add. `factor` is positive: `positive_scale` sees to it.

One order of summation, whatever else is in the batch: tiles are cut at multiples of BLOCK_N from the start of
a user's history, and rows share loads, never arithmetic. Where a product and a sum may or may not be fused,
`tl.fma` is written out, so that the masked loop and the plain one give the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
# The interpreter's bfloat16 products are wrong and it has no inline assembly.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


# --- on the host --------------------------------------------------------------------------------------------


def precision(dtype: torch.dtype) -> str:
    """How the products of `dtype` are taken: torch's setting for float32 is followed."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def rows_of(tensor: Tensor | None) -> Tensor | None:
    """The tensor with a contiguous last dimension, itself where it has one."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For tensors that kernels read without strides: offsets, lengths, and what a kernel wrote."""
    return tuple(x if x is None else x.contiguous() for x in tensors)


def strides(*tensors: Tensor | None) -> list[int]:
    """The strides of rows and heads of one tensor after another; zeros for one that is not there."""
    return [n for x in tensors for n in ((0, 0) if x is None else x.stride()[:2])]


def heads_together(group: int, block_m: int, key_bias: Tensor | None) -> int:
    """How many heads of a group share a tile of rows (PACK): all where they fit. With a bias it is one, so
    that the tile's bias is a vector."""
    return group if key_bias is None and group <= block_m else 1


def positive_scale(query: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """`(query, factor)` with `factor > 0` in units of log2: a negative scale's sign, or zero, goes into the
    query."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale > 0:
        return query, scale * LOG2E.value
    return (query * math.copysign(1.0, scale), -scale * LOG2E.value) if scale else (query * 0.0, 1.0)


# --- the jagged batch ---------------------------------------------------------------------------------------


@triton.jit
def user_range(offsets, user, total):
    """`(begin, end)` of a user's part of `total` rows, legal whatever the offsets hold."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + user).to(tl.int64), 0), total)
    end = tl.minimum(tl.maximum(tl.load(offsets + user + 1).to(tl.int64), begin), total)
    return begin, end


@triton.jit
def find_tile(tile, offsets, users, total, ROWS: tl.constexpr):
    """`(user, first, end)`: the rows of tile number `tile`, where no tile crosses a user's border.

    User b's tiles have numbers from `offsets[b] // ROWS + b` on, which leaves room for all of them, and fewer
    than `cdiv(total, ROWS) + users` are needed; a tile with `first >= end` has no rows. The user is the last
    one whose first tile is at or before `tile`. Each round of the search looks at 128 users at once: it costs
    a memory latency, and one round does for 128 users, two for 16 thousand.
    """
    SEARCH: tl.constexpr = 128
    low = tile * 0
    span = tl.maximum(users, 1)
    while span > 1:
        width = tl.cdiv(span, SEARCH)
        at = low + tl.arange(0, SEARCH) * width
        begin = tl.load(offsets + at, mask=at < low + span, other=0).to(tl.int64)
        before = (at < low + span) & (begin // ROWS + at <= tile)
        skipped = tl.maximum(tl.sum(before.to(tl.int32), 0), 1) - 1
        span = tl.minimum(width, span - skipped * width)
        low += skipped * width
    begin, end = user_range(offsets, low, total)
    first = begin + (tile - (begin // ROWS + low)) * ROWS
    return low, tl.maximum(first, begin), tl.where(first < begin, begin, end)


@triton.jit
def history(kv_offsets, kv_lengths, user, total, HAS_LENGTHS: tl.constexpr):
    """`(begin, room, length)`: where a user's events begin, how many it has room for, how many there are."""
    begin, end = user_range(kv_offsets, user, total)
    room = (end - begin).to(tl.int32)
    length = room
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(kv_lengths + user), 0), room).to(tl.int32)
    return begin, room, length


@triton.jit
def row_tile(first, end, head, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """`(candidates, heads, valid)`, each [BLOCK_M]: row r is candidate `first + r // PACK`, head `head + r %
    PACK`. BLOCK_M // PACK candidates make a tile."""
    r = tl.arange(0, BLOCK_M)
    candidates = first + r // PACK
    valid = (candidates < end) & (r < BLOCK_M // PACK * PACK)
    return candidates, head + r % PACK, valid


@triton.jit
def seen_events(visible, candidates, valid, length, HAS_VISIBLE: tl.constexpr):
    """`(seen [BLOCK_M], least, most)`: how many events each row sees, and the bounds of that over valid
    rows."""
    if HAS_VISIBLE:
        seen = tl.load(visible + candidates, mask=valid, other=0)
        seen = tl.minimum(tl.maximum(seen, 0), length).to(tl.int32)
        return seen, tl.min(tl.where(valid, seen, length), 0), tl.max(seen, 0)
    else:
        return tl.where(valid, length, 0), length, length


@triton.jit
def uniform(x):
    """The int32 `x`, which is the same in all threads, so that the compiler knows it: for a loop's bounds.

    It takes what comes out of a reduction for a number of each thread's own, reckons with warps that do not
    leave the loop together, and puts beside every shuffle in it a slow way, a call that costs registers.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [x], tl.int32, True, 1
        )


@triton.jit
def afresh(x):
    """The integer `x`, of which the compiler does not know that it is the same number: what is computed from
    it behind a loop is not taken from before the loop, through which it would be kept in registers.

    With it `target_attention` needs 134 registers in place of 212 where chunks run apart (A100, D = 64).
    """
    if INTERPRETED:
        return x
    elif x.dtype == tl.int64:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], tl.int64, False, 1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)


@triton.jit
def load_rows(base, rows, heads, row_stride, head_stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_M, BLOCK_D]` of a tensor `[rows, heads, D]`; zeros where not valid and beyond D."""
    d = tl.arange(0, BLOCK_D)
    at = base + (rows.to(tl.int64) * row_stride + heads.to(tl.int64) * head_stride)[:, None] + d[None, :]
    mask = valid[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(base, rows, heads, row_stride, head_stride, valid, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of `load_rows`, converted to what `base` points to."""
    d = tl.arange(0, BLOCK_D)
    at = base + (rows.to(tl.int64) * row_stride + heads.to(tl.int64) * head_stride)[:, None] + d[None, :]
    mask = valid[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_events(
    base, event, stride, shown, ALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr
):
    """`[N, BLOCK_D]`: events `event … + N` of `base`, whose rows lie `stride` apart.

    Zeros where not `shown` [N], whose memory is not read (ALL says that all are), and beyond D.
    """
    n, d = tl.arange(0, N), tl.arange(0, BLOCK_D)
    at = base + tl.cast(event, tl.int64) * stride + (n[:, None] * stride + d[None, :])
    if ALL:
        if D == BLOCK_D:
            return tl.load(at)
        else:
            return tl.load(at, mask=(d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(at, mask=shown[:, None], other=0.0)
    else:
        return tl.load(at, mask=shown[:, None] & (d < D)[None, :], other=0.0)


# --- products -----------------------------------------------------------------------------------------------


@triton.jit
def _nearest_tf32(x):
    """Rounded to the 10 bits of mantissa that a tf32 product reads; the hardware would cut them off."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in fp32; `a`, `b` of one dtype. PRECISION, of fp32 operands: "ieee" or "tf32"."""
    if INTERPRETED:
        # In float64: numpy's float32 products depend on which operand is which, a chip's do not.
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    elif a.dtype == tl.float32 and PRECISION == "tf32":
        return tl.dot(_nearest_tf32(a), _nearest_tf32(b), acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def products(a, a_at, a_valid, b, b_at, b_valid, D: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b.T` in fp32 of rows `a [M, BLOCK_D]` and `b [N, BLOCK_D]`, which are also given by pointers to
    them; only those pointers are used, or only the tiles."""
    if a.dtype != tl.float32 or PRECISION != "ieee" or INTERPRETED:
        return dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32), PRECISION)
    else:
        return exact_products(a_at, a_valid, b_at, b_valid, D)


@triton.jit
def exact_products(a_at, a_valid, b_at, b_valid, D: tl.constexpr):
    """The same of fp32 rows, 16 numbers of the head dim at a time; rows that are not valid count as zeros.

    In one `tl.dot` every thread holds its rows' whole reduction in registers: at D = 32 it spills, at D = 128
    it is 16 thousand instructions of spilling.
    """
    d = tl.arange(0, 16)
    s = tl.zeros((a_at.shape[0], b_at.shape[0]), tl.float32)
    for begin in tl.range(0, D, 16, num_stages=1):
        inside = (begin + d < D)[None, :]
        a = tl.load(a_at[:, None] + (begin + d)[None, :], mask=a_valid[:, None] & inside, other=0.0)
        b = tl.load(b_at[:, None] + (begin + d)[None, :], mask=b_valid[:, None] & inside, other=0.0)
        s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
    return s


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def any_non_finite(x, valid):
    """Whether a valid row of `x [M, D]` has a NaN or an infinity: a scalar, the same in the whole block."""
    return tl.max((valid[:, None] & ~is_finite(x)).to(tl.int32)) != 0


@triton.jit
def accumulate_seen(acc, p, v, seen, PRECISION: tl.constexpr):
    """`acc [M, D] + p [M, N] @ v [N, D]`, where row r takes nothing from event j unless `seen[r, j]`.

    p is 0 where not seen, which keeps a finite v out but not a NaN (0 * NaN is NaN). So elements of v that
    are not finite are left out of the product, and only where there are any, added row by row where seen:
    the same bits for a row that sees none of them.

    Slow where they are, and an extra look at v elsewhere. So kernels run unguarded first, look whether a
    result has a NaN, and only then do their rows again with this (`any_non_finite`).
    """
    finite = is_finite(v)
    acc = dot(p, tl.where(finite, v, tl.zeros_like(v)), acc, PRECISION)
    if tl.min(finite.to(tl.int32)) == 0:
        n = tl.arange(0, v.shape[0])
        for j in range(v.shape[0]):
            p_j = tl.sum(tl.where((n == j)[None, :], p.to(tl.float32), 0.0), 1)
            seen_j = tl.max((seen & (n == j)[None, :]).to(tl.int32), 1) != 0
            v_j = tl.sum(tl.where((n == j)[:, None], v.to(tl.float32), 0.0), 0)
            take = seen_j[:, None] & ~is_finite(v_j)[None, :]
            acc = tl.where(take, acc + p_j[:, None] * v_j[None, :], acc)
    return acc


# --- the softmax --------------------------------------------------------------------------------------------


@triton.jit
def mask_scores(
    s,
    bias,
    factor,
    event,
    shown,
    seen,
    HAS_BIAS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Products `s [M, N]` as scores: `(scores, unit)`, scores * unit in units of log2, -inf where hidden.

    `bias [N]`, in units of log2, is -inf where not shown. MASKED: some rows do not see some of the events.
    """
    unit = factor
    if HAS_BIAS:
        s = tl.fma(s, tl.zeros_like(s) + factor, tl.broadcast_to(bias[None, :], s.shape))
        unit = 1.0
    if MASKED:
        if HAS_VISIBLE:
            n = event + tl.arange(0, s.shape[1])
            s = tl.where(n[None, :] < seen[:, None], s, -float("inf"))
        elif not HAS_BIAS:
            s = tl.where(shown[None, :], s, -float("inf"))
    return s, unit


@triton.jit
def weights_of(s, unit, m):
    """`exp2(s * unit - m)` for `m [M]`; a row whose m is -inf has seen nothing and gets zeros."""
    base = tl.where(m == -float("inf"), 0.0, m)
    return tl.exp2(tl.fma(s, tl.zeros_like(s) + unit, tl.broadcast_to(-base[:, None], s.shape)))


@triton.jit
def softmax_step(m, l, s, unit):
    """Takes a tile of scores into the running maximum m and sum l: `(m, l, alpha, p)`.

    p [M, N] are the tile's weights relative to the new maximum; what was summed before has to be multiplied
    by alpha [M]. A row that sees nothing of the tile has alpha = 1 and p = 0.

    A bound known beforehand, |q| max|k|, in place of the maximum makes the loop 1.13 to 1.42 times as fast by
    the performance model (A100, D = 64 and 32), but costs a pass over the keys, and in every batch, because a
    row's bits may not depend on how many candidates come with it. It pays from 150 (A100, D = 32) or 330 to
    500 candidates a user on, and makes few candidates, which are bound by memory, up to 1.5 times slower.
    """
    highest = tl.maximum(m, tl.max(s, 1) * unit)
    p = weights_of(s, unit, highest)
    alpha = tl.where(m == highest, 1.0, tl.exp2(m - highest))  # -inf - -inf is NaN
    return highest, tl.fma(l, alpha, tl.sum(p, 1)), alpha, p


@triton.jit
def softmax_merge(m, l, acc, m_next, l_next, acc_next):
    """The softmax over two stretches of events as one; exactly the other one where one saw nothing."""
    highest = tl.maximum(m, m_next)
    a = tl.where(m == highest, 1.0, tl.exp2(m - highest))
    b = tl.where(m_next == highest, 1.0, tl.exp2(m_next - highest))
    acc = tl.fma(acc, tl.broadcast_to(a[:, None], acc.shape), acc_next * b[:, None])
    return highest, tl.fma(l, a, l_next * b), acc


@triton.jit
def softmax_end(m, l):
    """`(1 / l, lse)`, the log-sum-exp in nats; 0 and -inf for rows that saw nothing."""
    nothing = l == 0.0
    some = tl.where(nothing, 1.0, l)
    return tl.where(nothing, 0.0, 1.0 / some), tl.where(nothing, -float("inf"), (m + tl.log2(some)) * LN2)


@triton.jit
def self_slot(q, self_key, candidates, kv_head, row_stride, head_stride, valid, factor, D, BLOCK_D):
    """The softmax of rows before their first event, with a self slot: `(m, l)`, its score and 1, or 0 where
    that is -inf."""
    k = load_rows(self_key, candidates, kv_head + candidates * 0, row_stride, head_stride, valid, D, BLOCK_D)
    m = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * factor
    l = m - m + 1.0  # 1, but NaN where the score is: no event may come to bring it in
    return m, tl.where(m == -float("inf"), 0.0, l)


@triton.jit
def stream(
    STEP: tl.constexpr,
    state,
    context,
    q,
    key,
    key_stride,
    bias,
    bias_stride,
    factor,
    first,
    least,
    most,
    seen,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS_UNIT: tl.constexpr = LOG2E,
    q_at=None,
):
    """Runs rows `q [M, D]` over events `first … most` of a history and returns the last state.

    `key` and `bias` point to the history's event 0 (of the head); `first` is a multiple of BLOCK_N. All rows
    see the events before `least`, row r those before `seen[r]`, none those from `most` on: tiles up to
    `least` need no mask. `state` is a tuple; for each tile

        state = STEP(state, context, s, unit, k, event, shown, MASKED)

    with scores as from `mask_scores`, the keys `k [N, D]`, the number of the tile's first event in the
    history and `shown [N]`, the events that any row sees: what else is read of the others must be masked.

    BIAS_UNIT multiplies the bias; 1.0, and a factor without log2(e), make the scores natural. With `q_at =
    (pointers [M] to the rows of q, valid [M])` exact fp32 products go over the head dim piece by piece.
    """
    full = first + tl.maximum(least - first, 0) // BLOCK_N * BLOCK_N
    for event in range(first, full, BLOCK_N):
        state = _tile(
            STEP, state, context, q, key, key_stride, bias, bias_stride, factor, event, most, seen,
            D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, False, PRECISION, BIAS_UNIT, q_at,
        )  # fmt: skip
    for event in range(full, most, BLOCK_N):
        state = _tile(
            STEP, state, context, q, key, key_stride, bias, bias_stride, factor, event, most, seen,
            D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, True, PRECISION, BIAS_UNIT, q_at,
        )  # fmt: skip
    return state


@triton.jit
def _tile(
    STEP: tl.constexpr,
    state,
    context,
    q,
    key,
    key_stride,
    bias,
    bias_stride,
    factor,
    event,
    most,
    seen,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS_UNIT: tl.constexpr,
    q_at,
):
    ALL: tl.constexpr = not (HAS_BIAS or MASKED)
    bias_tile, shown = load_bias(bias, event, bias_stride, most, BLOCK_N, HAS_BIAS, MASKED, BIAS_UNIT)
    k = load_events(key, event, key_stride, shown, ALL, D, BLOCK_D, BLOCK_N)
    if q_at is None:
        s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION)
    else:
        k_at = key + tl.cast(event, tl.int64) * key_stride + tl.arange(0, BLOCK_N) * key_stride
        s = products(q, q_at[0], q_at[1], k, k_at, shown, D, PRECISION)
    s, unit = mask_scores(s, bias_tile, factor, event, shown, seen, HAS_BIAS, HAS_VISIBLE, MASKED)
    return STEP(state, context, s, unit, k, event, shown, MASKED)


@triton.jit
def load_bias(
    bias,
    event,
    stride,
    most,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS_UNIT: tl.constexpr = LOG2E,
):
    """`(bias [N] * BIAS_UNIT, shown [N])` of the events `event … + N`; those from `most` on, and those that a
    bias of -inf hides, are not shown."""
    n = event + tl.arange(0, N)
    shown = n < most
    tile = tl.zeros((N,), tl.float32)
    if HAS_BIAS:
        at = bias + n.to(tl.int64) * stride
        if MASKED:
            tile = tl.load(at, mask=shown, other=-float("inf")).to(tl.float32) * BIAS_UNIT
        else:
            tile = tl.load(at).to(tl.float32) * BIAS_UNIT
        shown = tile != -float("inf")
    return tile, shown
