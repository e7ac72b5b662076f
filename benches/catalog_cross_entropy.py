"""The training loss over a whole catalogue, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

import attnrec
from benches.case import DTYPES, Case, Contender, Counts, Refused, Verdict, compare
from benches.peers import jax, need, need_device

OP = "catalog_cross_entropy"
OURS, OURS_GRADIENT, PEERS = 2.0, 3.0, 10.0

Loss = Callable[[Tensor, Tensor], Tensor]


def count(rows: int, items: int, *, dim: int, size: int) -> Counts:
    """Four products: logits, logits again in the backward, two gradients.

    Users and table are read in both passes, and their gradients written.
    """
    return Counts(
        flops=8.0 * rows * items * dim,
        bytes=float(size * dim * 3 * (rows + items)),
        exps=2.0 * rows * items,
    )


class LossProblem:
    """The mean loss, and the gradients of users and table."""

    def __init__(self, rows: int, items: int, dim: int, dtype: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        # Logits of standard deviation 1.
        self.users, self.table, self.device = normal(rows, dim) * dim**-0.5, normal(items, dim), device
        self.target = torch.randint(items, (rows,), generator=generator).to(device)

    def counts(self) -> Counts:
        (rows, dim), items = self.users.shape, self.table.shape[0]
        return count(rows, items, dim=dim, size=self.users.element_size())

    def contender(self, loss: Loss, note: str = "") -> Contender:
        leaves = [x.detach().requires_grad_() for x in (self.users, self.table)]

        def forward_and_backward() -> tuple[Tensor, ...]:
            value = loss(*leaves)
            return (value.detach(), *torch.autograd.grad(value, leaves))

        return Contender(forward_and_backward, note=note)

    def ours(self) -> Contender:
        return self.contender(lambda users, table: attnrec.catalog_cross_entropy(users, table, self.target))

    def backend(self) -> str:
        return attnrec.explain(attnrec.catalog_cross_entropy, self.users, self.table, self.target).backend

    @cached_property
    def expected(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """By plain PyTorch (as the peer `mm-cross-entropy`), and in float64."""

        def results(dtype: torch.dtype) -> list[Tensor]:
            users, table = (x.detach().to(dtype).requires_grad_() for x in (self.users, self.table))
            logits = users @ table.T
            value = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), self.target)
            return [value.detach(), *torch.autograd.grad(value, (users, table))]

        return [results(self.users.dtype)], results(torch.float64)

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factors = [OURS, OURS_GRADIENT, OURS_GRADIENT] if ours else [PEERS] * 3
        return compare(results, *self.expected, factors=factors, names=["loss", "grad_users", "grad_table"])


# --- peers --------------------------------------------------------------------------------------------------


def _matmul_loss(users: Tensor, table: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((users @ table.T).float(), target)


def matmul(problem: LossProblem) -> Contender:
    """`F.cross_entropy` over `mm`, in fp32 after the product."""
    return problem.contender(lambda users, table: _matmul_loss(users, table, problem.target))


def compiled(problem: LossProblem) -> Contender:
    """The same by `torch.compile`."""
    torch._dynamo.reset()
    function = torch.compile(_matmul_loss, dynamic=False)
    return problem.contender(lambda users, table: function(users, table, problem.target))


def linear(problem: LossProblem) -> Contender:
    """`F.linear_cross_entropy`, torch 2.13 and later."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Refused(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return problem.contender(lambda users, table: function(users, table, problem.target))


def liger(problem: LossProblem) -> Contender:
    need_device(problem.device, "cuda")
    function = need("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return problem.contender(lambda users, table: function(table, users, problem.target))


def cut(problem: LossProblem) -> Contender:
    """Apple's cut cross-entropy; its default drops small terms from the gradient, so that filter is off."""
    need_device(problem.device, "cuda")
    function = need("cut_cross_entropy").linear_cross_entropy
    return problem.contender(lambda users, table: function(users, table, problem.target, filter_eps=None))


# --- cases --------------------------------------------------------------------------------------------------

EAGER = {"mm-cross-entropy": matmul, "linear-cross-entropy": linear, "jax": jax.cross_entropy}
PEERS_OF_ALL = EAGER | {"compiled-mm": compiled, "liger": liger, "cut-cross-entropy": cut}


def _case(suite: str, rows: int, items: int, dim: int, dtype: str) -> Case:
    def make(device: torch.device) -> LossProblem:
        return LossProblem(rows, items, dim, dtype, device)

    peers = {name: p for name, p in EAGER.items() if name != "jax"} if suite == "smoke" else PEERS_OF_ALL
    sizes = {"T": rows, "N": items, "D": dim}
    return Case(OP, f"catalog/{rows},{items},{dim}/{dtype}", suite, dtype, sizes, make, peers)


CASES = [
    _case("smoke", 12, 3000, 32, "fp32"),
    *(_case("standard", 1024, 10_000, 64, dtype) for dtype in ("fp32", "bf16")),
    *(_case("standard", 1024, 100_000, 64, dtype) for dtype in ("fp32", "bf16")),
    _case("full", 4096, 100_000, 64, "fp32"),
    _case("full", 256, 1_000_000, 64, "fp32"),
]
