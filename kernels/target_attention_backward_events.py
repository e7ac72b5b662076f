"""`target_attention_backward`, the events' pass: a block has a tile of events, runs over the rows that see
them and adds up dK, dV and dbias."""

from __future__ import annotations

import triton
import triton.language as tl

from . import streaming as st


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
def grad_events(
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
