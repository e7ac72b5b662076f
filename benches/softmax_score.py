"""The probabilities of each user's candidates, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

import attnrec
from attnrec import reference
from benches.case import DTYPES, Case, Contender, Counts, Verdict, compare
from benches.lengths import log_normal, offsets

OP = "softmax_score"
OURS, OURS_GRADIENT, PEERS = 2.0, 3.0, 10.0

Score = Callable[[Tensor, Tensor], Tensor]


def count(users: int, items: int, *, dim: int, size: int, train: bool) -> Counts:
    """A product; the backward has two more, and reads and writes what has a gradient."""
    numbers = (users + items) * dim + items
    return Counts(
        flops=2.0 * items * dim * (3 if train else 1),
        bytes=float(size * numbers * (3 if train else 1)),
        exps=float(items),
    )


class ScoreProblem:
    """`probabilities [T_c]`, or those and the gradients of users and items."""

    def __init__(
        self, candidates: list[int], dim: int, dtype: str, device: torch.device, train: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        self.candidates, self.train, self.device = candidates, train, device
        # Logits of standard deviation 1.
        self.users, self.items = normal(len(candidates), dim) * dim**-0.5, normal(sum(candidates), dim)
        self.offsets = offsets(candidates).to(device)
        self.grad = normal(sum(candidates))

    def counts(self) -> Counts:
        size, dim = self.users.element_size(), self.users.shape[1]
        return count(len(self.candidates), sum(self.candidates), dim=dim, size=size, train=self.train)

    def contender(self, score: Score, note: str = "") -> Contender:
        """`score(users, items)`, with its gradients where they are wanted."""
        if not self.train:

            def forward() -> Tensor:
                with torch.inference_mode():
                    return score(self.users, self.items)

            return Contender(forward, note=note)
        leaves = [x.detach().requires_grad_() for x in (self.users, self.items)]

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = score(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, self.grad))

        return Contender(forward_and_backward, note=note)

    def ours(self) -> Contender:
        return self.contender(lambda users, items: attnrec.softmax_score(users, items, self.offsets))

    def backend(self) -> str:
        return attnrec.explain(attnrec.softmax_score, self.users, self.items, self.offsets).backend

    @cached_property
    def expected(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        def results(dtype: torch.dtype) -> list[Tensor]:
            users, items = (x.detach().to(dtype).requires_grad_(self.train) for x in (self.users, self.items))
            out = reference.softmax_score(users, items, self.offsets)
            if not self.train:
                return [out]
            return [out.detach(), *torch.autograd.grad(out, (users, items), self.grad.to(dtype))]

        return [results(self.users.dtype)], results(torch.float64)

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factors = [OURS, OURS_GRADIENT, OURS_GRADIENT] if ours else [PEERS] * 3
        names = ["probabilities", "grad_users", "grad_items"]
        n = 3 if self.train else 1
        return compare(results, *self.expected, factors=factors[:n], names=names[:n])


# --- peers --------------------------------------------------------------------------------------------------


def loop(problem: ScoreProblem) -> Contender:
    """User by user."""

    def score(users: Tensor, items: Tensor) -> Tensor:
        parts = zip(users, items.split(problem.candidates), strict=True)
        return torch.cat([(own @ user).softmax(0) for user, own in parts])

    return problem.contender(score)


def padded(problem: ScoreProblem) -> Contender:
    """The items padded to the longest list, `bmm`, masked softmax; padding and its inverse are timed.

    Padded by an index: the gradient of `pad_sequence` copies the whole once for each list.
    """
    most, counts = max(problem.candidates), torch.tensor(problem.candidates, device=problem.device)
    keep = torch.arange(most, device=problem.device) < counts[:, None]
    places = keep.flatten().nonzero().squeeze(-1)

    def score(users: Tensor, items: Tensor) -> Tensor:
        lists = (
            items.new_zeros(keep.numel(), items.shape[1]).index_copy(0, places, items).view(*keep.shape, -1)
        )
        logits = torch.bmm(lists, users.unsqueeze(-1)).squeeze(-1)
        return logits.masked_fill(~keep, -torch.inf).softmax(-1)[keep]

    return problem.contender(score)


def scatter_score(problem: ScoreProblem) -> Score:
    """Jagged softmax of scatter operations, as segment softmax is usually written."""
    users_count = len(problem.candidates)
    user_of = torch.repeat_interleave(torch.arange(users_count), torch.tensor(problem.candidates)).to(
        problem.device
    )

    def score(users: Tensor, items: Tensor) -> Tensor:
        logits = (users[user_of] * items).sum(-1)
        largest = logits.new_full((users_count,), -torch.inf)
        largest = largest.scatter_reduce(0, user_of, logits.detach(), "amax")
        exps = (logits - largest[user_of]).exp()
        sums = exps.new_zeros(users_count).index_add(0, user_of, exps)
        return exps / sums[user_of]

    return score


def scatter(problem: ScoreProblem) -> Contender:
    return problem.contender(scatter_score(problem))


def compiled(problem: ScoreProblem) -> Contender:
    """By `torch.compile`: the scatter form, or of one user, where that does not compile, the dense one."""
    torch._dynamo.reset()

    def one_user(users: Tensor, items: Tensor) -> Tensor:
        return (items @ users[0]).softmax(0)

    score = one_user if len(problem.candidates) == 1 else scatter_score(problem)
    return problem.contender(torch.compile(score, dynamic=False))


# --- cases --------------------------------------------------------------------------------------------------

EAGER = {"loop": loop, "padded-bmm": padded, "scatter": scatter}


def _case(family: str, suite: str, candidates: list[int], dim: int, dtype: str, train: bool = False) -> Case:
    def make(device: torch.device) -> ScoreProblem:
        return ScoreProblem(candidates, dim, dtype, device, train)

    sizes = {"B": len(candidates), "C": max(candidates), "T_c": sum(candidates), "D": dim}
    shape = f"{len(candidates)},{max(candidates)},{dim}"
    peers = EAGER if suite == "smoke" else EAGER | {"compiled": compiled}
    return Case(OP, f"{family}/{shape}/{dtype}", suite, dtype, sizes, make, peers)


_LISTS = log_normal(256, 100, 1.0, 2000)
CASES = [
    _case("small", "smoke", [5, 1, 12], 16, "fp32", train=True),
    *(_case("log-normal", "standard", _LISTS, 64, dtype) for dtype in ("fp32", "bf16")),
    _case("log-normal-train", "standard", _LISTS, 64, "fp32", train=True),
    _case("request", "standard", [2000], 64, "fp32"),
    _case("dense", "standard", [500] * 64, 64, "fp32"),
]
