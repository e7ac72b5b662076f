"""`target_attention_top`: the heaviest events of each candidate, in one pass over its user's history.

`_scan` keeps a list of each row's best events (selection.py) beside the softmax's maximum and sum, `_weigh`
sorts the lists and makes weights of the scores: the same arithmetic, tile for tile, as
`target_attention_weights`, and so the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import selection as sel
from . import streaming as st
from .launch import cdiv, most_registers, native_head_dim, next_power_of_2, parameters

LIST_BYTES = 128 << 20  # of all lists that exist at a time; more rows than that go one part after the other


@triton.jit
def _step(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    m, l, entry = state
    tile, floors, counts, lists, top, capacity = context
    m, l, _, _ = st.softmax_step(m, l, s, unit)
    # Raw scores are ordered and listed: times their unit two of them might become equal.
    if sel.any_enters(tl.max(s, 1), entry):
        entry = sel.take(s, 1.0, event, tile, floors, counts, 1, lists, capacity, 1, top, capacity, 4)
    return m, l, entry


@triton.jit(
    do_not_specialize=["first_tile", "users", "total_rows", "total_events", "heads", "top", "capacity"]
)
def _scan(
    query,
    key,
    q_offsets,
    kv_offsets,
    kv_lengths,
    visible,
    self_key,
    key_bias,
    tiles,
    floors,
    counts,
    lists,
    maxima,
    inverses,
    places,
    factor,
    first_tile,
    users,
    total_rows,
    total_events,
    heads,
    top,
    capacity,
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
    """The lists of block `program_id(0) * num_programs(1) + program_id(1)`: BLOCK_M rows, each with a list of
    `capacity`, its length, its softmax's maximum and inverse sum, and its place among all rows (-1: no row).
    """
    block = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = first_tile + tl.program_id(0)
    user, first, end = st.find_tile(tile, q_offsets, users, total_rows, BLOCK_M // PACK)
    if first >= end:
        tl.store(places + slots, tl.full((BLOCK_M,), -1, tl.int64))
        return
    head = tl.program_id(1) * PACK
    kv_head = (head // GROUP).to(tl.int64)
    begin, _, length = st.history(kv_offsets, kv_lengths, user, total_events, HAS_LENGTHS)
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
    floors += block * BLOCK_M
    counts += block * BLOCK_M
    lists += block * BLOCK_M * capacity
    tiles += block * BLOCK_M * BLOCK_N
    entry = sel.start(tl.where(valid, sel.NOTHING, sel.NEVER), floors, counts, 1)
    m, l, entry = st.stream(
        _step, (m, l, entry),
        (tiles, floors, counts, lists, top, capacity),
        q, key, key_row_stride, key_bias, bias_row_stride, factor, 0, least, most, seen,
        D, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_VISIBLE, PRECISION, st.LOG2E, (q_at, valid),
    )  # fmt: skip
    inverse, _ = st.softmax_end(m, l)
    tl.store(maxima + slots, m)
    tl.store(inverses + slots, inverse)
    tl.store(places + slots, tl.where(valid, candidates.to(tl.int64) * heads + row_heads, -1))


@triton.jit(do_not_specialize=["rows", "top", "capacity"])
def _weigh(
    lists,
    counts,
    maxima,
    inverses,
    places,
    weights,
    events,
    factor,
    rows,
    top,
    capacity,
    R: tl.constexpr,
    LOG_C: tl.constexpr,
    SORT: tl.constexpr,
):
    """The first `top` of `rows` lists, which SORT puts in order, as weights and events `[places, top]`."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    slot = tl.program_id(1) * (1 << LOG_C) + tl.arange(0, 1 << LOG_C)
    place = tl.load(places + row, mask=row < rows, other=-1)
    count = tl.load(counts + row, mask=place >= 0, other=0)
    listed = slot[None, :] < tl.minimum(count, capacity)[:, None]
    keys = tl.load(lists + row[:, None] * capacity + slot[None, :], mask=listed, other=sel.NOTHING)
    if SORT:
        keys = sel.sort_descending(keys, LOG_C)
    m = tl.load(maxima + row, mask=place >= 0, other=0.0)
    inverse = tl.load(inverses + row, mask=place >= 0, other=0.0)
    weight = st.weights_of(sel.score_of(keys), factor, m) * inverse[:, None]
    weight = tl.where(keys == sel.NOTHING, 0.0, weight)
    there = (place >= 0)[:, None] & (slot < top)[None, :]
    at = place[:, None] * top + slot[None, :]
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=there)
    tl.store(events + at, sel.id_of(keys), mask=there)


