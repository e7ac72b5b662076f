"""`catalog_topk`: the k best items of each user and their log-sum-exp, in one pass over the catalogue.

1. `_sample`: the best item of many groups of items, of one tile in EVERY. The k-th best of these is reached
   by k items or more, so it is a floor for the whole catalogue: about EVERY * k items reach it.
2. `_scan`: splits of the catalogue times tiles of users. Each block lists what reaches the floor
   (selection.py says how it goes on without one) beside a running softmax.
3. `_select`: the k best of a user's lists, and its log-sum-exp.
4. `_rank`: sorted, as scores and ids.

Memory is that of the lists, at most `LIST_BYTES` or k keys a user, and never that of all scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import selection as sel
from . import streaming as st
from .launch import cdiv, most_registers, native_head_dim, next_power_of_2, parameters

EVERY = 8  # of so many tiles one is sampled
LIST_BYTES = 128 << 20
BLOCKS = 2048  # of one warp, that fill a large GPU


# --- a tile of users ----------------------------------------------------------------------------------------


@triton.jit
def _users(users, row_stride, batch, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """`(u [M, D], u_at [M], rows [M] int64, valid [M])`, where the rows of u start and which there are."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < batch
    u = st.load_rows(users, rows, rows * 0, row_stride, 0, valid, D, BLOCK_D)
    return u, users + rows * row_stride, rows, valid


@triton.jit
def _next_exclusion(excluded, at, end, first, HAS_EXCLUDE: tl.constexpr):
    """`(next, at)`: each row's first excluded id from `first` on, and its place, from `at` to `end`.

    Ids rise within a row and end with LAST_ID, so there always is one.
    """
    if HAS_EXCLUDE:
        while tl.max(end - at) > 0:
            middle = (at + end) // 2
            before = tl.load(excluded + middle, mask=at < end, other=sel.LAST_ID) < first
            at = tl.where(before, middle + 1, at)
            end = tl.where(before, end, middle)
        return tl.load(excluded + at), at
    else:
        return tl.full((at.shape[0],), sel.LAST_ID, tl.int32), at


@triton.jit
def _exclusions(offsets, rows, valid, total, HAS_EXCLUDE: tl.constexpr):
    """`(first, last)`: places of each row's first excluded id and of the LAST_ID behind them, [M] int32."""
    if HAS_EXCLUDE:
        first = tl.minimum(tl.maximum(tl.load(offsets + rows, mask=valid, other=0), 0), total - 1)
        last = tl.minimum(tl.maximum(tl.load(offsets + rows + 1, mask=valid, other=1) - 1, first), total - 1)
        return first.to(tl.int32), last.to(tl.int32)
    else:
        return (rows * 0).to(tl.int32), (rows * 0).to(tl.int32)


@triton.jit
def _exclude(s, event, next, at, excluded):
    """Hides what is excluded of a tile of scores: `(s, next, at)`."""
    N: tl.constexpr = s.shape[1]
    id = event + tl.arange(0, N)
    while tl.min(next) < event + N:
        s = tl.where(id[None, :] == next[:, None], -float("inf"), s)
        at += (next < event + N).to(tl.int32)
        next = tl.load(excluded + at)
    return s, next, at


# --- a floor from a sample ----------------------------------------------------------------------------------


