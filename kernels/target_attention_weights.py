"""`target_attention_weights`, all of them: two readouts of the streaming softmax, one after the other in a
block. The first finds a row's maximum and sum, the second writes its weights; no scores are kept between.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import streaming as st
from .launch import cdiv, most_registers, native_head_dim, parameters


@triton.jit
def log_sum_exp(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    """The step that keeps only the softmax's maximum and sum, `(m [M], l [M])`."""
    m, l, _, _ = st.softmax_step(state[0], state[1], s, unit)
    return m, l


@triton.jit
def _write(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    """The step that writes weights; the state is `(m, 1 / l)` of the whole history."""
    weights, row_at, heads, room, valid = context
    m, inverse = state
    n = event + tl.arange(0, s.shape[1])
    w = st.weights_of(s, unit, m) * inverse[:, None]
    at = weights + row_at[:, None] + (n.to(tl.int64) * heads)[None, :]
    tl.store(at, w.to(weights.dtype.element_ty), mask=valid[:, None] & (n < room)[None, :])
    return m, inverse


@triton.jit(do_not_specialize=["users", "total_rows", "total_events", "heads", "total_pairs"])
def _weights(
    query,
    key,
    q_offsets,
    kv_offsets,
    pair_offsets,
    kv_lengths,
    visible,
    self_key,
    key_bias,
    weights,
    factor,
    users,
    total_rows,
    total_events,
    total_pairs,
    heads,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    self_key_row_stride,
    self_key_head_stride,
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
    HAS_SELF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes `weights [pairs, heads]`: user b's from `pair_offsets[b]` on, by candidate, then by event."""
    user, first, end = st.find_tile(tl.program_id(0), q_offsets, users, total_rows, BLOCK_M // PACK)
    if first >= end:
        return
    head = tl.program_id(1) * PACK
    kv_head = (head // GROUP).to(tl.int64)
    begin, room, length = st.history(kv_offsets, kv_lengths, user, total_events, HAS_LENGTHS)
    candidates, row_heads, valid = st.row_tile(first, end, head, PACK, BLOCK_M)
    seen, least, most = st.seen_events(visible, candidates, valid, length, HAS_VISIBLE)
    q = st.load_rows(query, candidates, row_heads, query_row_stride, query_head_stride, valid, D, BLOCK_D)
    q_at = query + candidates.to(tl.int64) * query_row_stride + row_heads.to(tl.int64) * query_head_stride
    key += begin * key_row_stride + kv_head * key_head_stride
    if HAS_BIAS:
        key_bias += begin * bias_row_stride + head.to(tl.int64) * bias_head_stride
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SELF:
        m, l = st.self_slot(
            q, self_key, candidates, candidates * 0 + kv_head, self_key_row_stride, self_key_head_stride,
            valid, factor, D, BLOCK_D,
        )  # fmt: skip
    m, l = st.stream(
        log_sum_exp, (m, l), (), q, key, key_row_stride, key_bias, bias_row_stride, factor,
        0, least, most, seen, D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, PRECISION, st.LOG2E, (q_at, valid),
    )  # fmt: skip
    inverse, _ = st.softmax_end(m, l)

    q_begin, _ = st.user_range(q_offsets, user, total_rows)
    pair = tl.load(pair_offsets + user) + (candidates - q_begin) * room
    valid = valid & (pair >= 0) & (pair + room <= total_pairs)  # whatever the offsets hold
    row_at = pair * heads + row_heads
    st.stream(
        _write, (m, inverse), (weights, row_at, heads, room, valid), q, key, key_row_stride,
        key_bias, bias_row_stride, factor, 0, least, most, seen,
        D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, PRECISION, st.LOG2E, (q_at, valid),
    )  # fmt: skip
    for event in range(tl.cdiv(most, BLOCK_N) * BLOCK_N, room, BLOCK_N):
        n = event + tl.arange(0, BLOCK_N)
        at = weights + row_at[:, None] + (n.to(tl.int64) * heads)[None, :]
        nothing = tl.zeros((BLOCK_M, BLOCK_N), weights.dtype.element_ty)
        tl.store(at, nothing, mask=valid[:, None] & (n < room)[None, :])


def target_attention_weights(
    query: Tensor,
    key: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every weight: `(weights [sum C_b * L_b, H], offsets [B + 1])`.

    Their number is a value on the device, so this waits for it: the one synchronisation of all kernels.
    """
    rows, heads, dim = query.shape
    events, kv_heads, _ = key.shape
    users = q_offsets.shape[0] - 1
    pair_offsets = F.pad((q_offsets.diff().long() * kv_offsets.diff().long()).cumsum(0), (1, 0))
    pairs = int(pair_offsets[-1])
    weights = query.new_empty((pairs, heads))
    if weights.numel() == 0:
        return weights, pair_offsets
    query, factor = st.positive_scale(st.rows_of(query), scale)
    key, self_key = st.rows_of(key), st.rows_of(self_key)
    q_offsets, kv_offsets, kv_lengths, visible = st.contiguous(q_offsets, kv_offsets, kv_lengths, visible)
    p = parameters(
        "target_attention_weights",
        head_dim=dim,
        dtype=query.dtype,
        visible=visible is not None,
        bias=key_bias is not None,
    )
    group = heads // kv_heads
    pack = st.heads_together(group, p.block_m, key_bias)
    _weights[cdiv(rows, p.block_m // pack) + users, heads // pack](
        query, key, q_offsets, kv_offsets, pair_offsets, kv_lengths, visible, self_key, key_bias, weights,
        factor, users, rows, events, pairs, heads, *st.strides(query, key, self_key, key_bias),
        D=dim, BLOCK_D=native_head_dim(dim), GROUP=group, PACK=pack,
        BLOCK_M=p.block_m, BLOCK_N=p.block_n,
        HAS_LENGTHS=kv_lengths is not None, HAS_VISIBLE=visible is not None,
        HAS_SELF=self_key is not None, HAS_BIAS=key_bias is not None,
        PRECISION=st.precision(query.dtype), num_warps=p.num_warps, num_stages=p.num_stages,
        maxnreg=most_registers(p.num_warps),
    )  # fmt: skip
    return weights, pair_offsets
