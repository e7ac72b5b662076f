"""The training loss over a whole catalogue, over sampled negatives and in the batch, forward and backward.

A contender whose name begins with `+` is attnrec's own call with an option: its ratio is the option's cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import attnrec
from attnrec import reference
from benches.case import DTYPES, Case, Contender, Counts, Refused, Verdict, compare
from benches.peers import jax, need, need_device

OP = "catalog_cross_entropy"
OURS, OURS_GRADIENT, PEERS = 2.0, 3.0, 10.0
IGNORED = -100
INF = float("inf")

Loss = Callable[..., Tensor]  # loss(users, table), of an option with a gradient also of that
Options = dict[str, Any]


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
    """The mean loss, and the gradients of users and table.

    `negatives`: how many ids are drawn for each row's softmax; or "in-batch"; or None, the whole table.
    """

    def __init__(
        self,
        rows: int,
        items: int,
        dim: int,
        dtype: str,
        device: torch.device,
        negatives: int | Literal["in-batch"] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        # Logits of standard deviation 1.
        self.users, self.table, self.device = normal(rows, dim) * dim**-0.5, normal(items, dim), device
        self.target = torch.randint(items, (rows,), generator=generator).to(device)
        self.in_batch = negatives == "in-batch"
        self.negatives: Tensor | None = self.target if self.in_batch else None
        if isinstance(negatives, int):
            self.negatives = torch.randint(items, (negatives,), generator=generator).to(device)

    def counts(self) -> Counts:
        (rows, dim), items, size = self.users.shape, self.table.shape[0], self.users.element_size()
        if self.negatives is None:
            return count(rows, items, dim=dim, size=size)
        # In the batch the row's own target is one of them.
        own = 0 if self.in_batch else rows
        of_rows = count(rows, len(self.negatives) + bool(own), dim=dim, size=size)
        named = len(self.negatives) + own
        return replace(of_rows, bytes=float(size * dim * (3 * rows + 2 * named + items)))

    def contender(self, loss: Loss, note: str = "", with_gradient: Sequence[Tensor] = ()) -> Contender:
        leaves = [x.detach().requires_grad_() for x in (self.users, self.table, *with_gradient)]

        def forward_and_backward() -> tuple[Tensor, ...]:
            value = loss(*leaves)
            return (value.detach(), *torch.autograd.grad(value, leaves))

        return Contender(forward_and_backward, note=note)

    def ours(self) -> Contender:
        negatives = "in-batch" if self.in_batch else self.negatives
        return self.contender(
            lambda users, table: attnrec.catalog_cross_entropy(users, table, self.target, negatives=negatives)
        )

    def backend(self) -> str:
        return attnrec.explain(attnrec.catalog_cross_entropy, self.users, self.table, self.target).backend

    def reference(self, dtype: torch.dtype, target: Tensor, **options: Any) -> list[Tensor]:
        """Loss and gradients by plain PyTorch in `dtype`, with the op's options; the bias's comes last."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.users, self.table)]
        if "bias" in options:
            options["bias"] = options["bias"].detach().to(torch.promote_types(dtype, torch.float32))
            leaves.append(options["bias"].requires_grad_())
        if self.negatives is not None:
            options |= {"negatives": self.negatives, "in_batch": self.in_batch}
        losses, _ = reference.catalog_cross_entropy(leaves[0], leaves[1], target, **options)
        value = losses.sum() / (target != IGNORED).sum()
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    @cached_property
    def expected(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """By plain PyTorch, and in float64."""
        return [self.reference(self.users.dtype, self.target)], self.reference(torch.float64, self.target)

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factors = [OURS, OURS_GRADIENT, OURS_GRADIENT] if ours else [PEERS] * 3
        return compare(results, *self.expected, factors=factors, names=["loss", "grad_users", "grad_table"])


# --- peers --------------------------------------------------------------------------------------------------


def _matmul_loss(users: Tensor, table: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((users @ table.T).float(), target)


def _sampled_loss(users: Tensor, table: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    """The target's logit beside those of the negatives, accidental hits masked."""
    others = (users @ table[negatives].T).float().masked_fill(negatives == target[:, None], -INF)
    aim = (users * table[target]).float().sum(1, keepdim=True)
    return F.cross_entropy(torch.cat([aim, others], 1), torch.zeros_like(target))


def _in_batch_loss(users: Tensor, table: Tensor, target: Tensor) -> Tensor:
    """Every row's target is a negative of the others, but where it is their own too."""
    logits = (users @ table[target].T).float()
    hits = (target[:, None] == target).fill_diagonal_(False)
    return F.cross_entropy(logits.masked_fill(hits, -INF), torch.arange(len(target), device=target.device))


def _plain_loss(problem: LossProblem) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The function, and its arguments after users and table."""
    if problem.in_batch:
        return _in_batch_loss, (problem.target,)
    if problem.negatives is not None:
        return _sampled_loss, (problem.target, problem.negatives)
    return _matmul_loss, (problem.target,)


def matmul(problem: LossProblem) -> Contender:
    """`F.cross_entropy` over `mm`, in fp32 after the product."""
    function, rest = _plain_loss(problem)
    return problem.contender(lambda users, table: function(users, table, *rest))


def compiled(problem: LossProblem) -> Contender:
    """The same by `torch.compile`."""
    torch._dynamo.reset()
    function, rest = _plain_loss(problem)
    function = torch.compile(function, dynamic=False)
    return problem.contender(lambda users, table: function(users, table, *rest))


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


# --- what options cost --------------------------------------------------------------------------------------


def with_option(make: Callable[[LossProblem], Options], problem: LossProblem) -> Contender:
    """Our call with more arguments, held against the reference with the same."""
    options = {"target": problem.target} | make(problem)
    bias = [options["bias"]] if "bias" in options else []

    def loss(users: Tensor, table: Tensor, *bias: Tensor) -> Tensor:
        given = options | ({"bias": bias[0]} if bias else {})
        return attnrec.catalog_cross_entropy(users, table, **given)

    def check(results: Sequence[Tensor]) -> Verdict:
        plain, exact = (problem.reference(dtype, **options) for dtype in (problem.users.dtype, torch.float64))
        factors = [OURS] + [OURS_GRADIENT] * (len(results) - 1)
        names = ["loss", "grad_users", "grad_table", "grad_bias"][: len(results)]
        return compare(results, [plain], exact, factors=factors, names=names)

    return replace(problem.contender(loss, with_gradient=bias), check=check)


def _per_item(problem: LossProblem) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(problem.table.shape[0], generator=generator).to(problem.device)


def _some_ignored(problem: LossProblem) -> Options:
    """One row in fifty."""
    rows = torch.arange(len(problem.target), device=problem.device)
    return {"target": problem.target.masked_fill(rows % 50 == 0, IGNORED)}


OPTIONS: dict[str, Callable[[LossProblem], Options]] = {
    "+bias": lambda problem: {"bias": _per_item(problem)},
    "+logq": lambda problem: {"logq": _per_item(problem)},
    "+temperature": lambda _: {"temperature": 0.7},
    "+label_smoothing": lambda _: {"label_smoothing": 0.1},
    "+ignore_index": _some_ignored,
}

# --- cases --------------------------------------------------------------------------------------------------

EAGER = {"mm-cross-entropy": matmul, "linear-cross-entropy": linear, "jax": jax.cross_entropy}
PEERS_OF_ALL = EAGER | {"compiled-mm": compiled, "liger": liger, "cut-cross-entropy": cut}
PEERS_OF_SOME = {"mm-cross-entropy": matmul, "compiled-mm": compiled}  # of the items: no other has them


def _case(suite: str, rows: int, items: int, dim: int, dtype: str) -> Case:
    def make(device: torch.device) -> LossProblem:
        return LossProblem(rows, items, dim, dtype, device)

    peers = {name: p for name, p in EAGER.items() if name != "jax"} if suite == "smoke" else PEERS_OF_ALL
    sizes = {"T": rows, "N": items, "D": dim}
    return Case(OP, f"catalog/{rows},{items},{dim}/{dtype}", suite, dtype, sizes, make, peers)


def _options_case(suite: str, rows: int, items: int, dim: int, dtype: str) -> Case:
    variants = {name: partial(with_option, make) for name, make in OPTIONS.items()}
    case = _case(suite, rows, items, dim, dtype)
    return replace(case, name=case.name.replace("catalog/", "options/"), peers=variants)


def _sampled_case(suite: str, rows: int, items: int, negatives: int | None, dim: int, dtype: str) -> Case:
    """Negatives drawn from the table, or with None those of the batch."""

    def make(device: torch.device) -> LossProblem:
        return LossProblem(rows, items, dim, dtype, device, "in-batch" if negatives is None else negatives)

    sizes = {"T": rows, "N": items, "M": rows if negatives is None else negatives, "D": dim}
    family = "in-batch" if negatives is None else "negatives"
    numbers = [rows, items, dim] if negatives is None else [rows, items, negatives, dim]
    name = f"{family}/{','.join(map(str, numbers))}/{dtype}"
    peers = {"mm-cross-entropy": matmul} if suite == "smoke" else PEERS_OF_SOME
    return Case(OP, name, suite, dtype, sizes, make, peers)


CASES = [
    _case("smoke", 12, 3000, 32, "fp32"),
    _options_case("smoke", 60, 500, 32, "fp32"),
    _sampled_case("smoke", 60, 500, 100, 32, "fp32"),
    _sampled_case("smoke", 60, 500, None, 32, "fp32"),
    *(_case("standard", 1024, 10_000, 64, dtype) for dtype in ("fp32", "bf16")),
    *(_case("standard", 1024, 100_000, 64, dtype) for dtype in ("fp32", "bf16")),
    *(_options_case("standard", 1024, 100_000, 64, dtype) for dtype in ("fp32", "bf16")),
    *(_sampled_case("standard", 1024, 100_000, 8192, 64, dtype) for dtype in ("fp32", "bf16")),
    *(_sampled_case("standard", 4096, 100_000, None, 64, dtype) for dtype in ("fp32", "bf16")),
    _case("full", 4096, 100_000, 64, "fp32"),
    _case("full", 256, 1_000_000, 64, "fp32"),
]