@triton.jit
def _best_of_groups(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    best, tile, at = state
    excluded, last, _ = context
    HAS_EXCLUDE: tl.constexpr = context[2]
    if HAS_EXCLUDE:
        next, at = _next_exclusion(excluded, at, last, event, True)
        s, next, at = _exclude(s, event, next, at, excluded)
    score = s * unit
    better = score > best
    return tl.where(better, score, best), tl.where(better, event, tile), at


@triton.jit(do_not_specialize=["factor", "batch", "tiles", "total"])
def _sample(
    users,
    catalog,
    bias,
    excluded,
    exclude_offsets,
    best,
    factor,
    batch,
    tiles,
    total,
    user_stride,
    item_stride,
    bias_stride,
    EVERY: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
):
    """The best key of each group, `best [B, blocks * GROUPS]`, of `tiles` times EVERY tiles.

    A group is some columns of the tiles that one block looks at. Neighbouring tiles go to different blocks,
    because neighbours in a catalogue may be alike.
    """
    block, blocks = tl.program_id(1), tl.num_programs(1)
    u, u_at, rows, valid = _users(users, user_stride, batch, D, BLOCK_D, BLOCK_M)
    at, last = _exclusions(exclude_offsets, rows, valid, total, HAS_EXCLUDE)
    scores = tl.full((BLOCK_M, BLOCK_N), -float("inf"), tl.float32)
    state = (scores, tl.zeros((BLOCK_M, BLOCK_N), tl.int32), at)
    for i in range(block, tiles, blocks):
        # Not always the same one of EVERY: a catalogue may have a period.
        event = (i * EVERY + (i * 5 + i // 8) % EVERY) * BLOCK_N
        state = st.stream(
            _best_of_groups, state, (excluded, last, HAS_EXCLUDE), u, catalog, item_stride, bias, bias_stride,
            factor, event, event + BLOCK_N, event + BLOCK_N, 0,
            D, BLOCK_D, BLOCK_N, HAS_BIAS, False, "ieee", 1.0, (u_at, valid),
        )  # fmt: skip
    scores, tile, at = state
    id = tile + tl.arange(0, BLOCK_N)[None, :]
    keys = tl.where(scores >= sel.LOWEST, sel.key_of(scores, id), sel.NOTHING)
    keys = tl.max(tl.reshape(keys, (BLOCK_M, GROUPS, BLOCK_N // GROUPS)), 2)
    to = best + rows[:, None] * (blocks * GROUPS) + (block * GROUPS + tl.arange(0, GROUPS))[None, :]
    tl.store(to, keys, mask=valid[:, None])


@triton.jit(do_not_specialize=["groups", "k"])
def _floor(best, floor, highest, groups, k, CHUNK: tl.constexpr):
    """The k-th best key of a row of `best [B, groups]`, NOTHING where there are fewer, and the best score."""
    row = tl.program_id(0).to(tl.int64)
    list = best + row * groups + tl.zeros((1,), tl.int64)
    slots = tl.zeros((1,), tl.int32) + groups
    key, _ = sel.kth(list, 1, slots, list, 1, k, k + k // 8, CHUNK, False)
    top = tl.full((CHUNK,), sel.NOTHING, tl.int64)
    for first in range(0, groups, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        top = tl.maximum(top, tl.load(best + row * groups + slot, mask=slot < groups, other=sel.NOTHING))
    tl.store(floor + row + tl.zeros((1,), tl.int64), key)
    tl.store(highest + row, sel.score_of(tl.max(top)))


# --- the pass over the catalogue ----------------------------------------------------------------------------


@triton.jit
def _finite(m):
    """What scores are taken relative to: an infinite maximum would make NaN of itself."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def _best_and_sum(state, context, s, unit, k, event, shown, MASKED: tl.constexpr):
    m, l, entry, next, at = state
    tile, floors, counts, lists, splits, most, capacity, excluded, _ = context
    HAS_EXCLUDE: tl.constexpr = context[8]
    if HAS_EXCLUDE:
        s, next, at = _exclude(s, event, next, at, excluded)
    best = tl.max(s, 1) * unit
    # The maximum is never below the floor, so it rises only where something enters.
    if sel.any_enters(best, entry):
        higher = tl.maximum(m, best)
        l *= tl.where(m == higher, 1.0, tl.exp2((m - higher) * st.LOG2E))  # -inf - -inf is NaN
        m = higher
        entry = sel.take(
            s, unit, event, tile, floors, counts, splits, lists, capacity * splits, splits, most, capacity, 4
        )
    # Subtracted before it is scaled, so that the weight of the highest is 1 however large it is.
    relative = tl.fma(s, tl.zeros_like(s) + unit, tl.broadcast_to(-_finite(m)[:, None], s.shape))
    l += tl.sum(tl.exp2(relative * st.LOG2E), 1)
    return m, l, entry, next, at


@triton.jit(do_not_specialize=["factor", "batch", "items", "total", "k", "capacity", "part"])
def _scan(
    users,
    catalog,
    bias,
    excluded,
    exclude_offsets,
    sample_floors,
    sample_best,
    tiles,
    floors,
    counts,
    lists,
    maxima,
    sums,
    factor,
    batch,
    items,
    total,
    k,
    capacity,
    part,
    user_stride,
    item_stride,
    bias_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
):
    """Part `program_id(1)` of the catalogue, `part` items: lists `[B, capacity, parts]`, and `[B', parts]` of
    the rest, where B' is B rounded up to a multiple of BLOCK_M."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    u, u_at, rows, valid = _users(users, user_stride, batch, D, BLOCK_D, BLOCK_M)
    begin = split * part
    end = tl.minimum(begin + part, items)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    keys = tl.full((BLOCK_M,), sel.NOTHING, tl.int64)
    if HAS_SAMPLE:
        keys = tl.load(sample_floors + rows, mask=valid, other=0)
        m = tl.load(sample_best + rows, mask=valid, other=0.0)
    keys = tl.where(valid, keys, sel.NEVER)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    floors += first_row * splits + split
    counts += first_row * splits + split
    lists += first_row * capacity * splits + split
    tiles += (tl.program_id(0) * splits + split).to(tl.int64) * (BLOCK_M * BLOCK_N)
    at, last = _exclusions(exclude_offsets, rows, valid, total, HAS_EXCLUDE)
    next, at = _next_exclusion(excluded, at, last, begin, HAS_EXCLUDE)
    entry = sel.start(keys, floors, counts, splits)
    m, l, entry, next, at = st.stream(
        _best_and_sum, (m, tl.zeros((BLOCK_M,), tl.float32), entry, next, at),
        (tiles, floors, counts, lists, splits, k, capacity, excluded, HAS_EXCLUDE),
        u, catalog, item_stride, bias, bias_stride, factor, begin, end, end, 0,
        D, BLOCK_D, BLOCK_N, HAS_BIAS, False, "ieee", 1.0, (u_at, valid),
    )  # fmt: skip
    tl.store(maxima + rows * splits + split, m)
    tl.store(sums + rows * splits + split, l)


@triton.jit(do_not_specialize=["splits", "capacity", "k"])
def _select(lists, counts, maxima, sums, best, lse, splits, capacity, k, CHUNK: tl.constexpr):
    """The k best keys of a user's lists, in any order and then NOTHING: `best [B, k]`; and `lse [B]`."""
    row = tl.program_id(0).to(tl.int64)
    counts += row * splits
    longest = 0
    m = -float("inf")
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        longest = tl.maximum(longest, tl.max(tl.load(counts + split, mask=split < splits, other=0)))
        m = tl.maximum(
            m, tl.max(tl.load(maxima + row * splits + split, mask=split < splits, other=-float("inf")))
        )
    l = 0.0
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        own = tl.load(maxima + row * splits + split, mask=split < splits, other=-float("inf"))
        sum = tl.load(sums + row * splits + split, mask=split < splits, other=0.0)
        l += tl.sum(tl.where(sum == 0.0, 0.0, sum * tl.exp2((_finite(own) - _finite(m)) * st.LOG2E)))
    tl.store(lse + row, _finite(m) + tl.log2(l) * st.LN2)

    none = tl.zeros((1,), tl.int64)
    list = lists + row * capacity * splits + none
    slots = none.to(tl.int32) + longest * splits
    key, _ = sel.kth(list, 1, slots, counts + none, splits, k, k, CHUNK, True)
    kept = none.to(tl.int32)
    for first in range(0, longest * splits, CHUNK):
        keys, there = sel.load_keys(list, 1, slots, counts + none, splits, first, CHUNK, True)
        keep = there & (keys >= key[:, None])
        to = kept[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.store(best + row * k + to, keys, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 1)
    for first in range(0, k, CHUNK):
        slot = first + tl.arange(0, CHUNK)[None, :]
        tl.store(
            best + row * k + slot, tl.full((1, CHUNK), sel.NOTHING, tl.int64), (slot >= kept) & (slot < k)
        )


@triton.jit(do_not_specialize=["batch", "k"])
def _rank(best, scores, ids, batch, k, R: tl.constexpr, LOG_K: tl.constexpr, SORT: tl.constexpr):
    """`best [B, k]` as scores and ids; with SORT in falling order, which needs k <= 2 ** LOG_K."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    slot = tl.program_id(1) * (1 << LOG_K) + tl.arange(0, 1 << LOG_K)
    there = (rows < batch)[:, None] & (slot < k)[None, :]
    at = rows[:, None] * k + slot[None, :]
    keys = tl.load(best + at, mask=there, other=sel.NOTHING)
    if SORT:
        keys = sel.sort_descending(keys, LOG_K)
    tl.store(scores + at, sel.score_of(keys), mask=there)
    tl.store(ids + at, sel.id_of(keys), mask=there)


# --- on the host --------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the work is cut. What is best does not depend on it, lse only by rounding."""

    block_m: int  # users of a block
    sampled: int  # tiles of the sample, 0 where the catalogue is too small for one
    sample_blocks: int
    groups: int  # of a block of the sample
    part: int  # items of a part of the catalogue, a multiple of block_n
    parts: int
    capacity: int  # keys of a list


def plan(batch: int, items: int, k: int, most_m: int, block_n: int) -> Plan:
    """The cut for sizes of at least 1; `most_m` is the largest tile of users."""
    tiles = cdiv(items, block_n)
    sampled = items // (block_n * EVERY)
    if sampled * block_n < 4 * k:  # the k-th best of fewer groups would be a poor floor
        sampled = 0
    capacity = k + 2 * block_n if sampled else 2 * k + 2 * block_n
    # Each part keeps k of its own where there is no floor for all.
    most_parts = max(
        1, min(tiles // 8, LIST_BYTES // (8 * batch * capacity), tiles if sampled else items // (8 * k))
    )
    block_m = most_m
    while block_m > 16 and (batch <= block_m // 2 or cdiv(batch, block_m) * most_parts < BLOCKS // 2):
        block_m //= 2
    row_tiles = cdiv(batch, block_m)
    wanted = max(1, BLOCKS // row_tiles)
    part = cdiv(tiles, min(wanted, most_parts)) * block_n
    sample_blocks = min(sampled, max(wanted, cdiv(4 * k, block_n)))
    groups = min(block_n, next_power_of_2(cdiv(4 * k, max(sample_blocks, 1))))
    return Plan(block_m, sampled, sample_blocks, groups, part, cdiv(items, part), min(capacity, part))


def why_not(op: str, arguments: dict[str, Any]) -> str | None:
    """What the kernels do not take."""
    items = arguments["catalog"].shape[0]
    return f"the catalogue has {items} items, and the kernel holds ids in 30 bits" if items >> 30 else None


def catalog_topk(
    users: Tensor,
    catalog: Tensor,
    k: int,
    *,
    exclude_ids: Tensor | None = None,
    exclude_offsets: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    filter: Tensor | None = None,
    filter_scale: Tensor | None = None,
    filter_error: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best items of each user: `(scores [B, k] fp32, ids [B, k], lse [B] fp32)`, without the filter."""
    batch, dim = users.shape
    items = catalog.shape[0]
    scores = users.new_empty((batch, k), dtype=torch.float32)
    ids = users.new_empty((batch, k), dtype=torch.int64)
    lse = users.new_full((batch,), -torch.inf, dtype=torch.float32)
    if batch == 0 or items == 0:
        return scores, ids, lse
    wanted = max(k, 1)  # lse needs the pass too
    launch = parameters("catalog_topk", head_dim=dim, dtype=users.dtype)
    cut = plan(batch, items, wanted, launch.block_m, launch.block_n)
    users, catalog = st.rows_of(users), st.rows_of(catalog)
    excluded = None
    if exclude_ids is not None:
        excluded, exclude_offsets = _sorted_exclusions(exclude_ids, exclude_offsets, items)
    inputs = (users, catalog, bias, excluded, exclude_offsets)
    strides = (users.stride(0), catalog.stride(0), 0 if bias is None else bias.stride(0))
    total = 0 if excluded is None else excluded.shape[0]
    options = {
        "D": dim,
        "BLOCK_D": native_head_dim(dim),
        "BLOCK_M": cut.block_m,
        "BLOCK_N": launch.block_n,
        "HAS_BIAS": bias is not None,
        "HAS_EXCLUDE": excluded is not None,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": most_registers(launch.num_warps),
    }
    row_tiles, factor = cdiv(batch, cut.block_m), 1.0 / temperature

    floors = highest = None
    if cut.sampled:
        floors, highest = ids.new_empty(batch), lse.new_empty(batch)
        groups = cut.sample_blocks * cut.groups
        best = ids.new_empty(batch, groups)
        _sample[row_tiles, cut.sample_blocks](
            *inputs, best, factor, batch, cut.sampled, total, *strides,
            EVERY=EVERY, GROUPS=cut.groups, **options,
        )  # fmt: skip
        _floor[batch,](best, floors, highest, groups, wanted, CHUNK=512, maxnreg=most_registers(4))
    lists = ids.new_empty(batch, cut.capacity, cut.parts)
    of_lists = (row_tiles * cut.block_m, cut.parts)
    counts = ids.new_empty(of_lists, dtype=torch.int32)
    maxima, sums = lse.new_empty(of_lists), lse.new_empty(of_lists)
    _scan[row_tiles, cut.parts](
        *inputs, floors, highest, lse.new_empty(*of_lists, launch.block_n), ids.new_empty(of_lists), counts,
        lists, maxima, sums, factor, batch, items, total, wanted, cut.capacity, cut.part, *strides,
        HAS_SAMPLE=floors is not None, **options,
    )  # fmt: skip
    best = ids.new_empty(batch, wanted)
    _select[batch,](lists, counts, maxima, sums, best, lse, cut.parts, cut.capacity, wanted, CHUNK=512)
    if k > 0:
        at_once = k <= sel.SORTED_AT_ONCE
        if not at_once:
            best = best.sort(descending=True).values
        log_k = (k - 1).bit_length() if at_once else 10
        rows = max(1, 1024 >> log_k)
        _rank[cdiv(batch, rows), cdiv(k, 1 << log_k)](
            best, scores, ids, batch, k, R=rows, LOG_K=log_k, SORT=at_once
        )
    return scores, ids, lse


def _sorted_exclusions(ids: Tensor, offsets: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """`(ids, offsets)` with each user's ids in rising order and LAST_ID behind them, int32.

    Sorted once for all users, by user and id. Ids outside the catalogue come last and exclude nothing.
    """
    users = torch.arange(offsets.shape[0] - 1, device=ids.device)
    user = torch.searchsorted(
        offsets[1:].long().contiguous(), torch.arange(ids.shape[0], device=ids.device), right=True
    )
    ids = ids.long()
    ids = ids.where((ids >= 0) & (ids < items), items)
    keys = torch.cat([user * (items + 1) + ids, users * (items + 1) + items]).sort().values
    of_user = keys % (items + 1)
    return of_user.where(of_user < items, sel.LAST_ID.value).int(), offsets.long() + F.pad(users + 1, (1, 0))
