"""`target_attention`, forward: the readout of the streaming softmax that adds up values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import streaming as st
from .launch import cdiv, few_rows, most_registers, native_head_dim, parameters

# Events of a chunk. A longer history is cut into chunks by an event's place in it; their softmaxes are merged
# in order, by the same arithmetic whether one block runs all of them or a block each (`_merge`).
CHUNK = tl.constexpr(1024)
# Streaming multiprocessors of the smallest chip that is aimed at: an A100 has 108.
PROCESSORS = 108
MOST_PARTS = 2048  # blocks whose parts wait in memory at once: 64 x 130 floats each make 70 MB
NEVER = tl.constexpr(2**31 - 1)
_SIZES = ["users", "total_rows", "total_events", "heads"]


@triton.jit
def _weighted_value(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    """The step that adds up values: `(m [M], l [M], acc [M, D])`."""
    value, stride = context[0], context[1]
    HAS_BIAS: tl.constexpr = context[2]
    D: tl.constexpr = context[3]
    PRECISION: tl.constexpr = context[4]
    m, l, acc = state
    v = st.load_events(value, event, stride, shown, not (HAS_BIAS or MASKED), D, k.shape[1], k.shape[0])
    m, l, alpha, p = st.softmax_step(m, l, s, unit)
    return m, l, st.dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)


@triton.jit
def _finite_value(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    """The same for values that may not be finite: those are left out, and where each column has its first
    NaN, infinity and negative infinity is noted, [D] each."""
    value, stride = context[0], context[1]
    D: tl.constexpr = context[3]
    PRECISION: tl.constexpr = context[4]
    m, l, acc, nan, plus, minus = state
    v = st.load_events(value, event, stride, shown, False, D, k.shape[1], k.shape[0])
    m, l, alpha, p = st.softmax_step(m, l, s, unit)
    nan = tl.minimum(nan, _first(v != v, event))
    plus = tl.minimum(plus, _first(v == float("inf"), event))
    minus = tl.minimum(minus, _first(v == -float("inf"), event))
    finite = tl.where(st.is_finite(v), v, tl.zeros_like(v))
    acc = st.dot(p.to(v.dtype), finite, acc * alpha[:, None], PRECISION)
    return m, l, acc, nan, plus, minus


@triton.jit
def _first(what, event):
    """The first event of each column of `what [N, D]`, whose rows are events from `event` on; or NEVER."""
    n = event + tl.arange(0, what.shape[0])
    return tl.min(tl.where(what, n[:, None], NEVER), 0)


@triton.jit
def _start(rows, own, factor, chunk, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SELF: tl.constexpr):
    """The state before a chunk: nothing; before the first one the self slot, if there is one."""
    q, candidates, kv_heads, valid = rows
    m, l, acc = _nothing(q.shape[0], BLOCK_D)
    if HAS_SELF:  # noqa: SIM102
        if chunk == 0:
            m, l = st.self_slot(q, own[0], candidates, kv_heads, own[1], own[2], valid, factor, D, BLOCK_D)
            v = st.load_rows(own[3], candidates, kv_heads, own[4], own[5], valid, D, BLOCK_D)
            acc = v.to(tl.float32)
    return m, l, acc


@triton.jit
def _chunk(
    start,
    rows,
    events,
    q_at,
    seen,
    least,
    most,
    chunk,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """`(m, l, acc)` of a tile of rows over one chunk, from `start`, which is the same before it."""
    q = rows[0]
    key, key_stride, value, value_stride, bias, bias_stride = events
    first = chunk * CHUNK
    last = most if CHUNKS == "one" else tl.minimum(most, first + CHUNK)
    if CAREFUL:
        never = tl.full((BLOCK_D,), NEVER, tl.int32)
        m, l, acc = start
        m, l, acc, nan, plus, minus = st.stream(
            _finite_value, (m, l, acc, never, never, never), (value, value_stride, HAS_BIAS, D, PRECISION),
            q, key, key_stride, bias, bias_stride, factor, first, first, last, seen,
            D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, PRECISION, st.LOG2E, q_at,
        )  # fmt: skip
        acc = tl.where(seen[:, None] > plus[None, :], acc + float("inf"), acc)
        acc = tl.where(seen[:, None] > minus[None, :], acc - float("inf"), acc)
        acc = tl.where(seen[:, None] > nan[None, :], float("nan"), acc)
    else:
        m, l, acc = st.stream(
            _weighted_value, start, (value, value_stride, HAS_BIAS, D, PRECISION),
            q, key, key_stride, bias, bias_stride, factor, first, tl.minimum(least, last), last, seen,
            D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, PRECISION, st.LOG2E, q_at,
        )  # fmt: skip
    return m, l, acc


@triton.jit
def _part(parts, chunk, first, head_tile, head_tiles, total_rows, PACK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where a tile keeps the softmax of a chunk: pointers to acc [M, BLOCK_D] and to m [M]; l comes after it.

    The rows of a tile lie side by side, so that a thread's addresses are one number and constants. `parts` is
    [chunks, head tiles, rows, BLOCK_D + 2] in size, and a chunk's m and l come after all its acc.
    """
    rows_of_chunk = total_rows.to(tl.int64) * PACK * head_tiles
    row = (head_tile * total_rows.to(tl.int64) + first) * PACK
    part = parts + tl.cast(chunk, tl.int64) * rows_of_chunk * (BLOCK_D + 2)
    return part + row * BLOCK_D, part + rows_of_chunk * BLOCK_D + row * 2


