"""`catalog_cross_entropy`: what only the CUDA C++ kernels have. On the runner cuda-emulator."""

import pytest
import torch
from helpers import assert_matches_reference
from runners import RUNNER

import attnrec

pytestmark = pytest.mark.skipif(
    RUNNER.backend != "cuda", reason="of the CUDA C++ kernels: ATTNREC_TEST_RUNNER=cuda-emulator"
)


def loss_and_gradients(users, table, target):
    leaves = [x.detach().requires_grad_() for x in (users, table)]
    loss = attnrec.catalog_cross_entropy(*leaves, target, reduction="none")
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("dim", [24, 256])
def test_tf32_only_where_it_is_allowed(dim):
    torch.manual_seed(0)
    users, table = torch.randn(20, dim), torch.randn(70, dim) / dim**0.5
    target = torch.randint(0, 70, (20,))
    exact = loss_and_gradients(users, table, target)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = loss_and_gradients(users, table, target)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_matches_reference("catalog_cross_entropy", users, table, target, differentiate=(0,))
    for x, y in zip(rounded, exact, strict=True):
        error = (x - y).abs().max() / y.abs().max()
        assert 1e-6 < error < 2e-3  # operands have 11 bits
    for x, y in zip(loss_and_gradients(users, table, target), exact, strict=True):
        assert torch.equal(x, y)


def test_longer_vectors_are_declined_in_words():
    users, table = torch.randn(2, 257), torch.randn(3, 257)
    said = attnrec.explain(attnrec.catalog_cross_entropy, users, table, torch.tensor([0, 1]))
    assert "up to 256 elements, not 257" in said.reasons["cuda"]
