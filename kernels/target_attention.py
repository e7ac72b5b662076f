"""`target_attention`, forward: the readout of the streaming softmax that adds up values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import streaming as st
from .launch import native_head_dim, parameters


@triton.jit
def _weighted_value(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    m, l, acc = state
    value, stride, seen = context[0], context[1], context[2]
    HAS_BIAS: tl.constexpr = context[3]
    CAREFUL: tl.constexpr = context[4]
    D: tl.constexpr = context[5]
    PRECISION: tl.constexpr = context[6]
    N: tl.constexpr = k.shape[0]
    v = st.load_events(value, event, stride, shown, not (HAS_BIAS or MASKED), D, k.shape[1], N)
    m, l, alpha, p = st.softmax_step(m, l, s, unit)
    acc = acc * alpha[:, None]
    if CAREFUL and MASKED:
        sees = (event + tl.arange(0, N))[None, :] < seen[:, None]
        acc = st.accumulate_seen(acc, p.to(v.dtype), v, sees, PRECISION)
    else:
        acc = st.dot(p.to(v.dtype), v, acc, PRECISION)
    return m, l, acc


@triton.jit
def _attend(
    q,
    candidates,
    kv_head,
    valid,
    key,
    key_stride,
    value,
    value_stride,
    self_key,
    self_key_row_stride,
    self_key_head_stride,
    self_value,
    self_value_row_stride,
    self_value_head_stride,
    bias,
    bias_stride,
    factor,
    least,
    most,
    seen,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SELF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`(m, l, acc)` of a tile of rows over the whole history."""
    M: tl.constexpr = q.shape[0]
    if HAS_SELF:
        m, l = st.self_slot(
            q, self_key, candidates, kv_head, self_key_row_stride, self_key_head_stride, valid, factor,
            D, BLOCK_D,
        )  # fmt: skip
        acc = st.load_rows(
            self_value, candidates, kv_head + candidates * 0, self_value_row_stride, self_value_head_stride,
            valid, D, BLOCK_D,
        ).to(tl.float32)  # fmt: skip
    else:
        m = tl.full((M,), -float("inf"), tl.float32)
        l = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, BLOCK_D), tl.float32)
    return st.stream(
        _weighted_value, (m, l, acc), (value, value_stride, seen, HAS_BIAS, CAREFUL, D, PRECISION), q,
        key, key_stride, bias, bias_stride, factor, 0, least, most,
        seen, D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, PRECISION,
    )  # fmt: skip


@triton.jit
def _forward(
    query,
    key,
    value,
    q_offsets,
    kv_offsets,
    kv_lengths,
    visible,
    self_key,
    self_value,
    key_bias,
    out,
    lse,
    factor,
    users,
    rows,
    events,
    heads,
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
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_SELF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    user, first, end = st.find_tile(tl.program_id(0), q_offsets, users, rows, BLOCK_M // PACK)
    if first >= end:
        return
    head = tl.program_id(1) * PACK
    kv_head = (head // GROUP).to(tl.int64)
    begin, _, length = st.history(kv_offsets, kv_lengths, user, events, HAS_LENGTHS)
    candidates, row_heads, valid = st.row_tile(first, end, head, PACK, BLOCK_M)
    seen, least, most = st.seen_events(visible, candidates, valid, length, HAS_VISIBLE)
    q = st.load_rows(query, candidates, row_heads, query_row_stride, query_head_stride, valid, D, BLOCK_D)
    key += begin * key_row_stride + kv_head * key_head_stride
    value += begin * value_row_stride + kv_head * value_head_stride
    if HAS_BIAS:
        key_bias += begin * bias_row_stride + head.to(tl.int64) * bias_head_stride
    m, l, acc = _attend(
        q, candidates, kv_head, valid, key, key_row_stride, value, value_row_stride,
        self_key, self_key_row_stride, self_key_head_stride,
        self_value, self_value_row_stride, self_value_head_stride,
        key_bias, bias_row_stride, factor, least, most, seen,
        D, BLOCK_D, BLOCK_N, HAS_SELF, HAS_BIAS, HAS_VISIBLE, False, PRECISION,
    )  # fmt: skip
    if HAS_VISIBLE:  # noqa: SIM102
        # A NaN may have come from an event that its row does not see. (Two conditions: the outer one is
        # decided when compiling.)
        if st.any_non_finite(acc, valid):
            m, l, acc = _attend(
                q, candidates, kv_head, valid, key, key_row_stride, value, value_row_stride,
                self_key, self_key_row_stride, self_key_head_stride,
                self_value, self_value_row_stride, self_value_head_stride,
                key_bias, bias_row_stride, factor, least, most, seen,
                D, BLOCK_D, BLOCK_N, HAS_SELF, HAS_BIAS, HAS_VISIBLE, True, PRECISION,
            )  # fmt: skip
    inverse, log_sum = st.softmax_end(m, l)
    st.store_rows(out, candidates, row_heads, heads * D, D, valid, acc * inverse[:, None], D, BLOCK_D)
    tl.store(lse + candidates * heads + row_heads, log_sum, mask=valid)


def target_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    self_value: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every candidate's softmax over its user's history: `(out [T_c, H, D], lse [T_c, H] fp32)`."""
    rows, heads, dim = query.shape
    events, kv_heads, _ = key.shape
    users = q_offsets.shape[0] - 1
    out = query.new_empty(query.shape)
    lse = query.new_empty((rows, heads), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, factor = st.positive_scale(st.rows_of(query), scale)
    key, value, self_key, self_value = (st.rows_of(x) for x in (key, value, self_key, self_value))
    group = heads // kv_heads
    p = parameters(
        "target_attention",
        head_dim=dim,
        dtype=query.dtype,
        visible=visible is not None,
        bias=key_bias is not None,
    )
    # With a bias a tile has one head, so that the bias is a vector.
    pack = group if key_bias is None and group <= p.block_m else 1
    grid = (triton.cdiv(rows, p.block_m // pack) + users, heads // pack)
    none = (0, 0)
    _forward[grid](
        query, key, value, *(x.contiguous() for x in (q_offsets, kv_offsets)),
        kv_lengths if kv_lengths is None else kv_lengths.contiguous(),
        visible if visible is None else visible.contiguous(),
        self_key, self_value, key_bias, out, lse, factor, users, rows, events, heads,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        *(none if self_key is None else self_key.stride()[:2]),
        *(none if self_value is None else self_value.stride()[:2]),
        *(none if key_bias is None else key_bias.stride()),
        D=dim, BLOCK_D=native_head_dim(dim), GROUP=group, PACK=pack,
        BLOCK_M=p.block_m, BLOCK_N=p.block_n,
        HAS_LENGTHS=kv_lengths is not None, HAS_VISIBLE=visible is not None,
        HAS_SELF=self_key is not None, HAS_BIAS=key_bias is not None,
        PRECISION=st.precision(query.dtype), num_warps=p.num_warps, num_stages=p.num_stages,
    )  # fmt: skip
    return out, lse
