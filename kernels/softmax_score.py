"""`softmax_score` and its gradient: a user's softmax over its own items.

One row a set of items, so there is no matrix product in it, and what counts is to read each item once. A
user's items are cut into chunks of CHUNK by their place in the user's list, a block each. A chunk's logits go
to memory of the size of the result, its maximum and sum beside them. The same block finishes a user who has
one chunk; else the next kernel merges the chunks in their order. Nothing depends on the other users, so that
a user's results are the same bits in any batch.

Logits stay in nats: where one item takes all, its probability is 1 exactly, however large the logits.

Gradient, with d = p (grad - Σ grad p): d to the bias, d / temperature · user to an item, and
Σ d / temperature · item to the user.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import REGISTERS, cdiv, native_head_dim, parameters
from .streaming import LOG2E, find_tile, load_events, rows_of, user_range

CHUNK = tl.constexpr(1024)
PARTS = tl.constexpr(64)  # chunks of a user that are merged at a time


# --- the softmax --------------------------------------------------------------------------------------------


@triton.jit
def _add(maximum, total, weighted, of_maximum, of_total, of_weighted):
    """Two softmaxes made one, lane by lane: maximum, Σ exp(z - maximum), Σ weight · exp(z - maximum)."""
    highest = tl.maximum(maximum, of_maximum)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    mine = tl.exp2((maximum - base) * LOG2E)
    other = tl.exp2((of_maximum - base) * LOG2E)
    return highest, total * mine + of_total * other, weighted * mine + of_weighted * other


@triton.jit
def _over_lanes(maximum, total, weighted):
    highest = tl.max(maximum, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    factor = tl.exp2((maximum - base) * LOG2E)
    return highest, tl.sum(total * factor, 0), tl.sum(weighted * factor, 0)


@triton.jit
def _merged(maxima, totals, weights, first, chunks):
    """The softmax over a user's chunks, `first` being the first one's number."""
    maximum = tl.full((PARTS,), -float("inf"), tl.float32)
    total = tl.zeros((PARTS,), tl.float32)
    weighted = tl.zeros((PARTS,), tl.float32)
    for begin in range(0, chunks, PARTS):
        part = begin + tl.arange(0, PARTS)
        there = part < chunks
        maximum, total, weighted = _add(
            maximum,
            total,
            weighted,
            tl.load(maxima + first + part, mask=there, other=-float("inf")),
            tl.load(totals + first + part, mask=there, other=0.0),
            tl.load(weights + first + part, mask=there, other=0.0),
        )
    return _over_lanes(maximum, total, weighted)


@triton.jit
def _probabilities(z, maximum, total):
    """Softmax of logits z; a user whose items are all hidden gets zeros."""
    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    return tl.div_rn(tl.exp2((z - base) * LOG2E), tl.where(total == 0.0, 1.0, total))


@triton.jit
def _normalize(logits, out, first, last, maximum, total, BLOCK: tl.constexpr):
    for begin in range(0, tl.minimum(last - first, CHUNK).to(tl.int32), BLOCK):
        item = first + begin + tl.arange(0, BLOCK)
        inside = item < last
        p = _probabilities(tl.load(logits + item, mask=inside, other=0.0), maximum, total)
        tl.store(out + item, p.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["user_count", "item_count"])
def _score(
    users,
    items,
    offsets,
    bias,
    grad,
    logits,
    maxima,
    totals,
    weights,
    out,
    user_count,
    item_count,
    users_stride,
    items_stride,
    bias_stride,
    grad_stride,
    temperature,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
):
    """A chunk's logits, maximum and sums; of a user with one chunk (unless HAS_GRAD) its probabilities too.

    HAS_GRAD: also Σ grad · exp(z - maximum), for the backward.
    """
    tile = tl.program_id(0)
    user, first, last = find_tile(tile, offsets, user_count, item_count, CHUNK)
    if first >= last:
        return
    d = tl.arange(0, BLOCK_D)
    row = tl.load(users + user.to(tl.int64) * users_stride + d, mask=d < D, other=0.0).to(tl.float32)
    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.minimum(last - first, CHUNK).to(tl.int32)
    for begin in range(0, count, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < count
        seen = inside
        if HAS_BIAS:
            added = tl.load(bias + (first + n) * bias_stride, mask=inside, other=-float("inf")).to(tl.float32)
            seen = added != -float("inf")
        x = load_events(items, first + begin, items_stride, seen, False, D, BLOCK_D, BLOCK_N)
        z = tl.div_rn(tl.sum(x.to(tl.float32) * row[None, :], 1), temperature)
        if HAS_BIAS:
            z += added
        z = tl.where(seen, z, -float("inf"))
        tl.store(logits + first + n, z, mask=inside)
        weight = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_GRAD:
            weight = tl.load(grad + (first + n) * grad_stride, mask=seen, other=0.0).to(tl.float32)
        maximum, total, weighted = _add(
            maximum, total, weighted, z, tl.full((BLOCK_N,), 1.0, tl.float32), weight
        )
    maximum, total, weighted = _over_lanes(maximum, total, weighted)
    tl.store(maxima + tile, maximum)
    tl.store(totals + tile, total)
    if HAS_GRAD:
        tl.store(weights + tile, weighted)
    else:
        begin, end = user_range(offsets, user, item_count)
        if end - begin <= CHUNK:
            tl.debug_barrier()  # the logits that the block's other threads have stored
            _normalize(logits, out, first, last, maximum, total, BLOCK_N)


@triton.jit(do_not_specialize=["user_count", "item_count"])
def _normalize_long(offsets, logits, maxima, totals, out, user_count, item_count, BLOCK: tl.constexpr):
    """Probabilities of users with several chunks."""
    tile = tl.program_id(0)
    user, first, last = find_tile(tile, offsets, user_count, item_count, CHUNK)
    begin, end = user_range(offsets, user, item_count)
    if (first < last) & (end - begin > CHUNK):
        chunks = tl.cdiv(end - begin, CHUNK).to(tl.int32)
        maximum, total, _ = _merged(maxima, totals, totals, begin // CHUNK + user, chunks)
        _normalize(logits, out, first, last, maximum, total, BLOCK)


# --- the gradient -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["user_count", "item_count"])
def _weigh(probabilities, grad, offsets, weights, user_count, item_count, grad_stride, BLOCK: tl.constexpr):
    """Σ grad · p of each chunk. Where p is 0, whatever grad says is nothing."""
    tile = tl.program_id(0)
    _, first, last = find_tile(tile, offsets, user_count, item_count, CHUNK)
    if first < last:
        lanes = tl.zeros((BLOCK,), tl.float32)
        count = tl.minimum(last - first, CHUNK).to(tl.int32)
        for begin in range(0, count, BLOCK):
            n = begin + tl.arange(0, BLOCK)
            p = tl.load(probabilities + first + n, mask=n < count, other=0.0)
            lanes += p * tl.load(grad + (first + n) * grad_stride, mask=(n < count) & (p != 0.0), other=0.0)
        tl.store(weights + tile, tl.sum(lanes, 0))


@triton.jit(do_not_specialize=["user_count", "item_count"])
def _gradients(
    users,
    items,
    offsets,
    grad,
    scores,
    maxima,
    totals,
    weights,
    grad_users,
    grad_items,
    grad_bias,
    partial,
    user_count,
    item_count,
    users_stride,
    items_stride,
    grad_stride,
    temperature,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """A chunk's part of all gradients; `scores` are probabilities, or with LOGITS what `_score` has left."""
    tile = tl.program_id(0)
    user, first, last = find_tile(tile, offsets, user_count, item_count, CHUNK)
    if first >= last:
        return
    user_begin, user_end = user_range(offsets, user, item_count)
    chunks = tl.cdiv(user_end - user_begin, CHUNK).to(tl.int32)
    first_chunk = user_begin // CHUNK + user
    if LOGITS:
        maximum, total, weighted = _merged(maxima, totals, weights, first_chunk, chunks)
        mean = weighted / tl.where(total == 0.0, 1.0, total)
    else:
        lanes = tl.zeros((PARTS,), tl.float32)
        for begin in range(0, chunks, PARTS):
            part = begin + tl.arange(0, PARTS)
            lanes += tl.load(weights + first_chunk + part, mask=part < chunks, other=0.0)
        mean = tl.sum(lanes, 0)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(users + user.to(tl.int64) * users_stride + d, mask=d < D, other=0.0).to(tl.float32)
    of_user = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    count = tl.minimum(last - first, CHUNK).to(tl.int32)
    for begin in range(0, count, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < count
        if LOGITS:
            z = tl.load(scores + first + n, mask=inside, other=-float("inf"))
            p = _probabilities(z, maximum, total)
        else:
            p = tl.load(scores + first + n, mask=inside, other=0.0)
        # Hidden items have p = 0. Neither their gradient nor their vector is read.
        change = tl.load(grad + (first + n) * grad_stride, mask=inside & (p != 0.0), other=0.0).to(tl.float32)
        change = tl.where(p != 0.0, p * (change - mean), 0.0)
        if HAS_BIAS:
            tl.store(grad_bias + first + n, change.to(grad_bias.dtype.element_ty), mask=inside)
        change = change / temperature
        x = load_events(items, first + begin, items_stride, change != 0.0, False, D, BLOCK_D, BLOCK_N)
        of_user += x.to(tl.float32) * change[:, None]
        of_items = tl.where(change[:, None] != 0.0, row[None, :] * change[:, None], 0.0)
        at = grad_items + (first + begin) * D + (tl.arange(0, BLOCK_N)[:, None] * D + d[None, :])
        tl.store(at, of_items.to(grad_items.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    of_user = tl.sum(of_user, 0)
    if chunks == 1:
        at = grad_users + user.to(tl.int64) * D + d
        tl.store(at, of_user.to(grad_users.dtype.element_ty), mask=d < D)
    else:
        tl.store(partial + tile.to(tl.int64) * BLOCK_D + d, of_user)


@triton.jit(do_not_specialize=["item_count"])
def _sum_of_chunks(
    offsets, partial, grad_users, item_count, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr
):
    """The gradients of users with several chunks, and the zeros of those with none."""
    user = tl.program_id(0)
    begin, end = user_range(offsets, user, item_count)
    chunks = tl.cdiv(end - begin, CHUNK).to(tl.int32)
    if chunks != 1:
        d = tl.arange(0, BLOCK_D)
        lanes = tl.zeros((CHUNKS, BLOCK_D), tl.float32)
        for chunk in range(0, chunks, CHUNKS):
            n = chunk + tl.arange(0, CHUNKS)
            at = partial + (begin // CHUNK + user + n)[:, None] * BLOCK_D + d[None, :]
            lanes += tl.load(at, mask=(n < chunks)[:, None], other=0.0)
        total = tl.sum(lanes, 0).to(grad_users.dtype.element_ty)
        tl.store(grad_users + user.to(tl.int64) * D + d, total, mask=d < D)


# --- on the host --------------------------------------------------------------------------------------------


class _Arguments:
    """What the launches of a call share."""

    def __init__(
        self,
        kernel: str,
        users: Tensor,
        items: Tensor,
        offsets: Tensor,
        temperature: float,
        bias: Tensor | None,
    ) -> None:
        self.users, self.items, self.offsets = rows_of(users), rows_of(items), offsets.contiguous()
        self.temperature, self.bias = temperature, bias
        self.counts = users.shape[0], items.shape[0]
        # At least as many chunks as there are, whatever the offsets hold.
        self.grid = (cdiv(items.shape[0], CHUNK.value) + users.shape[0],)
        self.dim = users.shape[1]
        self.block_d = native_head_dim(self.dim)
        launch = parameters(kernel, head_dim=self.dim, dtype=users.dtype)
        self.block_n, self.num_warps = launch.block_n, launch.num_warps
        self.parts = torch.empty(3, *self.grid, dtype=torch.float32, device=users.device)

    def score(self, logits: Tensor, out: Tensor | None, grad: Tensor | None) -> None:
        _score[self.grid](
            self.users, self.items, self.offsets, self.bias, grad, logits, *self.parts, out, *self.counts,
            self.users.stride(0), self.items.stride(0), _stride(self.bias), _stride(grad), self.temperature,
            D=self.dim, BLOCK_D=self.block_d, BLOCK_N=self.block_n, HAS_BIAS=self.bias is not None,
            HAS_GRAD=grad is not None, num_warps=self.num_warps, num_stages=1,
        )  # fmt: skip


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def softmax_score(
    users: Tensor, items: Tensor, offsets: Tensor, *, temperature: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """`probabilities [T_c]` of `users [B, D]` over `items [T_c, D]`, in their dtype: fp32, fp16 or bf16.

    D at most 256; `bias [T_c]` fp32 or of the users' dtype, -inf hides an item.
    """
    out = users.new_empty(items.shape[0])
    if out.shape[0] == 0 or users.shape[0] == 0:
        return out.zero_()
    call = _Arguments("softmax_score", users, items, offsets, temperature, bias)
    logits = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    call.score(logits, out, None)
    if out.shape[0] > CHUNK.value:  # else no user has a second chunk
        _normalize_long[call.grid](call.offsets, logits, *call.parts[:2], out, *call.counts, BLOCK=256)
    return out


def softmax_score_backward(
    grad: Tensor,
    users: Tensor,
    items: Tensor,
    offsets: Tensor,
    probabilities: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(grad_users, grad_items, grad_bias)`, the last of shape [0] without a bias.

    Probabilities in 16 bits would be the gradient's largest error. They are taken again, for one more reading
    of the items.
    """
    grad_users, grad_items = users.new_empty(users.shape), items.new_empty(items.shape)
    grad_bias = users.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    if items.shape[0] == 0 or users.shape[0] == 0:
        return grad_users.zero_(), grad_items.zero_(), grad_bias.zero_()
    call = _Arguments("softmax_score_backward", users, items, offsets, temperature, bias)
    again = users.dtype != torch.float32
    if again:
        scores = torch.empty_like(probabilities, dtype=torch.float32)
        call.score(scores, None, grad)
    else:
        scores = probabilities.contiguous()
        _weigh[call.grid](scores, grad, call.offsets, call.parts[2], *call.counts, _stride(grad), BLOCK=256)
    partial = torch.empty(*call.grid, call.block_d, dtype=torch.float32, device=users.device)
    # What four blocks on an SM have: without a limit ptxas aims at five on sm_100 and spills 8 bytes.
    _gradients[call.grid](
        call.users, call.items, call.offsets, grad, scores, *call.parts, grad_users, grad_items, grad_bias,
        partial, *call.counts, call.users.stride(0), call.items.stride(0), _stride(grad), temperature,
        D=call.dim, BLOCK_D=call.block_d, BLOCK_N=call.block_n, HAS_BIAS=bias is not None, LOGITS=again,
        num_warps=call.num_warps, num_stages=1, maxnreg=REGISTERS // (4 * 32 * call.num_warps),
    )  # fmt: skip
    _sum_of_chunks[(users.shape[0],)](
        call.offsets, partial, grad_users, items.shape[0], D=call.dim, BLOCK_D=call.block_d,
        CHUNKS=max(1, 2048 // call.block_d),
    )  # fmt: skip
    return grad_users, grad_items, grad_bias
