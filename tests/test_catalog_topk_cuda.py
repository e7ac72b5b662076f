"""`catalog_topk`: what only the CUDA C++ kernels have. On the runner cuda-emulator."""

import pytest
import torch
from helpers import DTYPES, make_offsets
from runners import RUNNER
from test_catalog_topk import check_exactly, integers, options_for

import attnrec

pytestmark = pytest.mark.skipif(
    RUNNER.backend != "cuda", reason="of the CUDA C++ kernels: ATTNREC_TEST_RUNNER=cuda-emulator"
)
SAMPLED = 1500  # items that are enough for a sample


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_floor_from_a_sample(dtype):
    """With the best items excluded or hidden, which may then not count in the sample either."""
    items = SAMPLED
    users, catalog = integers(3, 8, dtype=dtype), integers(items, 8, dtype=dtype, seed=1)
    catalog[::4] *= 2  # as many as the k best of the sample: all that a floor could come from
    best = (users.double() @ catalog.double().T).topk(300).indices
    exclude = (torch.cat([best[0], best[2]]), make_offsets([300, 0, 300]))
    check_exactly(users, catalog, 10, exclude=exclude, **options_for(["bias"], 3, items))


@pytest.mark.parametrize("order", ["rising", "falling", "all equal"])
def test_orders_where_a_sample_says_little(order):
    """All of the best in one part of the catalogue, whose list overflows."""
    items = SAMPLED
    rising = torch.arange(float(items))
    values = {"rising": rising, "falling": rising.flip(0), "all equal": torch.ones(items)}[order]
    check_exactly(torch.tensor([[1.0], [0.0], [-1.0]]) / items, values.unsqueeze(1), 20)


def test_many_exclusions():
    """More ids than a block sorts in shared memory, in an order of their own, with repeats."""
    items = 1200
    users, catalog = integers(2, 8), integers(items, 8, seed=1)
    ids = torch.randint(0, items, (5000,), generator=torch.Generator().manual_seed(0))
    ids = ids[ids % 9 != 4]
    check_exactly(users, catalog, 200, exclude=(ids, make_offsets([0, len(ids)])))


def test_a_merge_in_global_memory():
    """More keys than shared memory has room for."""
    users, catalog = integers(1, 4), integers(7400, 4, seed=1)
    check_exactly(users, catalog, 7300)


def test_products_are_never_rounded():
    """torch.set_float32_matmul_precision may allow tf32, which would give other best items."""
    users, catalog = torch.randn(5, 64), torch.randn(500, 64)
    exact = attnrec.catalog_topk(users, catalog, 20)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        allowed = attnrec.catalog_topk(users, catalog, 20)
    finally:
        torch.set_float32_matmul_precision(before)
    for x, y in zip(exact, allowed, strict=True):
        assert torch.equal(x, y)


def test_lse_of_large_scores_and_any_temperature():
    """The weight of the best is 1, though 2^30 and more scaled by log2(e) has no such last place."""
    users = torch.tensor([[3e9], [-7e12]])
    catalog = torch.tensor([[1.0], [-2.0], [3.0], [3.0]])
    scores, ids, lse = attnrec.catalog_topk(users, catalog, 4, temperature=0.3)
    assert ids[0].tolist() == [2, 3, 0, 1]
    assert torch.equal(lse, scores[:, 0])
