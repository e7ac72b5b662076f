"""`target_attention_weights`: what only the CUDA C++ kernels have. On the runner cuda-emulator."""

import pytest
import torch
from helpers import DTYPES, assert_matches_reference, make_jagged
from runners import RUNNER

import attnrec

pytestmark = pytest.mark.skipif(
    RUNNER.backend != "cuda", reason="of the CUDA C++ kernels: ATTNREC_TEST_RUNNER=cuda-emulator"
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [None, 40])
def test_chunks_in_one_block_or_apart_give_the_same_bits(dtype, top):
    """A user alone has its history cut; in a batch that fills the chip one block runs all of it."""
    torch.manual_seed(1)
    alone = make_jagged([2], [1100], heads=1, dim=16, dtype=dtype, options=["self", "visible"])
    others = 1100  # users, so that there are enough blocks
    batch = make_jagged([2] + [1] * others, [1100] + [1] * others, heads=1, dim=16, dtype=dtype, options=[])
    query, key = batch.query.clone(), batch.key.clone()
    query[:2], key[:1100] = alone.query, alone.key
    self_key, visible = query.clone(), torch.ones(len(query), dtype=torch.int64)
    self_key[:2], visible[:2] = alone.self_key[:, :1], torch.tensor([1100, 1030])
    alone = alone.with_(self_key=self_key[:2], visible=visible[:2])
    some = batch.with_(query=query, key=key, self_key=self_key, visible=visible)
    mine = attnrec.target_attention_weights(*alone.weights_args, **alone.weights_options, top=top)
    among = attnrec.target_attention_weights(*some.weights_args, **some.weights_options, top=top)
    assert torch.equal(among[0][: len(mine[0])], mine[0])
    if top is None:
        assert_matches_reference("target_attention_weights", *alone.weights_args, **alone.weights_options)
    else:
        assert torch.equal(among[1][:2], mine[1])


def test_tf32_only_where_it_is_allowed():
    batch = make_jagged([20, 3], [70, 9], heads=1, dim=64, dtype=torch.float32, options=[])
    exact, _ = attnrec.target_attention_weights(*batch.weights_args)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded, _ = attnrec.target_attention_weights(*batch.weights_args)
    finally:
        torch.set_float32_matmul_precision(before)
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 1e-6 < error < 5e-3  # operands have 11 bits
    assert torch.equal(attnrec.target_attention_weights(*batch.weights_args)[0], exact)
