"""The k best items of a whole catalogue, exact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

import attnrec
from attnrec import reference
from benches.case import DTYPES, Case, Contender, Counts, Verdict
from benches.peers import brute_force, onnxruntime, openvino

OP = "catalog_topk"
CHECKED = 4  # users: the reference sorts the catalogue for each


def count(users: int, items: int, *, dim: int, size: int, k: int) -> Counts:
    """A product and an exponential of each logit, the catalogue read once; scores in fp32, ids int64, lse."""
    return Counts(
        flops=2.0 * users * items * dim,
        bytes=float((users + items) * dim * size + users * (12 * k + 4)),
        exps=float(users * items),
    )


class TopkProblem:
    """`scores [B, k]` and `ids [B, k]`; ours also the log-sum-exp `[B]`, which the peers do not compute."""

    def __init__(self, users: int, items: int, dim: int, k: int, dtype: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        self.users, self.catalog, self.k, self.device = normal(users, dim), normal(items, dim), k, device

    def counts(self) -> Counts:
        (users, dim), items = self.users.shape, self.catalog.shape[0]
        return count(users, items, dim=dim, size=self.users.element_size(), k=self.k)

    def ours(self) -> Contender:
        def call() -> tuple[Tensor, Tensor, Tensor]:
            with torch.inference_mode():
                return attnrec.catalog_topk(self.users, self.catalog, self.k)

        return Contender(call)

    def backend(self) -> str:
        return attnrec.explain(attnrec.catalog_topk, self.users, self.catalog, self.k).backend

    @cached_property
    def checked(self) -> Tensor:
        """Users, from first to last."""
        return torch.linspace(0, len(self.users) - 1, min(CHECKED, len(self.users))).long().to(self.device)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The exact answer for the checked users."""
        return reference.catalog_topk(self.users[self.checked].double(), self.catalog.double(), self.k)

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        """Exact scores of the returned ids against the exact best, and the returned scores against both.

        Rounding may exchange two items of nearly one score, so that not the ids are compared, but what they
        score. Allowed: the rounding of a sum of D products in the dtype in which the logits are given.
        """
        best, _, lse = self.expected
        scores, ids = (x[self.checked] for x in results[:2])
        if ids.shape != best.shape or ids.min() < 0 or ids.max() >= len(self.catalog):
            return Verdict(float("nan"), 0.0, "ids")
        if (ids.sort(-1).values.diff(dim=-1) == 0).any():
            return Verdict(float("nan"), 0.0, "an item twice")
        users = self.users[self.checked].double()
        named = (self.catalog[ids].double() @ users.unsqueeze(-1)).squeeze(-1)
        norms = users.norm(dim=-1).max() * self.catalog[ids].double().norm(dim=-1).max()
        # Sums in fp32, and what gives its logits in a shorter dtype rounds them once more.
        rounding = max(
            torch.finfo(torch.float32).eps * self.users.shape[1] ** 0.5, torch.finfo(scores.dtype).eps
        )
        allowed = float(norms) * rounding
        found = {
            "the best scores": (named.sort(-1, descending=True).values - best).abs().max().item(),
            "scores of the ids": (scores.double() - named).abs().max().item(),
        }
        if ours:
            found["lse"] = (results[2][self.checked].double() - lse).abs().max().item()
        what = max(found, key=lambda name: found[name])
        return Verdict(found[what], allowed, what)


# --- peers --------------------------------------------------------------------------------------------------


def matmul(problem: TopkProblem) -> Contender:
    """`mm` and `topk`."""

    def call() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return tuple((problem.users @ problem.catalog.T).topk(problem.k))

    return Contender(call)


# --- cases --------------------------------------------------------------------------------------------------

PEERS = {
    "mm-topk": matmul,
    "openvino": openvino.topk,
    "onnxruntime": onnxruntime.topk,
    "scann": brute_force.scann,
    "faiss-flat": brute_force.faiss_flat,
    "faiss-flat-blas": brute_force.faiss_flat_blas,
}


def _case(suite: str, users: int, items: int, dim: int, k: int, dtype: str) -> Case:
    def make(device: torch.device) -> TopkProblem:
        return TopkProblem(users, items, dim, k, dtype, device)

    sizes = {"B": users, "N": items, "D": dim, "k": k}
    return Case(OP, f"catalog/{users},{items},{dim},{k}/{dtype}", suite, dtype, sizes, make, PEERS)


CASES = [
    _case("smoke", 3, 5000, 32, 10, "fp32"),
    *(_case("standard", b, 100_000, 64, 100, dtype) for dtype in ("fp32", "bf16") for b in (1, 16, 256)),
    *(_case("standard", b, 1_000_000, 64, 100, dtype) for dtype in ("fp32", "bf16") for b in (1, 16, 256)),
    *(_case("full", b, 1_000_000, 128, 100, "fp32") for b in (1, 16, 256)),
    *(_case("full", b, 10_000_000, 64, 100, dtype) for dtype in ("fp32", "bf16") for b in (1, 16)),
]
