"""`target_attention_backward`: the gradients of `target_attention`, in two passes without atomics.

With P = exp(s - lse), dP = dO·Vᵀ and, for each row, shift = Σ_d dO·out - grad_lse:

    dS = P ∘ (dP - shift),   dQ = scale · dS·K,   dK = scale · dSᵀ·Q,   dV = Pᵀ·dO,   dbias = Σ_rows dS

(Dao et al. 2022, FlashAttention, algorithm 4). Either pass computes the scores again:

- `_rows`: a block has a tile of rows, streams over the events that they see and adds up dQ. It leaves what
  the others need to know of each row (`_state_of`).
- `_events`: a block has a tile of events, runs over the rows that see them and adds up dK, dV and dbias.
- `_self_slots`, where there are any: dK and dV of each candidate's own slot, over the heads that share it.

Every sum is made by one block, in an order that depends on places within the user's history or among its
candidates only: the gradients of a user are the same bits in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import streaming as st
from .launch import native_head_dim, parameters


@triton.jit
def _add_grad_query(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    """The readout of the rows' pass: adds dS·K. `state` is `(grad, shift, total)`.

    `grad` is dQ / scale and `total` the sum of the weights, kept for fp32 only.
    """
    grad, shift, total = state
    value, value_stride, d_out, lse = context[0], context[1], context[2], context[3]
    d_lse, seen, self_weight, self_grad = context[4], context[5], context[6], context[7]
    d_out_at, sees_any = context[8], context[9]
    HAS_BIAS: tl.constexpr = context[10]
    CAREFUL: tl.constexpr = context[11]
    D: tl.constexpr = context[12]
    PRECISION: tl.constexpr = context[13]
    N: tl.constexpr = k.shape[0]
    v = st.load_events(value, event, value_stride, shown, not (HAS_BIAS or MASKED), D, k.shape[1], N)
    p = st.weights_of(s, unit, lse)
    if k.dtype == tl.float32:
        total += tl.sum(p, 1)
    v_at = value + (event + tl.arange(0, N)).to(tl.int64) * value_stride
    dp = st.products(d_out, d_out_at, sees_any, v, v_at, shown, D, PRECISION)
    sees = (event + tl.arange(0, N))[None, :] < seen[:, None]
    if CAREFUL and MASKED:
        dp = tl.where(sees, dp, 0.0)
    if MASKED:  # noqa: SIM102 (of a constant and a value: the compiler drops the outer one)
        if event == 0:
            # A shift made from `out` has the error of its rounding. Where all events of a row are here, it is
            # known better; plain PyTorch, which keeps the weights, is nearly exact for such a row.
            here = tl.sum(p, 1) + self_weight
            mean = (tl.sum(p * dp, 1) + self_weight * self_grad) / tl.where(here > 0.0, here, 1.0)
            shift = tl.where(seen < N, mean - d_lse, shift)
    ds = (p * (dp - shift[:, None])).to(k.dtype)
    if CAREFUL and MASKED:
        grad = st.accumulate_seen(grad, ds, k, sees, PRECISION)
    else:
        grad = st.dot(ds, k, grad, PRECISION)
    return grad, shift, total


@triton.jit
def _stream(
    state,
    self_weight,
    self_grad,
    q,
    q_at,
    d_out,
    d_out_at,
    sees,
    lse,
    d_lse,
    key,
    key_stride,
    value,
    value_stride,
    bias,
    bias_stride,
    factor,
    least,
    most,
    seen,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state of a tile of rows after the whole history."""
    return st.stream(
        _add_grad_query, state,
        (
            value, value_stride, d_out, lse, d_lse, seen, self_weight, self_grad, d_out_at, sees,
            HAS_BIAS, CAREFUL, D, PRECISION,
        ),
        q, key, key_stride, bias, bias_stride, factor, 0, least, most, seen,
        D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, PRECISION, q_at=(q_at, sees),
    )  # fmt: skip


