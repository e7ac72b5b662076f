"""`target_attention`, forward: what only the CUDA C++ kernels have. On the runner cuda-emulator."""

import pytest
import torch
from helpers import DTYPES, assert_matches_reference, make_jagged
from runners import RUNNER

import attnrec

pytestmark = pytest.mark.skipif(
    RUNNER.backend != "cuda", reason="of the CUDA C++ kernels: ATTNREC_TEST_RUNNER=cuda-emulator"
)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_in_one_block_or_apart_give_the_same_bits(dtype):
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
