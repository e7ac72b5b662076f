"""Triton kernels, compiled for sm_80 and executed, against PyTorch in float64."""

import pytest
import torch

triton = pytest.importorskip("triton")
import emu_triton_kernels as K  # noqa: E402
from ptxemu import PtxError, emulated, launch_triton  # noqa: E402

DT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(got, want, tolerance):
    """Largest error relative to the largest magnitude."""
    got, want = got.double(), want.double()
    assert torch.isfinite(got).all() == torch.isfinite(want).all()
    err = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item() if want.numel() else 0.0
    assert err <= tolerance, err
    return err


def test_vector_add_with_mask():
    n = 5000
    x, y, o = torch.randn(n), torch.randn(n), torch.full((6000,), -7.0)
    launch_triton(K.add, (triton.cdiv(n, 1024),), x, y, o, n, BLOCK=1024)
    assert torch.equal(o[:n], x + y)
    assert (o[n:] == -7).all()


def test_the_driver_can_be_used_with_plain_launches():
    x, y, o = torch.randn(100), torch.randn(100), torch.zeros(100)
    with emulated(schedule="random"):
        K.add[(1,)](x, y, o, 100, BLOCK=128)
    assert torch.equal(o, x + y)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("n", "warps"), [(1000, 4), (64, 1), (33, 8)])
def test_row_softmax(dtype, n, warps):
    x = torch.randn(7, n).to(DT[dtype])
    o = torch.zeros_like(x)
    launch_triton(
        K.softmax_rows, (7,), x, o, x.stride(0), n, BLOCK=triton.next_power_of_2(n), num_warps=warps
    )
    close(o, x.double().softmax(-1), {"fp32": 1e-6, "bf16": 2.0**-8, "fp16": 2.0**-11}[dtype])


