"""How the CUDA C++ backend launches: plans, and settings that only it has. On the runner cuda-emulator."""

import ctypes

import pytest
import torch
from helpers import assert_matches_reference, make_jagged
from hypothesis import given
from hypothesis import strategies as st
from runners import RUNNER

import attnrec

pytestmark = pytest.mark.skipif(
    RUNNER.name != "cuda-emulator", reason="needs the kernels' libraries: ATTNREC_TEST_RUNNER=cuda-emulator"
)

PLAN = """
#include "cuda/target_attention.h"
extern "C" int plan(const int64_t* sizes, int64_t* out) {
  attnrec::cuda::Attention a;
  a.element = static_cast<attnrec::cuda::Element>(sizes[0]);
  a.head_dim = sizes[1], a.heads = sizes[2], a.kv_heads = sizes[3];
  a.users = sizes[4], a.rows = sizes[5], a.events = sizes[6];
  a.key_bias = sizes[7] ? &a : nullptr;
  const attnrec::cuda::AttentionPlan p = attnrec::cuda::plan_target_attention(a);
  const int64_t fields[] = {p.warps, p.row_blocks, p.pack, p.candidates, p.tiles, p.head_tiles, p.chunks,
                            p.apart, p.shared_bytes, p.part_floats};
  for (int i = 0; i < 10; i++) out[i] = fields[i];
  return 0;
}
"""
FIELDS = (
    "warps",
    "row_blocks",
    "pack",
    "candidates",
    "tiles",
    "head_tiles",
    "chunks",
    "apart",
    "shared_bytes",
)
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def plan():
    from ptxemu import CudaLibrary, project

    project.libraries()  # which has the function
    library = CudaLibrary(PLAN, [f"-I{project.CSRC}"])

    def call(dtype, dim, heads, kv_heads, users, rows, events, bias=False):
        sizes = (ctypes.c_int64 * 8)(ELEMENTS[dtype], dim, heads, kv_heads, users, rows, events, bias)
        out = (ctypes.c_int64 * 10)()
        assert library.lib.plan(sizes, out) == 0
        return dict(zip((*FIELDS, "part_floats"), out, strict=True))

    return call


class TestPlan:
    @given(
        st.sampled_from(list(ELEMENTS)),
        st.integers(1, 256),
        st.integers(1, 40),
        st.integers(1, 4),
        st.integers(0, 10**6),
        st.integers(0, 10**9),
        st.integers(0, 10**9),
        st.booleans(),
    )
    def test_fits_the_chip_and_covers_the_batch(
        self, plan, dtype, dim, group, kv_heads, users, rows, events, bias
    ):
        heads = group * kv_heads
        p = plan(dtype, dim, heads, kv_heads, users, rows, events, bias)
        assert p["warps"] in (1, 2, 4)
        assert p["shared_bytes"] <= 163 * 1024  # an A100's block
        assert p["pack"] * p["head_tiles"] == heads
        assert group % p["pack"] == 0  # a tile's heads share a kv head
        assert p["pack"] == 1 or not bias
        assert p["candidates"] * p["pack"] <= 16 * p["row_blocks"] * p["warps"]
        assert p["tiles"] >= -(-rows // p["candidates"]) + users
        assert p["chunks"] * 1024 >= events
        assert bool(p["part_floats"]) == bool(p["apart"] and rows)

    def test_few_candidates_leave_no_warp_idle(self, plan):
        bf16 = torch.bfloat16
        assert plan(bf16, 64, 4, 4, users=100, rows=100, events=1000)["warps"] == 1
        assert plan(bf16, 64, 4, 4, users=100, rows=100 * 100, events=1000)["warps"] == 4
        assert plan(bf16, 64, 8, 2, users=100, rows=100, events=1000)["pack"] == 4

    def test_a_long_history_is_cut_where_rows_do_not_fill_a_chip(self, plan):
        one = plan(torch.bfloat16, 64, 2, 2, users=1, rows=20, events=10_000)
        assert one["apart"]
        assert one["chunks"] == 10
        many = plan(torch.bfloat16, 64, 2, 2, users=1000, rows=200_000, events=10_000_000)
        assert not many["apart"]
        assert many["part_floats"] == 0


@pytest.mark.parametrize("dim", [24, 64, 256])
def test_tf32_only_where_it_is_allowed(dim):
    batch = make_jagged([20, 3], [70, 9], heads=1, dim=dim, dtype=torch.float32, options=[])
    exact = attnrec.target_attention(*batch.args)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = attnrec.target_attention(*batch.args)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_matches_reference("target_attention", *batch.args)
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 1e-6 < error < 2e-3  # operands have 11 bits
    assert torch.equal(attnrec.target_attention(*batch.args), exact)


@pytest.mark.parametrize("dtype", list(ELEMENTS))
def test_chunks_in_one_block_or_apart_give_the_same_bits(dtype, monkeypatch):
    """A user alone has its history cut; in a batch that fills the chip one block runs all of it."""
    torch.manual_seed(1)
    alone = make_jagged([2], [1100], heads=1, dim=16, dtype=dtype, options=[])
    others, events = 1100, 1  # as many users, so that there are enough blocks
    batch = make_jagged(
        [2] + [1] * others, [1100] + [events] * others, heads=1, dim=16, dtype=dtype, options=[]
    )
    query, key, value = (x.clone() for x in batch.args[:3])
    query[:2], key[:1100], value[:1100] = alone.args[:3]
    out = attnrec.target_attention(query, key, value, *batch.args[3:])
    assert torch.equal(out[:2], attnrec.target_attention(*alone.args))