def target_attention_top(
    query: Tensor,
    key: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    top: int,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The heaviest events, heaviest first, ties by the earlier one: `(weights, events)`, `[T_c, H, top]`."""
    rows, heads, dim = query.shape
    total_events, kv_heads, _ = key.shape
    users = q_offsets.shape[0] - 1
    weights = query.new_empty((rows, heads, top))
    events = query.new_empty((rows, heads, top), dtype=torch.int64)
    if weights.numel() == 0 or users == 0:
        return weights, events
    query, factor = st.positive_scale(st.rows_of(query), scale)
    key, self_key = st.rows_of(key), st.rows_of(self_key)
    q_offsets, kv_offsets, kv_lengths, visible = st.contiguous(q_offsets, kv_offsets, kv_lengths, visible)
    traits = {"visible": visible is not None, "bias": key_bias is not None}
    launch = parameters("target_attention_top", head_dim=dim, dtype=query.dtype, **traits)
    # Sums are taken tile by tile, so the tiles are those of all weights. Bits of numpy's products depend on
    # the number of rows, too.
    of_all = parameters("target_attention_weights", head_dim=dim, dtype=query.dtype, **traits)
    block_n = of_all.block_n
    block_m = of_all.block_m if st.INTERPRETED.value else launch.block_m
    group = heads // kv_heads
    pack = st.heads_together(group, block_m, key_bias)
    # As many as are asked for even where there are fewer events: what is written is as wide as a list.
    capacity = next_power_of_2(max(top, min(top + block_n, total_events)))
    tiles = cdiv(rows, block_m // pack) + users
    blocks = heads // pack  # of a tile
    at_once = min(tiles, max(1, LIST_BYTES // (8 * blocks * block_m * capacity)))
    slots = at_once * blocks * block_m
    lists, floors, places = (
        events.new_empty(slots, capacity),
        events.new_empty(slots),
        events.new_empty(slots),
    )
    counts = events.new_empty(slots, dtype=torch.int32)
    scores, maxima, inverses = (
        query.new_empty(shape, dtype=torch.float32) for shape in ((slots, block_n), slots, slots)
    )
    sort = capacity <= sel.SORTED_AT_ONCE
    log_c = capacity.bit_length() - 1 if sort else 10
    together = max(1, 1024 >> log_c)
    for first_tile in range(0, tiles, at_once):
        if not sort:
            lists.fill_(sel.NOTHING.value)
        _scan[min(at_once, tiles - first_tile), blocks](
            query, key, q_offsets, kv_offsets, kv_lengths, visible, self_key, key_bias,
            scores, floors, counts, lists, maxima, inverses, places,
            factor, first_tile, users, rows, total_events, heads, top, capacity,
            *st.strides(query, key, self_key, key_bias),
            D=dim, BLOCK_D=native_head_dim(dim), GROUP=group, PACK=pack,
            BLOCK_M=block_m, BLOCK_N=block_n,
            HAS_LENGTHS=kv_lengths is not None, HAS_VISIBLE=visible is not None,
            HAS_SELF=self_key is not None, HAS_BIAS=key_bias is not None,
            PRECISION=st.precision(query.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
            maxnreg=most_registers(launch.num_warps),
        )  # fmt: skip
        used = min(at_once, tiles - first_tile) * blocks * block_m
        best = lists if sort else lists.sort(descending=True).values
        _weigh[cdiv(used, together), 1 if sort else cdiv(top, 1 << log_c)](
            best, counts, maxima, inverses, places, weights, events,
            1.0 if key_bias is not None else factor, used, top, capacity,
            R=together, LOG_C=log_c, SORT=sort,
        )  # fmt: skip
    return weights, events