@triton.jit
def _rows(
    grad_query,
    row_states,
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    q_offsets,
    kv_offsets,
    kv_lengths,
    visible,
    self_key,
    self_value,
    key_bias,
    scale,
    factor,
    users,
    rows,
    events,
    heads,
    grad_out_row_stride,
    grad_out_head_stride,
    grad_lse_row_stride,
    grad_lse_head_stride,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    self_key_row_stride,
    self_key_head_stride,
    self_value_row_stride,
    self_value_head_stride,
    bias_row_stride,
    bias_head_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_SELF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """CAREFUL: a second run after the usual one, for tiles where it found a NaN or an infinity: that may have
    come from an event which its row does not see, as 0 * NaN. In one kernel its registers would cost the
    usual loop's resident blocks."""
    user, first, end = st.find_tile(tl.program_id(0), q_offsets, users, rows, BLOCK_M // PACK)
    if first >= end:
        return
    head = tl.program_id(1) * PACK
    kv_head = (head // GROUP).to(tl.int64)
    begin, _, length = st.history(kv_offsets, kv_lengths, user, events, HAS_LENGTHS)
    candidates, row_heads, valid = st.row_tile(first, end, head, PACK, BLOCK_M)
    seen, least, most = st.seen_events(visible, candidates, valid, length, HAS_VISIBLE)
    if CAREFUL:
        before = st.load_rows(grad_query, candidates, row_heads, heads * D, D, valid, D, BLOCK_D)
        if not st.any_non_finite(before, valid):
            return

    # A row that sees nothing has lse = -inf: nothing of it is computed with, and its gradients are zeros.
    lse2 = tl.load(lse + candidates * heads + row_heads, mask=valid, other=-float("inf")) * st.LOG2E
    sees = lse2 != -float("inf")
    lse2 = tl.where(sees, lse2, float("inf"))
    q = st.load_rows(query, candidates, row_heads, query_row_stride, query_head_stride, sees, D, BLOCK_D)
    d_out = st.load_rows(
        grad_out, candidates, row_heads, grad_out_row_stride, grad_out_head_stride, sees, D, BLOCK_D
    )
    q_at = query + candidates * query_row_stride + row_heads.to(tl.int64) * query_head_stride
    d_out_at = grad_out + candidates * grad_out_row_stride + row_heads.to(tl.int64) * grad_out_head_stride
    o = st.load_rows(out, candidates, row_heads, heads * D, D, sees, D, BLOCK_D)
    d_lse = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_GRAD_LSE:
        at = candidates * grad_lse_row_stride + row_heads.to(tl.int64) * grad_lse_head_stride
        d_lse = tl.load(grad_lse + at, mask=sees, other=0.0).to(tl.float32)
    shift = tl.sum(d_out.to(tl.float32) * o.to(tl.float32), 1) - d_lse

    self_weight = tl.zeros((BLOCK_M,), tl.float32)
    self_grad = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SELF:
        self_weight, self_grad = _self_slot(
            q, d_out, lse2, self_key, self_value, candidates, kv_head, sees, factor,
            self_key_row_stride, self_key_head_stride, self_value_row_stride, self_value_head_stride,
            D, BLOCK_D,
        )  # fmt: skip
        shift = tl.where(sees & (seen == 0), self_grad - d_lse, shift)

    key += begin * key_row_stride + kv_head * key_head_stride
    value += begin * value_row_stride + kv_head * value_head_stride
    if HAS_BIAS:
        key_bias += begin * bias_row_stride + head.to(tl.int64) * bias_head_stride
    start = (tl.zeros((BLOCK_M, BLOCK_D), tl.float32), shift, self_weight)
    grad, shift, total = _stream(
        start, self_weight, self_grad, q, q_at, d_out, d_out_at, sees, lse2, d_lse, key, key_row_stride,
        value, value_row_stride, key_bias, bias_row_stride, factor, least, most, seen,
        D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, CAREFUL, PRECISION,
    )  # fmt: skip
    if HAS_SELF:
        k = st.load_rows(
            self_key, candidates, kv_head + candidates * 0, self_key_row_stride, self_key_head_stride, sees,
            D, BLOCK_D,
        )  # fmt: skip
        grad += (self_weight * (self_grad - shift))[:, None] * k.to(tl.float32)
    norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    if query.dtype.element_ty == tl.float32:
        # The rounding of the lse makes all weights of a row wrong by one factor near 1.
        norm = 1.0 / tl.where(total > 0.0, total, 1.0)
    grad = grad * (norm * scale)[:, None]
    st.store_rows(grad_query, candidates, row_heads, heads * D, D, valid, grad, D, BLOCK_D)
    at = row_states + _state_of(candidates, row_heads, kv_head, rows, GROUP)
    states = tl.cast(rows, tl.int64) * heads
    tl.store(at, lse2, mask=valid)
    tl.store(at + states, shift, mask=valid)
    tl.store(at + 2 * states, norm, mask=valid)


@triton.jit
def _state_of(candidates, heads, kv_head, rows, GROUP: tl.constexpr):
    """Where `row_states` [3, H_kv, T_c, GROUP] begin for a row: what a tile of rows reads lies together.

    They are its lse in units of log2, infinite where it sees nothing; its shift; and a factor that makes its
    weights sum to 1, which is 1 but for fp32.
    """
    return (kv_head * rows + candidates) * GROUP + (heads - kv_head * GROUP)


@triton.jit
def _self_slot(
    q,
    d_out,
    lse,
    self_key,
    self_value,
    candidates,
    kv_head,
    sees,
    factor,
    self_key_row_stride,
    self_key_head_stride,
    self_value_row_stride,
    self_value_head_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """P and dP `[M]` of the rows' self slots."""
    heads = kv_head + candidates * 0
    k = st.load_rows(self_key, candidates, heads, self_key_row_stride, self_key_head_stride, sees, D, BLOCK_D)
    v = st.load_rows(
        self_value, candidates, heads, self_value_row_stride, self_value_head_stride, sees, D, BLOCK_D
    )
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * factor
    return tl.exp2(score - lse), tl.sum(d_out.to(tl.float32) * v.to(tl.float32), 1)


@triton.jit
def _self_slots(
    grad_self_key,
    grad_self_value,
    row_states,
    grad_out,
    query,
    self_key,
    self_value,
    scale,
    factor,
    rows,
    kv_heads,
    grad_out_row_stride,
    grad_out_head_stride,
    query_row_stride,
    query_head_stride,
    self_key_row_stride,
    self_key_head_stride,
    self_value_row_stride,
    self_value_head_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    candidates = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head = tl.program_id(1).to(tl.int64)
    valid = candidates < rows
    grad_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(GROUP):
        heads = kv_head * GROUP + i + candidates * 0
        at = row_states + _state_of(candidates, heads, kv_head, rows, GROUP)
        states = tl.cast(rows, tl.int64) * kv_heads * GROUP
        lse = tl.load(at, mask=valid, other=float("inf"))
        shift = tl.load(at + states, mask=valid, other=0.0)
        norm = tl.load(at + 2 * states, mask=valid, other=0.0)
        sees = lse != float("inf")
        q = st.load_rows(query, candidates, heads, query_row_stride, query_head_stride, sees, D, BLOCK_D)
        d_out = st.load_rows(
            grad_out, candidates, heads, grad_out_row_stride, grad_out_head_stride, sees, D, BLOCK_D
        )
        weight, grad = _self_slot(
            q, d_out, lse, self_key, self_value, candidates, kv_head, sees, factor,
            self_key_row_stride, self_key_head_stride, self_value_row_stride, self_value_head_stride,
            D, BLOCK_D,
        )  # fmt: skip
        weight *= norm
        grad_k += (weight * (grad - shift))[:, None] * q.to(tl.float32)
        grad_v += weight[:, None] * d_out.to(tl.float32)
    heads = kv_head + candidates * 0
    st.store_rows(grad_self_key, candidates, heads, kv_heads * D, D, valid, grad_k * scale, D, BLOCK_D)
    st.store_rows(grad_self_value, candidates, heads, kv_heads * D, D, valid, grad_v, D, BLOCK_D)


@triton.jit
def _rows_that_see(visible, begin, end, event):
    """`(first, last)`: no candidate of `begin … end` outside of these sees event number `event`."""
    CHUNK: tl.constexpr = 1024
    first, last = end, begin
    for start in range(begin, end, CHUNK):
        candidates = start + tl.arange(0, CHUNK)
        sees = tl.load(visible + candidates, mask=candidates < end, other=0) > event
        first = tl.minimum(first, tl.min(tl.where(sees, candidates, end)))
        last = tl.maximum(last, tl.max(tl.where(sees, candidates + 1, begin)))
    return first, last


@triton.jit
def _row_offsets(row_stride, head_stride, PACK: tl.constexpr, M: tl.constexpr):
    """Where the rows of a tile lie, from its first one: `[M]`."""
    r = tl.arange(0, M)
    offsets = r // PACK * row_stride
    if PACK > 1:
        offsets += (r % PACK).to(tl.int64) * head_stride
    return offsets


@triton.jit
def _load_tile(at, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[M, BLOCK_D]` from pointers `[M]` to rows; zeros where not valid and beyond D."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(at[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _grad_events(
    k,
    k_at,
    v,
    v_at,
    grad_key_bias,
    begin,
    event,
    length,
    room,
    kv_head,
    first,
    last,
    end,
    query,
    grad_out,
    row_states,
    visible,
    key_bias,
    factor,
    rows,
    heads,
    grad_out_row_stride,
    grad_out_head_stride,
    query_row_stride,
    query_head_stride,
    bias_row_stride,
    bias_head_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`(dK / scale, dV, shown)` of the events `k`, `v` from the candidates `first … last`; stores dbias.

    Events that are not `shown` to any head have no meaning in the gradients.
    """
    N: tl.constexpr = k.shape[0]
    n = event + tl.arange(0, N)
    exists = n < length
    grad_k = tl.zeros((N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((N, BLOCK_D), tl.float32)
    r = tl.arange(0, BLOCK_M)
    q_offsets = _row_offsets(query_row_stride, query_head_stride, PACK, BLOCK_M)
    d_out_offsets = _row_offsets(grad_out_row_stride, grad_out_head_stride, PACK, BLOCK_M)
    states = tl.cast(rows, tl.int64) * heads
    count = (end - first).to(tl.int32)
    shown_to_any = exists
    if HAS_BIAS:
        shown_to_any = n < 0
    for i in range(0, GROUP, PACK):
        head = kv_head * GROUP + i
        shown = exists
        if HAS_BIAS:
            bias_at = key_bias + (begin + n) * bias_row_stride + head * bias_head_stride
            bias = tl.load(bias_at, mask=shown, other=-float("inf")).to(tl.float32) * st.LOG2E
            shown = bias != -float("inf")
            shown_to_any = shown_to_any | shown
            grad_bias = tl.zeros((N,), tl.float32)
        at_query = query + first * query_row_stride + head * query_head_stride
        at_grad_out = grad_out + first * grad_out_row_stride + head * grad_out_head_stride
        at_states = row_states + (kv_head * rows + first) * GROUP + i
        for start in range(0, (last - first).to(tl.int32), BLOCK_M // PACK):
            valid = r // PACK < count - start
            if BLOCK_M % PACK:
                valid = valid & (r < BLOCK_M // PACK * PACK)
            # Rows that do not exist have zeros everywhere, which add nothing: P is 1, or 0 where it could be
            # exp2 of a large bias. An infinity is not free: only a zero is what a masked copy leaves.
            at = at_states + start * GROUP + (r // PACK * GROUP + r % PACK)
            lse = tl.load(at, mask=valid, other=float("inf") if HAS_BIAS else 0.0)
            shift = tl.load(at + states, mask=valid, other=0.0)
            q_at = at_query + tl.cast(start, tl.int64) * query_row_stride + q_offsets
            q = _load_tile(q_at, valid, D, BLOCK_D)
            d_out_at = at_grad_out + tl.cast(start, tl.int64) * grad_out_row_stride + d_out_offsets
            d_out = _load_tile(d_out_at, valid, D, BLOCK_D)
            # Events along the rows of the tile: so P and dS are operands where they are.
            s = st.products(k, k_at, exists, q, q_at, valid, D, PRECISION) * factor
            if HAS_BIAS:
                s += bias[:, None]
            p = tl.exp2(s - lse[None, :])
            if k.dtype == tl.float32:
                norm = tl.load(at + 2 * states, mask=valid, other=0.0)
                p *= norm[None, :]
            dp = st.products(v, v_at, exists, d_out, d_out_at, valid, D, PRECISION)
            ds = p * (dp - shift[None, :])
            if HAS_VISIBLE:
                seen = tl.load(visible + first + start + r // PACK, mask=valid, other=0)
                sees = n[:, None] < seen[None, :]
                if CAREFUL:
                    sees = sees & shown[:, None] & (lse != float("inf"))[None, :]
            else:
                sees = shown[:, None] & (lse != float("inf"))[None, :]
            if HAS_VISIBLE or CAREFUL:
                p = tl.where(sees, p, 0.0)
                ds = tl.where(sees, ds, 0.0)
            if HAS_BIAS:
                grad_bias += tl.sum(ds, 1)
            if CAREFUL:
                grad_v = st.accumulate_seen(grad_v, p.to(v.dtype), d_out, sees, PRECISION)
                grad_k = st.accumulate_seen(grad_k, ds.to(k.dtype), q, sees, PRECISION)
            else:
                grad_v = st.dot(p.to(v.dtype), d_out, grad_v, PRECISION)
                grad_k = st.dot(ds.to(k.dtype), q, grad_k, PRECISION)
        if HAS_BIAS:
            grad_bias = tl.where(shown, grad_bias, 0.0).to(grad_key_bias.dtype.element_ty)
            tl.store(grad_key_bias + (begin + n) * heads + head, grad_bias, mask=n < room)
    return grad_k, grad_v, shown_to_any


@triton.jit
def _events(
    grad_key,
    grad_value,
    grad_key_bias,
    row_states,
    grad_out,
    query,
    key,
    value,
    q_offsets,
    kv_offsets,
    kv_lengths,
    visible,
    key_bias,
    scale,
    factor,
    users,
    rows,
    events,
    heads,
    grad_out_row_stride,
    grad_out_head_stride,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    bias_row_stride,
    bias_head_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """CAREFUL: as in `_rows`; here the NaN may have come from a row that does not see its event."""
    user, tile, room_end = st.find_tile(tl.program_id(0), kv_offsets, users, events, BLOCK_N)
    if tile >= room_end:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    begin, room, length = st.history(kv_offsets, kv_lengths, user, events, HAS_LENGTHS)
    event = (tile - begin).to(tl.int32)
    n = tile + tl.arange(0, BLOCK_N)
    kv_heads = kv_head + n * 0
    exists = n < begin + length
    kv_heads_total = heads // GROUP
    if CAREFUL:
        k = st.load_rows(grad_key, n, kv_heads, kv_heads_total * D, D, exists, D, BLOCK_D)
        v = st.load_rows(grad_value, n, kv_heads, kv_heads_total * D, D, exists, D, BLOCK_D)
        if not (st.any_non_finite(k, exists) or st.any_non_finite(v, exists)):
            return
    k = st.load_rows(key, n, kv_heads, key_row_stride, key_head_stride, exists, D, BLOCK_D)
    v = st.load_rows(value, n, kv_heads, value_row_stride, value_head_stride, exists, D, BLOCK_D)
    k_at = key + n * key_row_stride + kv_head * key_head_stride
    v_at = value + n * value_row_stride + kv_head * value_head_stride

    first, end = st.user_range(q_offsets, user, rows)
    last = tl.where(event < length, end, first)
    if HAS_VISIBLE:
        ROWS: tl.constexpr = BLOCK_M // PACK
        from_, last = _rows_that_see(visible, first, last, event)
        first += (from_ - first) // ROWS * ROWS
    grad_k, grad_v, shown = _grad_events(
        k, k_at, v, v_at, grad_key_bias, begin, event, length, room, kv_head, first, last, end,
        query, grad_out, row_states, visible, key_bias, factor, rows, heads,
        grad_out_row_stride, grad_out_head_stride, query_row_stride, query_head_stride,
        bias_row_stride, bias_head_stride,
        D, BLOCK_D, BLOCK_M, GROUP, PACK, HAS_VISIBLE, HAS_BIAS, CAREFUL, PRECISION,
    )  # fmt: skip
    grad_k = tl.where(shown[:, None], grad_k * scale, 0.0)
    grad_v = tl.where(shown[:, None], grad_v, 0.0)
    stored = n < room_end
    st.store_rows(grad_key, n, kv_heads, kv_heads_total * D, D, stored, grad_k, D, BLOCK_D)
    st.store_rows(grad_value, n, kv_heads, kv_heads_total * D, D, stored, grad_v, D, BLOCK_D)


def target_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    self_value: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, self_key, self_value and key_bias, contiguous, in their dtypes.

    An empty tensor for one that is not there.

    `out` and `lse` are those of the forward with the same arguments, `grad_out [T_c, H, D]` and, optional,
    `grad_lse [T_c, H]` the gradients of them.
    """
    heads, dim = query.shape[1:]
    (rows, events), (kv_heads, users) = (query.shape[0], key.shape[0]), (key.shape[1], q_offsets.shape[0] - 1)
    grads = tuple(
        query.new_empty(0 if x is None else x.shape, dtype=None if x is None else x.dtype)
        for x in (query, key, value, self_key, self_value, key_bias)
    )
    grad_query, grad_key, grad_value, grad_self_key, grad_self_value, grad_key_bias = grads
    if users == 0:
        return grads
    scale = dim**-0.5 if scale is None else float(scale)
    grad_out, query, key, value, self_key, self_value = (
        st.rows_of(x) for x in (grad_out, query, key, value, self_key, self_value)
    )
    out, lse, q_offsets, kv_offsets, kv_lengths, visible = (
        x if x is None else x.contiguous() for x in (out, lse, q_offsets, kv_offsets, kv_lengths, visible)
    )
    row_states = lse.new_empty((3, kv_heads, rows, heads // kv_heads))
    group = heads // kv_heads
    traits = {"visible": visible is not None, "bias": key_bias is not None}
    of_rows = parameters("target_attention_backward_rows", head_dim=dim, dtype=query.dtype, **traits)
    of_events = parameters("target_attention_backward_events", head_dim=dim, dtype=query.dtype, **traits)

    def pack(block_m: int) -> int:  # with a bias a tile has one head, so that the bias is a vector
        return group if key_bias is None and group <= block_m else 1

    block_d = native_head_dim(dim)
    common = {
        "D": dim,
        "BLOCK_D": block_d,
        "GROUP": group,
        "HAS_LENGTHS": kv_lengths is not None,
        "HAS_VISIBLE": visible is not None,
        "HAS_BIAS": key_bias is not None,
        "PRECISION": st.precision(query.dtype),
    }
    strides = {name: (0, 0) if x is None else x.stride()[:2] for name, x in (
        ("grad_out", grad_out), ("grad_lse", grad_lse), ("query", query), ("key", key), ("value", value),
        ("self_key", self_key), ("self_value", self_value), ("bias", key_bias),
    )}  # fmt: skip
    factor = scale * st.LOG2E.value

    def run_rows(careful: bool) -> None:
        packed = pack(of_rows.block_m)
        grid = (triton.cdiv(rows, of_rows.block_m // packed) + users, heads // packed)
        _rows[grid](
            grad_query, row_states, grad_out, grad_lse, query, key, value, out, lse,
            q_offsets, kv_offsets, kv_lengths, visible, self_key, self_value, key_bias,
            scale, factor, users, rows, events, heads,
            *strides["grad_out"], *strides["grad_lse"], *strides["query"], *strides["key"], *strides["value"],
            *strides["self_key"], *strides["self_value"], *strides["bias"],
            **common, PACK=packed, BLOCK_M=of_rows.block_m, BLOCK_N=of_rows.block_n,
            HAS_GRAD_LSE=grad_lse is not None, HAS_SELF=self_key is not None, CAREFUL=careful,
            num_warps=of_rows.num_warps, num_stages=1 if careful else of_rows.num_stages,
        )  # fmt: skip

    def run_events(careful: bool) -> None:
        # Without `maxnreg` the compiler stops at 128 registers in some variants and spills instead.
        packed = pack(of_events.block_m)
        _events[triton.cdiv(events, of_events.block_n) + users, kv_heads](
            grad_key, grad_value, grad_key_bias, row_states, grad_out, query, key, value,
            q_offsets, kv_offsets, kv_lengths, visible, key_bias, scale, factor, users, rows, events, heads,
            *strides["grad_out"], *strides["query"], *strides["key"], *strides["value"], *strides["bias"],
            **common, PACK=packed, BLOCK_M=of_events.block_m, BLOCK_N=of_events.block_n, CAREFUL=careful,
            num_warps=of_events.num_warps, num_stages=1 if careful else of_events.num_stages, maxnreg=255,
        )  # fmt: skip

    if rows:
        run_rows(careful=False)
        if visible is not None:
            run_rows(careful=True)
    if rows and self_key is not None:
        block_m = max(4096 // block_d, 16)
        _self_slots[triton.cdiv(rows, block_m), kv_heads](
            grad_self_key, grad_self_value, row_states, grad_out, query, self_key, self_value,
            scale, factor, rows, kv_heads,
            *strides["grad_out"], *strides["query"], *strides["self_key"], *strides["self_value"],
            D=dim, BLOCK_D=block_d, GROUP=group, BLOCK_M=block_m,
        )  # fmt: skip
    if events:
        run_events(careful=False)
        if rows and (visible is not None or key_bias is not None):
            run_events(careful=True)
    return grads
