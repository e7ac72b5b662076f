"""The k best of a set, kept while it streams past: what `catalog_topk` and `target_attention_top` share.

A score and its id make one int64 *key* whose order is the contract's: the higher score first, ties to the
lower id. So nothing below has to think of ties, and the k best of a set are the same whatever order it was
looked at in and however it was cut.

Each row of a block has a *list* in memory. A score that reaches the row's *floor* is appended; when a list
may not hold another tile, the k-th best key of each is found by bisection and becomes its floor, and what
lies below is dropped. No order is kept within a list: what is left at the end is sorted once.

The rare work (append, drop) stands behind a branch that a whole block takes together, so blocks are small, of
one warp: most tiles then have no score that reaches its row's floor, and pay one comparison a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below and above every key of a score.
NOTHING = tl.constexpr(-(1 << 63))
NEVER = tl.constexpr((1 << 63) - 1)
LAST_ID = tl.constexpr((1 << 31) - 1)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32: -inf does not reach it
SORTED_AT_ONCE = 2048  # keys that a block sorts in its registers; torch sorts longer lists


# --- keys ---------------------------------------------------------------------------------------------------


@triton.jit
def ordered(x):
    """float32 as an int32 with the same order; 0 and -0, which are equal, as the same. No NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(score, id):
    """The key of a score, which may not be NaN, and an id from 0 to LAST_ID."""
    return (ordered(score).to(tl.int64) << 32) | (id ^ LAST_ID).to(tl.int64)


@triton.jit
def score_of(key):
    """The score of a key, -inf of NOTHING."""
    high = (key >> 32).to(tl.int32)
    score = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key == NOTHING, -float("inf"), score)


@triton.jit
def id_of(key):
    """The id of a key, -1 of NOTHING."""
    return tl.where(key == NOTHING, -1, (key & LAST_ID) ^ LAST_ID)


# --- lists --------------------------------------------------------------------------------------------------
#
# Row r of a block has its floor, a key that at least k of its scores reach, at `floors + r * row_step`, the
# length of its list at `counts + r * row_step` and slot i of it at `lists + r * list_step + i * stride`: in
# memory and not in registers, because they are rarely needed. What lives in a loop is the row's *entry*, the
# score that must be reached for the rest to be looked at.


@triton.jit
def reached(key):
    """`(floor, last)`: a score reaches `key` if it is above `floor`, or equal to it with an id up to `last`.

    Every score but -inf and NaN reaches NOTHING, none reaches NEVER.
    """
    low = key & 0xFFFFFFFF  # the id's part has 31 bits; a key between two others may have the 32nd
    last = tl.where(key == NOTHING, LAST_ID, (-low) + LAST_ID).to(tl.int32)
    return tl.where(key == NOTHING, LOWEST, score_of(key)), last


@triton.jit
def start(keys, floors, counts, row_step):
    """Empty lists for rows of which k scores are known to reach `keys` [M]; returns the entry."""
    r = tl.arange(0, keys.shape[0])
    tl.store(floors + r * row_step, keys)
    tl.store(counts + r * row_step, tl.zeros_like(r))
    return reached(keys)[0]


@triton.jit
def any_enters(best, entry):
    """Whether some row's best score of a tile reaches its entry: a scalar, the same in the block."""
    return tl.max((best >= entry).to(tl.int32)) != 0


@triton.jit
def take(
    s, unit, event, tile, floors, counts, row_step, lists, list_step, stride, k, capacity, ROWS: tl.constexpr
):
    """Appends the scores `s [M, N] * unit` of the ids `event … event + N` that reach their row's floor, and
    returns the new entry [M].

    `capacity` of a list is at least `k + N`, or as many ids as there are. Ids rise from call to call. `tile`
    is memory of the block for M * N scores: they are looked at ROWS rows at a time, because keys and
    addresses of a whole tile would fill all registers, and most of its rows have nothing to append.
    """
    M: tl.constexpr = s.shape[0]
    N: tl.constexpr = s.shape[1]
    n = tl.arange(0, N)[None, :]
    r = tl.arange(0, M)
    tl.store(tile + r[:, None] * N + n, s * unit)
    tl.debug_barrier()
    for first in range(0, M, ROWS):
        some = first + tl.arange(0, ROWS)
        score = tl.load(tile + some[:, None] * N + n)
        floor, last = reached(tl.load(floors + some * row_step))
        hit = (score > floor[:, None]) | ((score == floor[:, None]) & (event + n <= last[:, None]))
        hits = hit.to(tl.int32)
        if tl.max(hits) != 0:
            count = tl.load(counts + some * row_step)
            slot = count[:, None] + tl.cumsum(hits, 1) - 1
            to = lists + some.to(tl.int64)[:, None] * list_step + slot.to(tl.int64) * stride
            tl.store(to, key_of(score, event + n), mask=hit)
            count += tl.sum(hits, 1)
            tl.store(counts + some * row_step, count)
            if tl.max(count) + N > capacity:
                own = lists + some.to(tl.int64) * list_step
                _drop(own, stride, count, counts + some * row_step, floors + some * row_step, k, capacity - N)
    tl.debug_barrier()
    # A score equal to the floor loses once the floor's id has gone by. The next float up as the entry keeps
    # rows of equal scores (a user of zeros) from being looked at in every tile.
    floor, last = reached(tl.load(floors + r * row_step))
    bits = ordered(floor) + 1
    above = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(last < event + N, above, floor)