def test_streaming_softmax():
    x = torch.randn(3, 1000) * 5
    o = torch.zeros_like(x)
    launch_triton(K.softmax_loop, (3,), x, o, 1000, BLOCK=128)
    close(o, x.double().softmax(-1), 2e-6)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "prec", "tolerance"),
    [
        ("bf16", "ieee", 1e-6),
        ("fp16", "ieee", 1e-6),
        ("fp32", "tf32", 2e-3),
        ("fp32", "tf32x3", 2e-6),
        ("fp32", "ieee", 2e-6),
    ],
)
def test_matmul(dtype, prec, tolerance, stages):
    M, N, D = 100, 80, 208  # rows whose stride is not a multiple of 16 get no cp.async
    a, b, c = torch.randn(M, D).to(DT[dtype]), torch.randn(D, N).to(DT[dtype]), torch.zeros(M, N)
    s = launch_triton(
        K.matmul,
        (2, 2),
        a,
        b,
        c,
        M,
        N,
        D,
        a.stride(0),
        b.stride(0),
        c.stride(0),
        BM=64,
        BN=64,
        BK=32,
        PREC=prec,
        num_stages=stages,
    )
    close(c, a.double() @ b.double(), tolerance)
    if prec != "ieee" or dtype != "fp32":
        shape = "m16n8k8" if dtype == "fp32" else "m16n8k16"
        per_block = 64 * 64 * 32 // (16 * 8 * int(shape[6:])) * (3 if prec == "tf32x3" else 1)
        assert sum(n for k, n in s.classes.items() if shape in k) == 4 * -(-D // 32) * per_block
    if stages > 1:
        assert s["cp.async bytes"] > 0


def test_autotuned_kernel_runs_every_configuration():
    x, y, o = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    launch_triton(K.tuned_add, lambda meta: (triton.cdiv(1000, meta["BLOCK"]),), x, y, o, 1000)
    assert torch.equal(o, x + y)
    assert K.tuned_add.best_config.kwargs["BLOCK"] in (64, 256)


def test_tensor_descriptors():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, o = torch.randn(64, 64), torch.zeros(2, 32, 32)
    launch_triton(K.tile_by_descriptor, (1,), TensorDescriptor.from_tensor(x, [32, 32]), x, o, 64, 64, B=32)
    assert torch.equal(o[0], x[32:, :32])
    assert torch.equal(o[1, :28], x[36:, 8:40])
    assert (o[1, 28:] == 0).all()


def reference(q, k, v, do, qo, ko, scale):
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    outs, lses = [], []
    for b in range(len(qo) - 1):
        Q, Kb, V = (
            x.transpose(0, 1) for x in (q[qo[b] : qo[b + 1]], k[ko[b] : ko[b + 1]], v[ko[b] : ko[b + 1]])
        )
        s = Q @ Kb.transpose(1, 2) * scale
        lses.append(s.logsumexp(-1).T)
        outs.append((torch.softmax(s, -1) @ V).transpose(0, 1))
    out = torch.cat(outs)
    out.backward(do.double())
    return out.detach(), torch.cat(lses).detach(), q.grad, k.grad, v.grad


def attention(q_lengths, k_lengths, H, D, dtype, prec, BM=32, BN=32, **options):
    qo, ko = (torch.tensor([0, *x]).cumsum(0) for x in (q_lengths, k_lengths))
    q, do = (torch.randn(int(qo[-1]), H, D).to(dtype) for _ in range(2))
    k, v = (torch.randn(int(ko[-1]), H, D).to(dtype) for _ in range(2))
    o, dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, q, k, v))
    lse, delta = (torch.zeros(len(q), H) for _ in range(2))
    scale = D**-0.5
    B, tiles = len(q_lengths), lambda n, t: max(1, -(-max(n) // t))
    const = dict(H=H, D=D, BM=BM, BN=BN, PREC=prec, num_stages=2, **options)
    launch_triton(K.attention_forward, (B, H, tiles(q_lengths, BM)), q, k, v, o, lse, qo, ko, scale, **const)
    launch_triton(
        K.attention_backward_q,
        (B, H, tiles(q_lengths, BM)),
        q,
        k,
        v,
        o,
        do,
        lse,
        dq,
        delta,
        qo,
        ko,
        scale,
        **const,
    )
    launch_triton(
        K.attention_backward_kv,
        (B, H, tiles(k_lengths, BN)),
        q,
        k,
        v,
        do,
        lse,
        delta,
        dk,
        dv,
        qo,
        ko,
        scale,
        **const,
    )
    return (o, lse, dq, dk, dv), reference(q, k, v, do, qo, ko, scale)


TOLERANCE = {"fp32 ieee": 3e-6, "fp32 tf32": 8e-3, "bf16 ieee": 1.5e-2, "fp16 ieee": 2e-3}


@pytest.mark.parametrize("D", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", list(TOLERANCE))
def test_jagged_attention_forward_and_backward(kind, D):
    dtype, prec = kind.split()
    got, want = attention([3, 0, 40, 33, 1], [10, 5, 0 + 1, 70, 32], 2, D, DT[dtype], prec)
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        close(g, w, 2e-3 if name == "lse" and prec == "tf32" else 1e-5 if name == "lse" else TOLERANCE[kind])


def test_empty_history_gives_zeros():
    got, _ = attention([5, 3], [0, 4], 1, 16, torch.float32, "ieee")
    assert (got[0][:5] == 0).all()
    assert torch.isinf(got[1][:5]).all()
    assert (got[2][:5] == 0).all()


def test_attention_with_warps_run_apart():
    """Random order of warps and blocks: bitwise the same result as in lockstep."""
    a, _ = attention([3, 40], [10, 70], 2, 32, torch.bfloat16, "ieee")
    for seed in (1, 2):
        torch.manual_seed(0)
        b, _ = attention([3, 40], [10, 70], 2, 32, torch.bfloat16, "ieee", schedule="random", seed=seed)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("N", "warps"), [(512, 4), (64, 1)])
def test_scans_sorts_gather(N, warps):
    x, index = torch.randn(N), torch.randint(0, N, (N,), dtype=torch.int32)
    o, top = torch.zeros(5 * N), torch.zeros(8)
    launch_triton(K.scans_and_sorts, (1,), x, index, o, top, N=N, K=8, num_warps=warps)
    close(o[:N], x.double().cumsum(0), 2e-6)
    assert torch.equal(o[N : 2 * N], x.sort()[0])
    assert torch.equal(top, x.topk(8)[0])
    assert torch.equal(o[2 * N : 3 * N], x[index.long()])
    assert torch.equal(o[3 * N : 4 * N], x.flip(0))
    assert torch.equal(o[4 * N :], x.cummax(0)[0])


@pytest.mark.parametrize(("M", "N"), [(16, 64), (64, 32)])
def test_reductions(M, N):
    x = torch.randn(M, N)
    o = torch.zeros(6 * M + 2 * N + 1)
    launch_triton(K.reductions, (1,), x, o, M=M, N=N)
    close(o[:M], x.double().sum(1), 1e-6)
    assert torch.equal(o[M : 2 * M], x.amax(1))
    assert torch.equal(o[2 * M : 3 * M], x.amin(1))
    assert torch.equal(o[3 * M : 4 * M], x.argmax(1).float())
    assert torch.equal(o[4 * M : 5 * M], x.argmin(1).float())
    close(o[5 * M : 5 * M + N], x.double().sum(0), 1e-6)
    assert torch.equal(o[5 * M + N : 5 * M + 2 * N], x.argmax(0).float())
    close(o[5 * M + 2 * N], x.double().sum(), 1e-5)
    close(o[5 * M + 2 * N + 1 :], x.double().var(1, unbiased=False), 1e-6)


def test_atomics():
    n = 1000
    index, value = torch.randint(0, 16, (n,)), torch.randint(-20, 20, (n,)).float()
    count, total, top = torch.zeros(16, dtype=torch.int32), torch.zeros(16), torch.full((16,), -100.0)
    old = torch.zeros(n, dtype=torch.int32)
    launch_triton(K.atomics, (4,), index, value, count, total, top, old, n, BLOCK=256)
    assert torch.equal(count.long(), torch.bincount(index, minlength=16))
    assert torch.equal(total, torch.zeros(16).index_add(0, index, value))
    assert torch.equal(top, torch.full((16,), -100.0).scatter_reduce(0, index, value, "amax"))
    for k in range(16):  # each old value was seen once
        assert sorted(old[index == k].tolist()) == list(range(int(count[k])))


def test_histogram():
    index, o = torch.randint(0, 64, (512,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    launch_triton(K.histogram, (1,), index, o, N=512, BINS=64)
    assert torch.equal(o.long(), torch.bincount(index, minlength=64))


def test_elementwise_functions_and_a_function_that_is_not_inlined():
    n, c = 200, 0.75
    x, y = torch.randn(n) * 3, torch.randn(n) * 3
    o = torch.zeros(8, n)
    launch_triton(K.elementwise, (1,), x, y, o, n, c, BLOCK=256)
    a, b = x.double(), y.double()

    def trunc(v):
        return v.to(torch.int32)

    def p(v):
        return (v * c + 1) * v + 0.5

    want = [
        a * p(c),
        a.sigmoid() * (b.abs() + 1).log(),
        a.abs().sqrt() + (b.abs() + 1).rsqrt(),
        a.sin() + b.cos(),
        a.erf() + b.floor() + a.ceil(),
        a / b + (a * b + c),
        a.clamp(-0.5, 0.5) + torch.minimum(a, b),
        (torch.div(trunc(x), 3, rounding_mode="trunc") + torch.fmod(trunc(y), 5)).double(),
    ]
    for g, w in zip(o, want, strict=True):
        close(g, w, 1e-6)


def test_random_numbers():
    import math

    o = torch.zeros(1024)
    launch_triton(K.philox, (1,), o, 1234, BLOCK=1024)

    def philox4x32(counter, key):
        c, k = [counter, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c[0]

    for i in range(0, 1024, 37):
        u = philox4x32(i, 1234)
        s = u - 2**32 if u >= 2**31 else u
        assert math.isclose(o[i].item(), (-s - 1 if s < 0 else s) * 4.6566127342e-10, rel_tol=1e-6)


def test_tuple_arguments():
    x, y, o = torch.randn(64), torch.randn(64), torch.zeros(64)
    launch_triton(K.tuple_arguments, (1,), (x, y), (2, 0.5), o, B=64)
    close(o, 2 * x.double() + 0.5 * y.double(), 1e-6)


def test_device_assert():
    x, o = torch.rand(100), torch.zeros(100)
    launch_triton(K.checked, (1,), x, o, 100, BLOCK=128, debug=True)
    assert torch.equal(x, o)
    x[37] = -1
    with pytest.raises(PtxError, match="device assertion failed: negative value"):
        launch_triton(K.checked, (1,), x, o, 100, BLOCK=128, debug=True)


def test_heuristics_and_integer_specialisation():
    for n in (1, 16, 100):  # 1 becomes a constant, 16 is known to divide
        x, o = torch.randn(5, n), torch.zeros(5)
        launch_triton(K.row_sum, (5,), x, o, n)
        close(o, x.double().sum(1), 1e-6)


def test_unaligned_pointer_is_specialised():
    x, y, o = torch.randn(1001), torch.randn(1001), torch.zeros(1001)
    launch_triton(K.add, (1,), x[1:], y[1:], o[1:], 1000, BLOCK=1024)
    assert torch.equal(o[1:], x[1:] + y[1:])
    assert o[0] == 0


def test_many_blocks_at_once_give_the_same_as_one_by_one():
    def run(lanes):
        torch.manual_seed(3)
        return attention([17, 2, 33, 5], [40, 1, 7, 64], 2, 16, torch.float32, "ieee", max_lanes=lanes)[0]

    for a, b in zip(run(1), run(100000), strict=True):
        assert torch.equal(a, b)