@triton.jit
def _load_part(at, valid, BLOCK_D: tl.constexpr):
    """`(m, l, acc)` from the pointers that `_part` gives."""
    r, d = tl.arange(0, valid.shape[0]), tl.arange(0, BLOCK_D)
    acc = tl.load(at[0] + r[:, None] * BLOCK_D + d[None, :], mask=valid[:, None], other=0.0)
    m = tl.load(at[1] + 2 * r, mask=valid, other=0.0)
    return m, tl.load(at[1] + 2 * r + 1, mask=valid, other=0.0), acc


@triton.jit
def _store_part(at, valid, m, l, acc, BLOCK_D: tl.constexpr):
    r, d = tl.arange(0, valid.shape[0]), tl.arange(0, BLOCK_D)
    tl.store(at[0] + r[:, None] * BLOCK_D + d[None, :], acc, mask=valid[:, None])
    tl.store(at[1] + 2 * r, m, mask=valid)
    tl.store(at[1] + 2 * r + 1, l, mask=valid)


@triton.jit
def _after(parts, chunk, chunks, first, end, total_rows, m, l, acc, PACK: tl.constexpr):
    """Merges a chunk's softmax into that of the chunks before it, which waits in memory, as two accumulators
    do not fit into registers: as part 0. The chunk's own goes through part 1, and few rows of both are merged
    at a time. Returns all of it behind the last chunk, else the state that the next chunk starts from."""
    M: tl.constexpr = acc.shape[0]
    D: tl.constexpr = acc.shape[1]
    STRIP: tl.constexpr = 16
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    _, _, valid = st.row_tile(first, end, 0, PACK, M)
    before = _part(parts, 0, first, tile, tiles, total_rows, PACK, D)
    at = _part(parts, tl.minimum(chunk, 1), first, tile, tiles, total_rows, PACK, D)
    _store_part(at, valid, m, l, acc, D)
    m, l, acc = _nothing(M, D)
    if chunk > 0:
        tl.debug_barrier()
        rows = tl.minimum(end - first, M // PACK) * PACK
        for row in range(0, M, STRIP):
            _merge_rows(before, at, row, row + tl.arange(0, STRIP) < rows, D)
        tl.debug_barrier()
        if chunk + 1 == chunks:
            m, l, acc = _load_part(before, valid, D)
    return m, l, acc


@triton.jit
def _merge_rows(at, at_next, row, valid, BLOCK_D: tl.constexpr):
    """Merges rows from `row` on of a part into those of the part before it."""
    at = (at[0] + row * BLOCK_D, at[1] + 2 * row)
    at_next = (at_next[0] + row * BLOCK_D, at_next[1] + 2 * row)
    m, l, acc = _load_part(at, valid, BLOCK_D)
    m_next, l_next, acc_next = _load_part(at_next, valid, BLOCK_D)
    m, l, acc = st.softmax_merge(m, l, acc, m_next, l_next, acc_next)
    tl.debug_barrier()  # threads of several warps have loaded a row's m and l, of which one stores
    _store_part(at, valid, m, l, acc, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
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
    parts,
    out,
    lse,
    factor,
    users,
    total_rows,
    total_events,
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
    CHUNKS: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """A tile of rows over its user's history.

    CHUNKS: "one", no history is longer (one that is after all is not cut); "in order", this block runs all of
    them; "apart", only chunk `program_id(2)`, whose softmax goes to `parts`.

    CAREFUL: a second run after the usual one, for tiles where it found a NaN or an infinity. That may have
    come from an event which its row does not see, as 0 * NaN. The check belongs behind the loop, where it
    costs a look at `out`, and this run into a kernel of its own: in one kernel its registers take the usual
    loop's resident blocks away (by the model 351 to 240 TFLOP/s at D = 32 on an H100).
    """
    user, first, end = st.find_tile(tl.program_id(0), q_offsets, users, total_rows, BLOCK_M // PACK)
    if first >= end:
        return
    head = tl.program_id(1) * PACK
    kv_head = (head // GROUP).to(tl.int64)
    begin, _, length = st.history(kv_offsets, kv_lengths, user, total_events, HAS_LENGTHS)
    candidates, row_heads, valid = st.row_tile(first, end, head, PACK, BLOCK_M)
    seen, least, most = st.seen_events(visible, candidates, valid, length, HAS_VISIBLE)
    if HAS_VISIBLE:
        least, most = st.uniform(least), st.uniform(most)
    chunks = tl.maximum(tl.cdiv(most, CHUNK), 1)
    chunk = tl.program_id(2)
    if chunk >= chunks:
        return
    if CAREFUL:
        before = st.load_rows(out, candidates, row_heads, heads * D, D, valid, D, BLOCK_D)
        if not st.any_non_finite(before, valid):
            return
    q = st.load_rows(query, candidates, row_heads, query_row_stride, query_head_stride, valid, D, BLOCK_D)
    q_at = query + candidates.to(tl.int64) * query_row_stride + row_heads.to(tl.int64) * query_head_stride
    key += begin * key_row_stride + kv_head * key_head_stride
    value += begin * value_row_stride + kv_head * value_head_stride
    if HAS_BIAS:
        key_bias += begin * bias_row_stride + head.to(tl.int64) * bias_head_stride
    rows = (q, candidates, candidates * 0 + kv_head, valid)
    own = (
        self_key, self_key_row_stride, self_key_head_stride,
        self_value, self_value_row_stride, self_value_head_stride,
    )  # fmt: skip
    events = (key, key_row_stride, value, value_row_stride, key_bias, bias_row_stride)
    # The self slot comes before all loops: its addresses would be kept in registers through them.
    m, l, acc = _start(rows, own, factor, chunk, D, BLOCK_D, HAS_SELF)
    if CHUNKS == "in order":
        for chunk in range(chunks):
            m, l, acc = _chunk(
                (m, l, acc), rows, events, (q_at, valid), seen, least, most, chunk, factor,
                D, BLOCK_D, BLOCK_N, HAS_VISIBLE, HAS_BIAS, PRECISION, CHUNKS, CAREFUL,
            )  # fmt: skip
            if chunks > 1:
                m, l, acc = _after(parts, chunk, chunks, st.afresh(first), end, total_rows, m, l, acc, PACK)
    else:
        m, l, acc = _chunk(
            (m, l, acc), rows, events, (q_at, valid), seen, least, most, chunk, factor,
            D, BLOCK_D, BLOCK_N, HAS_VISIBLE, HAS_BIAS, PRECISION, CHUNKS, CAREFUL,
        )  # fmt: skip
    first, end, head = st.afresh(first), st.afresh(end), st.afresh(head)
    candidates, row_heads, valid = st.row_tile(first, end, head, PACK, BLOCK_M)
    if CHUNKS == "apart":
        at = _part(parts, chunk, first, tl.program_id(1), tl.num_programs(1), total_rows, PACK, BLOCK_D)
        _store_part(at, valid, m, l, acc, BLOCK_D)
    else:
        _finish(out, lse, candidates, row_heads, heads, valid, m, l, acc, D, BLOCK_D)


@triton.jit
def _nothing(M: tl.constexpr, BLOCK_D: tl.constexpr):
    return (
        tl.full((M,), -float("inf"), tl.float32),
        tl.zeros((M,), tl.float32),
        tl.zeros((M, BLOCK_D), tl.float32),
    )


@triton.jit
def _finish(
    out, lse, candidates, heads, total_heads, valid, m, l, acc, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    inverse, log_sum = st.softmax_end(m, l)
    st.store_rows(out, candidates, heads, total_heads * D, D, valid, acc * inverse[:, None], D, BLOCK_D)
    tl.store(lse + candidates.to(tl.int64) * total_heads + heads, log_sum, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def _merge(
    q_offsets,
    kv_offsets,
    kv_lengths,
    visible,
    parts,
    out,
    lse,
    users,
    total_rows,
    total_events,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
):
    """Merges what `_forward` wrote with CHUNKS apart, over the same tiles of rows."""
    user, first, end = st.find_tile(tl.program_id(0), q_offsets, users, total_rows, BLOCK_M // PACK)
    if first >= end:
        return
    _, _, length = st.history(kv_offsets, kv_lengths, user, total_events, HAS_LENGTHS)
    candidates, row_heads, valid = st.row_tile(first, end, tl.program_id(1) * PACK, PACK, BLOCK_M)
    _, _, most = st.seen_events(visible, candidates, valid, length, HAS_VISIBLE)
    head_tile, head_tiles = tl.program_id(1), tl.num_programs(1)
    at = _part(parts, 0, first, head_tile, head_tiles, total_rows, PACK, BLOCK_D)
    m, l, acc = _load_part(at, valid, BLOCK_D)
    for chunk in range(1, tl.cdiv(most, CHUNK)):
        at = _part(parts, chunk, first, head_tile, head_tiles, total_rows, PACK, BLOCK_D)
        m_next, l_next, acc_next = _load_part(at, valid, BLOCK_D)
        m, l, acc = st.softmax_merge(m, l, acc, m_next, l_next, acc_next)
    _finish(out, lse, candidates, row_heads, heads, valid, m, l, acc, D, BLOCK_D)


def _chunks_apart(blocks: int, events: int) -> int:
    """How many chunks get a block each: 1, all in one block, unless rows alone do not fill half of the chip.

    The result is the same to the bit. `events` are at least those of the longest history.
    """
    chunks = cdiv(events, CHUNK.value)
    return chunks if chunks > 1 and 2 * blocks <= PROCESSORS and blocks * chunks <= MOST_PARTS else 1


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
    max_kv_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Every candidate's softmax over its user's history: `(out [T_c, H, D], lse [T_c, H] fp32)`."""
    rows, heads, dim = query.shape
    events, kv_heads, _ = key.shape
    users = q_offsets.shape[0] - 1
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((rows, heads), dtype=torch.float32)
    if out.numel() == 0 or users == 0:
        return out, lse
    query, factor = st.positive_scale(st.rows_of(query), scale)
    key, value, self_key, self_value = (st.rows_of(x) for x in (key, value, self_key, self_value))
    jagged = st.contiguous(q_offsets, kv_offsets, kv_lengths, visible)
    group, precision = heads // kv_heads, st.precision(query.dtype)
    # What the host knows of the longest history; the offsets are the device's.
    longest = events if max_kv_length is None else min(max_kv_length, events)
    p = parameters(
        "target_attention",
        head_dim=dim,
        dtype=query.dtype,
        visible=visible is not None,
        bias=key_bias is not None,
        self=self_key is not None,
        tf32=precision == "tf32",
        one_chunk=longest <= CHUNK.value,
        few_rows=few_rows(rows * group, users),
    )
    pack = st.heads_together(group, p.block_m, key_bias)
    tiles, head_tiles = cdiv(rows, p.block_m // pack) + users, heads // pack
    apart = _chunks_apart(tiles * head_tiles, longest)
    block_d = native_head_dim(dim)
    parts = None
    if longest > CHUNK.value:
        parts = query.new_empty((max(apart, 2), rows, heads, block_d + 2), dtype=torch.float32)
    common = {
        "D": dim,
        "BLOCK_D": block_d,
        "PACK": pack,
        "BLOCK_M": p.block_m,
        "HAS_LENGTHS": kv_lengths is not None,
        "HAS_VISIBLE": visible is not None,
        "num_warps": p.num_warps,
    }
    in_one = "one" if longest <= CHUNK.value else "in order"
    sizes = (users, rows, events, heads)
    strides = st.strides(query, key, value, self_key, self_value, key_bias)
    # In half precision what ptxas chooses does not spill, and more blocks are resident with it.
    registers = most_registers(p.num_warps) if query.dtype == torch.float32 else p.registers

    def forward(apart: int, chunks: str, careful: bool) -> None:
        _forward[tiles, head_tiles, apart](
            query, key, value, *jagged, self_key, self_value, key_bias, parts, out, lse, factor, *sizes,
            *strides, GROUP=group, BLOCK_N=p.block_n, HAS_SELF=self_key is not None,
            HAS_BIAS=key_bias is not None, PRECISION=precision, CHUNKS=chunks,
            CAREFUL=careful, num_stages=p.num_stages, maxnreg=registers, **common,
        )  # fmt: skip

    if apart > 1:
        forward(apart, "apart", False)
        _merge[tiles, head_tiles, 1](
            *jagged, parts, out, lse, *sizes, maxnreg=most_registers(p.num_warps), **common
        )
    else:
        forward(1, in_one, False)
    if visible is not None:
        forward(1, in_one, True)
    return out, lse
