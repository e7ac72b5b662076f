""".cu files with real <<<>>> launchers, through nvcc and the stand-in runtime."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from ptxemu import CudaLibrary, PtxError, session
from ptxemu.cuda_front import CUDA_HOME

HERE = os.path.dirname(os.path.abspath(__file__))
pytestmark = pytest.mark.skipif(
    not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")), reason="needs nvcc"
)
BOTH = pytest.mark.parametrize("schedule", ["lockstep", "random"])


@pytest.fixture(scope="module")
def lib():
    return CudaLibrary(os.path.join(HERE, "emu_kernels.cu"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@BOTH
@pytest.mark.parametrize(("rows", "n", "threads"), [(5, 300, 128), (2, 33, 64), (1, 20000, 256)])
def test_softmax(lib, rows, n, threads, schedule):
    x, y = torch.randn(rows, n) * 3, torch.zeros(rows, n)
    assert lib.call("softmax", x, y, rows, n, threads, None, schedule=schedule) == 0
    assert (y - x.double().softmax(-1)).abs().max() < 1e-6
    assert lib.stats[0]["ex2"] == rows * n


def test_large_shared_memory_needs_the_opt_in():
    fresh = CudaLibrary(Path(HERE, "emu_kernels.cu").read_text() + "\n")
    x, y = torch.randn(1, 13000), torch.zeros(1, 13000)
    with pytest.raises(PtxError, match="bad launch"):
        fresh.call("softmax_without_opt_in", x, y, 1, 13000)


@BOTH
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [([64], [256]), ([3, 0, 70, 16], [10, 5, 65, 0]), ([1, 130], [1, 33])]
)
def test_attention(lib, q_lengths, k_lengths, schedule):
    qo, ko = (torch.tensor([0, *x]).cumsum(0) for x in (q_lengths, k_lengths))
    q, o = torch.randn(int(qo[-1]), 64).bfloat16(), torch.full((int(qo[-1]), 64), 9.0).bfloat16()
    k, v = (torch.randn(int(ko[-1]), 64).bfloat16() for _ in range(2))
    assert (
        lib.call("attention", q, k, v, o, qo, ko, len(q_lengths), max(q_lengths), 0.125, schedule=schedule)
        == 0
    )
    want = torch.cat(
        [
            torch.softmax(q[a:b].double() @ k[c:d].double().T * 0.125, -1) @ v[c:d].double()
            for a, b, c, d in zip(qo[:-1], qo[1:], ko[:-1], ko[1:], strict=True)
        ]
    )
    assert ((o.double() - want).abs().max() / want.abs().max()).item() < 1.2e-2
    tiles = sum(-(-m // 64) * -(-n // 32) for m, n in zip(q_lengths, k_lengths, strict=True))
    assert lib.stats[0]["mma m16n8k16 bf16"] == tiles * 4 * (4 * 4 + 2 * 8)  # 4 warps


@BOTH
@pytest.mark.parametrize(("n", "k"), [(1000, 8), (77, 64), (3000, 64)])
def test_topk(lib, n, k, schedule):
    x = torch.randn(3, n)
    x[1] = (x[1] * 2).round()  # many ties: by the lower id
    values, ids = torch.zeros(3, k), torch.zeros(3, k, dtype=torch.int32)
    assert lib.call("topk", x, values, ids, 3, n, k, schedule=schedule) == 0
    for r in range(3):
        order = sorted(range(n), key=lambda i: (-x[r, i].item(), i))[:k]
        assert ids[r].tolist() == order
        assert torch.equal(values[r], x[r, order])


@BOTH
def test_mixed(lib, schedule):
    n = 100
    p = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    d, f, w = torch.randn(n, dtype=torch.float64), torch.randn(n), torch.randn(4)
    ll, h, b = torch.zeros(n, dtype=torch.int64), torch.randn(2 * n).half(), torch.randn(2 * n).bfloat16()
    d0, f0, h0, b0 = d.clone(), f.double().clone(), h.clone(), b.clone()
    count = lib.call("mixed", p, d, ll, f, h, b, n, w, schedule=schedule)
    assert lib.call("mixed", p, d.clone(), ll.clone(), f.clone(), h.clone(), b.clone(), n, w) == count + 1

    def cdiv(a, b):
        return int(abs(a) // b) * (1 if a >= 0 else -1)

    for i in range(n):
        v = int(p[i]) * 1000003
        a32 = (i * 77777777 + 2**31) % 2**32 - 2**31
        brev = int(f"{i:032b}"[::-1], 2)
        want = (
            cdiv(v, 3 + i)
            + (v - 97 * cdiv(v, 97))
            + (i * 7 % 24) ** 2
            + i
            + bin(v % 2**64).count("1")
            + (i & -i).bit_length()
            + 32
            - i.bit_length()
        )
        want += (a32 * 12345678) >> 32
        got = int(ll[i])
        assert (got - want - brev) % 2**32 == 0, i  # (the int part wraps at 32 bits)
    want = (
        d0.abs().sqrt() * 1.25
        + torch.exp(-d0 * d0)
        + torch.tensor([1, -2, 3])[torch.arange(n) % 3]
        + torch.log(1 + d0 * d0)
    )
    assert (d - want).abs().max() < 1e-13
    W = w.double()
    want = (
        ((W[0] * f0 + W[1]) * f0 + W[2]) * f0
        + W[3]
        + f0.sin()
        + f0.exp()
        + (f0.abs() + 1).log()
        + f0.tanh()
        + f0.abs() ** 1.5
        + f0.erf()
        + (f0 * f0 + 1).rsqrt()
        + f0 / 3
    )
    assert ((f - want).abs() / want.abs().clamp_min(1)).max() < 2e-6
    assert torch.equal(h, (h0.double() ** 2 + 0.5).half())
    assert torch.equal(
        b, ((b0.double() + b0.double()).bfloat16().double() * torch.tensor([1.5, -2.0]).repeat(n)).bfloat16()
    )


@BOTH
def test_cooperative_groups_and_printf(lib, schedule, capfd):
    x, o = torch.randint(0, 100, (64,), dtype=torch.int32), torch.zeros(6, 64, dtype=torch.int32)
    assert lib.call("groups", x, o, schedule=schedule) == 0
    assert torch.equal(o[0], x.view(8, 8).sum(1, dtype=torch.int32).repeat_interleave(8))
    up = x.view(8, 8).clone()
    up[:, 1:] = x.view(8, 8)[:, :-1]
    assert torch.equal(o[1], up.flatten())
    assert torch.equal(o[2], x.view(2, 32).amax(1).repeat_interleave(32))
    assert (o[3] == (x & 1).sum()).all()
    w = (x & 3).view(2, 32)
    assert torch.equal(o[4].view(2, 32), (w[:, :, None] == w[:, None, :]).sum(2, dtype=torch.int32))
    odd = (x & 1).view(2, 32)
    rank = odd.cumsum(1) - odd + 100 * odd.sum(1, keepdim=True)
    assert torch.equal(o[5].view(2, 32).long(), torch.where(odd == 1, rank, -1))
    printed = capfd.readouterr().out
    for t in range(2):
        assert f"thread {t} has {int(x[t])} and {int(x[t]) * 0.5:.2f} text\n" in printed


def test_shared_memory_beyond_the_chip_s(lib):
    assert lib.call("more_shared_memory_than_there_is") == 1  # cudaErrorInvalidValue


def test_unregistered_memory_is_refused(lib):
    x, y = torch.randn(1, 64), torch.zeros(1, 64)
    with pytest.raises(PtxError, match="out of bounds"):
        lib.call("softmax", ctypes.c_void_p(x.data_ptr()), y, 1, 64, 32, None)
    with pytest.raises(PtxError, match="out of bounds") as e:  # a row more than there is
        lib.call("softmax", x, y, 2, 64, 32, None)
    assert e.value.block == (1, 0, 0)
    assert "softmax_kernel" in e.value.kernel


@BOTH
def test_cub_block_algorithms(schedule):
    lib = CudaLibrary(os.path.join(HERE, "emu_kernels_cub.cu"))
    x = torch.randn(512)
    x[100:140] = 0.5  # ties keep their order
    sorted_, ids, sums = torch.zeros(512), torch.zeros(512, dtype=torch.int32), torch.zeros(513)
    scan, tops = torch.zeros(128, dtype=torch.int32), torch.zeros(4)
    assert lib.call("run", x, sorted_, ids, sums, scan, tops, schedule=schedule) == 0
    value, order = x.sort(descending=True, stable=True)
    assert torch.equal(sorted_, value)
    assert torch.equal(ids.long(), order)
    assert (sums[:512] - value.double().cumsum(0)).abs().max() < 1e-4
    assert abs(sums[512] - x.double().sum()) < 1e-4
    first = ids.view(4, 32, 4)[:, :, 0]
    assert torch.equal(scan.view(4, 32), first.cumsum(1).int() - first)
    assert torch.equal(tops, value.view(4, 128)[:, 0])


class TestContractSuite:
    """CUDA C++ as the contract suite runs it: every launch in lockstep, then with its warps apart, strict."""

    def test_launches_of_host_code_run_twice(self, lib, monkeypatch):
        launches = []
        monkeypatch.setattr(session, "observe", lambda call, *_: launches.append((call.name, call.grid)))
        monkeypatch.setattr(lib, "execute", session.execute)
        x, y = torch.randn(5, 300) * 3, torch.full((5, 300), torch.nan)
        assert lib.call("softmax", x, y, 5, 300, 128, None) == 0
        assert (y - x.double().softmax(-1)).abs().max() < 1e-6
        assert [grid for _, grid in launches] == [(5, 1, 1)]
        assert "softmax_kernel" in launches[0][0]

    def test_a_result_that_depends_on_the_order_of_warps(self):
        """By relaxed atomics, which are no race: the last warp to come is the one whose number stays."""
        lib = CudaLibrary(
            """#include <cuda_runtime.h>
            __global__ void last(int* out) { if (threadIdx.x % 32 == 0) atomicExch(out + 1, threadIdx.x / 32);
              __syncthreads(); if (threadIdx.x == 0) out[0] = atomicAdd(out + 1, 0); }
            extern "C" int run(int* out) { last<<<1, 256>>>(out); return cudaGetLastError(); }
            """,
            execute=session.execute,
        )

        def often():
            for _ in range(20):
                lib.call("run", torch.zeros(2, dtype=torch.int32))

        with pytest.raises(PtxError, match="depends on the order of warps"):
            often()

    def test_blocks_that_meet(self):
        lib = CudaLibrary(
            """#include <cuda_runtime.h>
            __global__ void same(float* out) { if (threadIdx.x == 0) out[blockIdx.x / 2] = 1; }
            extern "C" int run(float* out) { same<<<4, 32>>>(out); return cudaGetLastError(); }
            """,
            execute=session.execute,
        )
        with pytest.raises(PtxError, match="race: write by block"):
            lib.call("run", torch.zeros(2))
