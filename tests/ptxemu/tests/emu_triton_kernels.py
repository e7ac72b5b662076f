"""Triton kernels of the kinds that attention, softmax, top-k and reductions are made of."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def softmax_rows(x, o, stride, n, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + r * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + r * stride + i, (e / tl.sum(e, 0)).to(o.dtype.element_ty), mask=i < n)


@triton.jit
def softmax_loop(x, o, n, BLOCK: tl.constexpr):
    """Streaming softmax over a row of any length, with a while loop."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    m = tl.full((), -float("inf"), tl.float32)
    s = tl.zeros((), tl.float32)
    at = 0
    while at < n:
        v = tl.load(x + r * n + at + i, mask=at + i < n, other=-float("inf"))
        new = tl.maximum(m, tl.max(v, 0))
        s = s * tl.exp2((m - new) * 1.4426950408889634) + tl.sum(tl.exp2((v - new) * 1.4426950408889634), 0)
        m = new
        at += BLOCK
    for k in range(0, n, BLOCK):
        v = tl.load(x + r * n + k + i, mask=k + i < n)
        tl.store(o + r * n + k + i, tl.exp(v - m) / s, mask=k + i < n)


@triton.jit
def matmul(
    a, b, c, M, N, K, sa, sb, sc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(
            a + rm[:, None] * sa + (k + rk)[None, :],
            mask=(rm[:, None] < M) & ((k + rk)[None, :] < K),
            other=0.0,
        )
        y = tl.load(
            b + (k + rk)[:, None] * sb + rn[None, :],
            mask=((k + rk)[:, None] < K) & (rn[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(x, y, acc, input_precision=PREC)
    tl.store(
        c + rm[:, None] * sc + rn[None, :],
        acc.to(c.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def attention_forward(
    q,
    k,
    v,
    o,
    lse,
    q_offsets,
    k_offsets,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    b, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0 = tl.load(q_offsets + b)
    nq = (tl.load(q_offsets + b + 1) - q0).to(tl.int32)
    k0 = tl.load(k_offsets + b)
    nk = (tl.load(k_offsets + b + 1) - k0).to(tl.int32)
    if tile * BM >= nq:
        return
    rm = tile * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    row = (q0 + rm)[:, None] * (H * D) + h * D + rd[None, :]
    mine = rm < nq
    qq = tl.load(q + row, mask=mine[:, None], other=0.0)
    m = tl.full((BM,), -float("inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for n0 in range(0, nk, BN):
        rn = n0 + tl.arange(0, BN)
        there = rn < nk
        col = (k0 + rn)[:, None] * (H * D) + h * D + rd[None, :]
        kk = tl.load(k + col, mask=there[:, None], other=0.0)
        s = tl.dot(qq, tl.trans(kk), input_precision=PREC) * (scale * 1.4426950408889634)
        s = tl.where(there[None, :], s, -float("inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        old = tl.exp2(m - new)
        l = l * old + tl.sum(p, 1)
        vv = tl.load(v + col, mask=there[:, None], other=0.0)
        acc = tl.dot(p.to(vv.dtype), vv, acc * old[:, None], input_precision=PREC)
        m = new
    acc = acc / tl.where(l > 0, l, 1.0)[:, None]
    tl.store(o + row, acc.to(o.dtype.element_ty), mask=mine[:, None])
    tl.store(lse + (q0 + rm) * H + h, m * 0.6931471805599453 + tl.log(l), mask=mine)


@triton.jit
def attention_backward_q(
    q,
    k,
    v,
    o,
    do,
    lse,
    dq,
    delta,
    q_offsets,
    k_offsets,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    b, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0 = tl.load(q_offsets + b)
    nq = (tl.load(q_offsets + b + 1) - q0).to(tl.int32)
    k0 = tl.load(k_offsets + b)
    nk = (tl.load(k_offsets + b + 1) - k0).to(tl.int32)
    if tile * BM >= nq:
        return
    rm = tile * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    row = (q0 + rm)[:, None] * (H * D) + h * D + rd[None, :]
    mine = rm < nq
    qq = tl.load(q + row, mask=mine[:, None], other=0.0)
    dd = tl.load(do + row, mask=mine[:, None], other=0.0)
    dl = tl.sum(tl.load(o + row, mask=mine[:, None], other=0.0).to(tl.float32) * dd.to(tl.float32), 1)
    tl.store(delta + (q0 + rm) * H + h, dl, mask=mine)
    le = tl.load(lse + (q0 + rm) * H + h, mask=mine, other=0.0) * 1.4426950408889634
    acc = tl.zeros((BM, D), tl.float32)
    for n0 in range(0, nk, BN):
        rn = n0 + tl.arange(0, BN)
        there = rn < nk
        col = (k0 + rn)[:, None] * (H * D) + h * D + rd[None, :]
        kk = tl.load(k + col, mask=there[:, None], other=0.0)
        vv = tl.load(v + col, mask=there[:, None], other=0.0)
        s = tl.dot(qq, tl.trans(kk), input_precision=PREC) * (scale * 1.4426950408889634)
        p = tl.where(there[None, :], tl.exp2(s - le[:, None]), 0.0)
        ds = p * (tl.dot(dd, tl.trans(vv), input_precision=PREC) - dl[:, None])
        acc = tl.dot(ds.to(kk.dtype), kk, acc, input_precision=PREC)
    tl.store(dq + row, (acc * scale).to(dq.dtype.element_ty), mask=mine[:, None])


@triton.jit
def attention_backward_kv(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    q_offsets,
    k_offsets,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    b, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0 = tl.load(q_offsets + b)
    nq = (tl.load(q_offsets + b + 1) - q0).to(tl.int32)
    k0 = tl.load(k_offsets + b)
    nk = (tl.load(k_offsets + b + 1) - k0).to(tl.int32)
    if tile * BN >= nk:
        return
    rn = tile * BN + tl.arange(0, BN)
    rd = tl.arange(0, D)
    col = (k0 + rn)[:, None] * (H * D) + h * D + rd[None, :]
    mine = rn < nk
    kk = tl.load(k + col, mask=mine[:, None], other=0.0)
    vv = tl.load(v + col, mask=mine[:, None], other=0.0)
    ak = tl.zeros((BN, D), tl.float32)
    av = tl.zeros((BN, D), tl.float32)
    for m0 in range(0, nq, BM):
        rm = m0 + tl.arange(0, BM)
        there = rm < nq
        row = (q0 + rm)[:, None] * (H * D) + h * D + rd[None, :]
        qq = tl.load(q + row, mask=there[:, None], other=0.0)
        dd = tl.load(do + row, mask=there[:, None], other=0.0)
        le = tl.load(lse + (q0 + rm) * H + h, mask=there, other=0.0) * 1.4426950408889634
        dl = tl.load(delta + (q0 + rm) * H + h, mask=there, other=0.0)
        s = tl.dot(kk, tl.trans(qq), input_precision=PREC) * (scale * 1.4426950408889634)
        p = tl.where(there[None, :], tl.exp2(s - le[None, :]), 0.0)
        av = tl.dot(p.to(dd.dtype), dd, av, input_precision=PREC)
        ds = p * (tl.dot(vv, tl.trans(dd), input_precision=PREC) - dl[None, :])
        ak = tl.dot(ds.to(qq.dtype), qq, ak, input_precision=PREC)
    tl.store(dk + col, (ak * scale).to(dk.dtype.element_ty), mask=mine[:, None])
    tl.store(dv + col, av.to(dv.dtype.element_ty), mask=mine[:, None])


@triton.jit
def scans_and_sorts(x, index, o, top, N: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(o + i, tl.cumsum(v, 0))
    tl.store(o + N + i, tl.sort(v))
    tl.store(top + tl.arange(0, K), tl.topk(v, K))
    tl.store(o + 2 * N + i, tl.gather(v, tl.load(index + i), 0))
    tl.store(o + 3 * N + i, tl.flip(v, 0))
    tl.store(o + 4 * N + i, tl.associative_scan(v, 0, _maximum))


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def reductions(x, o, M: tl.constexpr, N: tl.constexpr):
    r, c = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + r[:, None] * N + c[None, :])
    tl.store(o + r, tl.sum(v, 1))
    tl.store(o + M + r, tl.max(v, 1))
    tl.store(o + 2 * M + r, tl.min(v, 1))
    tl.store(o + 3 * M + r, tl.argmax(v, 1).to(tl.float32))
    tl.store(o + 4 * M + r, tl.argmin(v, 1).to(tl.float32))
    tl.store(o + 5 * M + c, tl.sum(v, 0))
    tl.store(o + 5 * M + N + c, tl.argmax(v, 0).to(tl.float32))
    tl.store(o + 5 * M + 2 * N, tl.sum(tl.sum(v, 0), 0))
    mean = tl.sum(v, 1) / N
    d = v - mean[:, None]
    tl.store(o + 5 * M + 2 * N + 1 + r, tl.sum(d * d, 1) / N)


@triton.jit
def atomics(index, value, count, total, top, old, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    k = tl.load(index + i, mask=m, other=0)
    v = tl.load(value + i, mask=m, other=0.0)
    before = tl.atomic_add(count + k, 1, mask=m)
    tl.store(old + i, before, mask=m)
    tl.atomic_add(total + k, v, mask=m)
    tl.atomic_max(top + k, v, mask=m)


@triton.jit
def histogram(index, o, N: tl.constexpr, BINS: tl.constexpr):
    tl.store(o + tl.arange(0, BINS), tl.histogram(tl.load(index + tl.arange(0, N)), BINS))


@triton.jit(noinline=True)
def polynomial(x, c):
    return (x * c + 1.0) * x + 0.5


@triton.jit
def elementwise(x, y, o, n, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    a, b = tl.load(x + i, mask=m, other=1.0), tl.load(y + i, mask=m, other=1.0)
    tl.store(o + i, a * polynomial(c, c), mask=m)
    tl.store(o + n + i, tl.sigmoid(a) * tl.log(tl.abs(b) + 1.0), mask=m)
    tl.store(o + 2 * n + i, tl.sqrt(tl.abs(a)) + tl.rsqrt(tl.abs(b) + 1.0), mask=m)
    tl.store(o + 3 * n + i, tl.sin(a) + tl.cos(b), mask=m)
    tl.store(o + 4 * n + i, tl.erf(a) + tl.floor(b) + tl.ceil(a), mask=m)
    tl.store(o + 5 * n + i, tl.math.div_rn(a, b) + tl.math.fma(a, b, c), mask=m)
    tl.store(o + 6 * n + i, tl.clamp(a, -0.5, 0.5) + tl.minimum(a, b), mask=m)
    tl.store(o + 7 * n + i, (a.to(tl.int32) // 3 + b.to(tl.int32) % 5).to(tl.float32), mask=m)


@triton.jit
def philox(o, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(o + i, tl.rand(seed, i))


@triton.heuristics({"BLOCK": lambda a: triton.next_power_of_2(a["n"])})
@triton.jit
def row_sum(x, o, n, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(o + r, tl.sum(tl.load(x + r * n + i, mask=i < n, other=0.0), 0))


@triton.jit
def checked(x, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.device_assert(v >= 0, "negative value")
    tl.store(o + i, v, mask=i < n)


@triton.jit
def tile_by_descriptor(d, p, o, M, N, B: tl.constexpr):
    i = tl.arange(0, B)
    here = i[:, None] * B + i[None, :]
    tl.store(o + here, d.load([B, 0]))
    inside = tl.make_tensor_descriptor(p, [M, N], [N, 1], [B, B])
    tl.store(o + B * B + here, inside.load([M - B + 4, 8]))


@triton.autotune(
    [triton.Config({"BLOCK": 64}, num_warps=1), triton.Config({"BLOCK": 256}, num_warps=4)], key=["n"]
)
@triton.jit
def tuned_add(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def tuple_arguments(xs, scale, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(xs[0] + i) * scale[0] + tl.load(xs[1] + i) * scale[1])