@triton.jit
def _drop(lists, stride, count, counts, floors, k, room):
    """Drops what is not among the k best of each list, or all but at most `room`, which is quicker found.

    `lists`, `counts` and `floors` are pointers [M], `count` the lengths.
    """
    CHUNK: tl.constexpr = 128 // count.shape[0]
    tl.debug_barrier()  # what other threads appended
    key, _ = kth(lists, stride, count, counts, 1, k, tl.maximum(k, (k + room) // 2), CHUNK, False)
    kept = tl.zeros_like(count)
    for first in range(0, tl.max(count), CHUNK):
        keys, there = load_keys(lists, stride, count, counts, 1, first, CHUNK, False)
        keep = there & (keys >= key[:, None])
        to = kept[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.debug_barrier()  # all have read this chunk, into which they write next
        tl.store(lists[:, None] + to.to(tl.int64) * stride, keys, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 1)
    tl.store(counts, kept)
    # Fewer than k: all are kept, and the floor stays.
    tl.store(floors, key, mask=count >= k)
    tl.debug_barrier()


# --- the k-th best of lists ---------------------------------------------------------------------------------


@triton.jit
def load_keys(lists, stride, slots, counts, splits, first, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """`(keys, there)`, each [M, CHUNK]: slots `first …` of each list, of which row r has `slots[r]`.

    With SPLIT, slot i of a row is slot `i // splits` of its list number `i % splits`, which has `counts[i %
    splits]` keys.
    """
    slot = first + tl.arange(0, CHUNK)
    there = slot[None, :] < slots[:, None]
    if SPLIT:
        held = tl.load(counts[:, None] + (slot % splits)[None, :], mask=there, other=0)
        there = there & ((slot // splits)[None, :] < held)
    keys = tl.load(lists[:, None] + slot.to(tl.int64)[None, :] * stride, mask=there, other=NOTHING)
    return keys, there


@triton.jit
def kth(lists, stride, slots, counts, splits, k, most, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """`(key, n)`, each [M]: a key that from k to `most` keys of the row's list reach, and how many do.

    Bisection over all keys, so it takes any list in any order. A row with fewer than k keys: NOTHING and all.
    """
    M: tl.constexpr = slots.shape[0]
    low = tl.full((M,), NEVER, tl.int64)
    high = tl.full((M,), NOTHING, tl.int64)
    n = tl.zeros((M,), tl.int32)
    for first in range(0, tl.max(slots), CHUNK):
        keys, there = load_keys(lists, stride, slots, counts, splits, first, CHUNK, SPLIT)
        high = tl.maximum(high, tl.max(keys, 1))
        low = tl.minimum(low, tl.min(tl.where(there, keys, NEVER), 1))
        n += tl.sum(there.to(tl.int32), 1)
    low = tl.where(n < k, NOTHING, low)
    # From k to n keys reach low; fewer than k would reach high + 1.
    while tl.max(((n > most) & (low < high)).to(tl.int32)) != 0:
        # The upper middle; the sum of the two may not fit.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reach = tl.zeros((M,), tl.int32)
        for first in range(0, tl.max(slots), CHUNK):
            keys, there = load_keys(lists, stride, slots, counts, splits, first, CHUNK, SPLIT)
            reach += tl.sum((there & (keys >= middle[:, None])).to(tl.int32), 1)
        enough = reach >= k
        searching = low < high
        low = tl.where(searching & enough, middle, low)
        n = tl.where(searching & enough, reach, n)
        high = tl.where(searching & ~enough, middle - 1, high)
    return low, n


# --- sorting ------------------------------------------------------------------------------------------------


@triton.jit
def _exchange(keys, LOG_RUN: tl.constexpr, APART: tl.constexpr):
    """Puts each pair of keys APART in order: runs of 2 ** LOG_RUN alternate, the first one falls."""
    R: tl.constexpr = keys.shape[0]
    K: tl.constexpr = keys.shape[1]
    pairs = tl.reshape(keys, (R, K // (2 * APART), 2, APART))
    partner = tl.reshape(tl.sum(pairs, 2, keep_dims=True) - pairs, (R, K))
    at = tl.arange(0, K)
    higher_first = (at >> LOG_RUN) % 2 == 0
    first = (at & APART) == 0
    return tl.where((first == higher_first)[None, :], tl.maximum(keys, partner), tl.minimum(keys, partner))


@triton.jit
def sort_descending(keys, LOG_K: tl.constexpr):
    """`keys [R, 2 ** LOG_K]`, each row in falling order: a bitonic network.

    As `tl.sort`, whose exchange by `xor` the interpreter reduces element by element.
    """
    for log_run in tl.static_range(1, LOG_K + 1):
        for step in tl.static_range(log_run):
            keys = _exchange(keys, log_run, 1 << (log_run - 1 - step))
    return keys
