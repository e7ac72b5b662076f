"""`target_attention_backward`: the gradients of `target_attention`, in two passes without atomics.

With P = exp(s - lse), dP = dO·Vᵀ and, for each row, shift = Σ_d dO·out - grad_lse:

    dS = P ∘ (dP - shift),   dQ = scale · dS·K,   dK = scale · dSᵀ·Q,   dV = Pᵀ·dO,   dbias = Σ_rows dS

(Dao et al. 2022, FlashAttention, algorithm 4). Either pass computes the scores again:

- `_rows`: a block has a tile of rows, streams over the events that they see and adds up dQ. It leaves what
  the others need to know of each row (`_state_of`).
- `grad_events` (target_attention_backward_events.py): a block has a tile of events, runs over the rows that
  see them and adds up dK, dV and dbias.
- `_self_slots`, where there are any: dK and dV of each candidate's own slot, over the heads that share it.

Every sum is made by one block, in an order that depends on places within the user's history or among its
candidates only: the gradients of a user are the same bits in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import streaming as st
from .launch import cdiv, few_rows, most_registers, native_head_dim, parameters
from .target_attention_backward_events import grad_events


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
        query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (query, key, value, self_key, self_value, key_bias)
    )
    grad_query, grad_key, grad_value, grad_self_key, grad_self_value, grad_key_bias = grads
    if users == 0:
        return grads
    scale = dim**-0.5 if scale is None else float(scale)
    grad_out, query, key, value, self_key, self_value = (
        st.rows_of(x) for x in (grad_out, query, key, value, self_key, self_value)
    )
    out, lse = st.contiguous(out, lse)
    jagged = st.contiguous(q_offsets, kv_offsets, kv_lengths, visible)
    row_states = lse.new_empty((3, kv_heads, rows, heads // kv_heads))
    group = heads // kv_heads
    precision = st.precision(query.dtype)
    traits = {
        "visible": visible is not None,
        "bias": key_bias is not None,
        "self": self_key is not None,
        "tf32": precision == "tf32",
        "native": dim == native_head_dim(dim),
    }
    few = few_rows(rows * group, users)
    of_rows = parameters(
        "target_attention_backward_rows", head_dim=dim, dtype=query.dtype, few_rows=few, **traits
    )
    of_events = parameters("target_attention_backward_events", head_dim=dim, dtype=query.dtype, **traits)
    block_d = native_head_dim(dim)
    common = {
        "D": dim,
        "BLOCK_D": block_d,
        "GROUP": group,
        "HAS_LENGTHS": kv_lengths is not None,
        "HAS_VISIBLE": visible is not None,
        "HAS_BIAS": key_bias is not None,
        "PRECISION": precision,
    }
    factor = scale * st.LOG2E.value

    def run_rows(careful: bool) -> None:
        packed = st.heads_together(group, of_rows.block_m, key_bias)
        grid = (cdiv(rows, of_rows.block_m // packed) + users, heads // packed)
        _rows[grid](
            grad_query, row_states, grad_out, grad_lse, query, key, value, out, lse,
            *jagged, self_key, self_value, key_bias,
            scale, factor, users, rows, events, heads,
            *st.strides(grad_out, grad_lse, query, key, value, self_key, self_value, key_bias),
            **common, PACK=packed, BLOCK_M=of_rows.block_m, BLOCK_N=of_rows.block_n,
            HAS_GRAD_LSE=grad_lse is not None, HAS_SELF=self_key is not None, CAREFUL=careful,
            num_warps=of_rows.num_warps, num_stages=1 if careful else of_rows.num_stages,
            maxnreg=of_rows.registers,
        )  # fmt: skip

    def run_events(careful: bool) -> None:
        packed = st.heads_together(group, of_events.block_m, key_bias)
        grad_events[cdiv(events, of_events.block_n) + users, kv_heads](
            grad_key, grad_value, grad_key_bias, row_states, grad_out, query, key, value,
            *jagged, key_bias, scale, factor, users, rows, events, heads,
            *st.strides(grad_out, query, key, value, key_bias),
            **common, PACK=packed, BLOCK_M=of_events.block_m, BLOCK_N=of_events.block_n, CAREFUL=careful,
            num_warps=of_events.num_warps, num_stages=1 if careful else of_events.num_stages,
            maxnreg=most_registers(of_events.num_warps),
        )  # fmt: skip

    if rows:
        run_rows(careful=False)
        if visible is not None:
            run_rows(careful=True)
    if rows and self_key is not None:
        block_m = max((2048 if query.dtype == torch.float32 else 4096) // block_d, 16)
        _self_slots[cdiv(rows, block_m), kv_heads](
            grad_self_key, grad_self_value, row_states, grad_out, query, self_key, self_value,
            scale, factor, rows, kv_heads,
            *st.strides(grad_out, query, self_key, self_value),
            D=dim, BLOCK_D=block_d, GROUP=group, BLOCK_M=block_m, maxnreg=most_registers(4),
        )  # fmt: skip
    if events:
        run_events(careful=False)
        if rows and (visible is not None or key_bias is not None):
            run_events(careful=True)
    return grads
