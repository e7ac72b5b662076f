"""The k best items of a whole catalogue, exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

import attnrec
from attnrec import Catalog, reference
from benches.case import DTYPES, Case, Contender, Counts, Peer, Refused, Verdict
from benches.peers import brute_force, onnxruntime, openvino

OP = "catalog_topk"
FILTERED_LSE = 0.1  # what the contract allows the log-sum-exp through a filter
CHECKED = 4  # users: the reference sorts the catalogue for each


def count(users: int, items: int, *, dim: int, size: int, k: int) -> Counts:
    """A product and an exponential of each logit, the catalogue read once; scores in fp32, ids int64, lse."""
    return Counts(
        flops=2.0 * users * items * dim,
        bytes=float((users + items) * dim * size + users * (12 * k + 4)),
        exps=float(users * items),
    )


class TopkProblem:
    """`scores [B, k]` and `ids [B, k]`; ours also the log-sum-exp `[B]`, which the peers do not compute.

    `exclude [B, n]`, `bias [N]` and `filter`, the dtype of a `Catalog` packed beforehand, are for our own
    variants.
    """

    def __init__(
        self,
        users: Tensor,
        catalog: Tensor,
        k: int,
        *,
        exclude: Tensor | None = None,
        bias: Tensor | None = None,
        filter: str = "fp32",
    ) -> None:
        self.users, self.catalog, self.k, self.device = users, catalog, k, users.device
        self.exclude, self.bias, self.filter = exclude, bias, filter

    def counts(self) -> Counts:
        (users, dim), items = self.users.shape, self.catalog.shape[0]
        return count(users, items, dim=dim, size=self.users.element_size(), k=self.k)

    def ours(self) -> Contender:
        exclude = None if self.exclude is None else _jagged(self.exclude)
        catalog = self.catalog if self.filter == "fp32" else Catalog.pack(self.catalog, self.filter)

        def call() -> tuple[Tensor, Tensor, Tensor]:
            with torch.inference_mode():
                return attnrec.catalog_topk(self.users, catalog, self.k, exclude=exclude, bias=self.bias)

        return Contender(call, check=partial(self.check, ours=True))

    def backend(self) -> str:
        return attnrec.explain(attnrec.catalog_topk, self.users, self.catalog, self.k).backend

    @cached_property
    def checked(self) -> Tensor:
        """Users, from first to last."""
        return torch.linspace(0, len(self.users) - 1, min(CHECKED, len(self.users))).long().to(self.device)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The exact answer for the checked users."""
        ids, of = (None, None) if self.exclude is None else _jagged(self.exclude[self.checked])
        return reference.catalog_topk(
            self.users[self.checked].double(),
            self.catalog.double(),
            self.k,
            exclude_ids=ids,
            exclude_offsets=of,
            bias=None if self.bias is None else self.bias.double(),
        )

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
        if self.bias is not None:
            named += self.bias[ids].double()
        if self.exclude is not None and (ids[..., None] == self.exclude[self.checked][:, None]).any():
            return Verdict(float("nan"), 0.0, "an excluded item")
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
            off = (results[2][self.checked].double() - lse).abs().max().item()
            # Through a filter it has a bound of its own.
            found["lse"] = off if self.filter == "fp32" else off * allowed / FILTERED_LSE
        what = max(found, key=lambda name: found[name])
        return Verdict(found[what], allowed, what)


def _jagged(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of `[B, n]`, ids and offsets `[B + 1]`."""
    return ids.flatten(), torch.arange(len(ids) + 1, device=ids.device) * ids.shape[1]


def topk_problem(users: int, items: int, dim: int, k: int, dtype: str, device: torch.device) -> TopkProblem:
    """Standard normal vectors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

    return TopkProblem(normal(users, dim), normal(items, dim), k)


# --- ours with something added, and catalogues made to be hard ----------------------------------------------

Change = Callable[[TopkProblem], TopkProblem]


def _excluding(problem: TopkProblem) -> TopkProblem:
    """For each user 100 items that are not wanted, up to 50 of them the best."""
    seen = torch.randint(
        len(problem.catalog), (len(problem.users), 100), generator=torch.Generator().manual_seed(1)
    )
    seen = seen.to(problem.device)
    best = problem.ours().call()[1][:, :50]
    seen[:, : best.shape[1]] = best
    return TopkProblem(problem.users, problem.catalog, problem.k, exclude=seen)


def _filtered(problem: TopkProblem, filter: str, change: Change = lambda problem: problem) -> TopkProblem:
    """Through a filter in front of the rows, as they are after a change."""
    changed = change(problem)
    return TopkProblem(
        changed.users, changed.catalog, changed.k, exclude=changed.exclude, bias=changed.bias, filter=filter
    )


def _biased(problem: TopkProblem) -> TopkProblem:
    bias = torch.randn(len(problem.catalog), generator=torch.Generator().manual_seed(2))
    return TopkProblem(problem.users, problem.catalog, problem.k, bias=bias.to(problem.device))


def _catalog(problem: TopkProblem, kind: str) -> TopkProblem:
    """`rising`: each item better than all before it, for every user; `falling`: the other way round; `equal`:
    all of one score, so that the lower ids win; `clustered`: norms of four sizes, the largest at the end."""
    items, dim = problem.catalog.shape
    users, catalog = problem.users, problem.catalog
    place = torch.arange(1, items + 1, device=problem.device, dtype=torch.float32)[:, None] / items
    if kind in ("rising", "falling"):
        users, catalog = users.abs(), (place if kind == "rising" else place.flip(0)).expand(items, dim)
    elif kind == "equal":
        catalog = catalog[:1].expand(items, dim)
    else:
        catalog = catalog * (4 * place).ceil()
    return TopkProblem(users, catalog.to(problem.catalog.dtype).contiguous(), problem.k)


VARIANTS: dict[str, Change] = {
    "+exclude": _excluding,
    "+bias": _biased,
    **{
        f"+{kind} catalogue": partial(_catalog, kind=kind)
        for kind in ("rising", "falling", "equal", "clustered")
    },
}
FILTERS: dict[str, Change] = {f"+{kind} filter": partial(_filtered, filter=kind) for kind in ("bf16", "int8")}
# The int8 filter's time is what these are to be held against.
FILTERED: dict[str, Change] = {
    f"+int8 filter {name}": partial(_filtered, filter="int8", change=change)
    for name, change in VARIANTS.items()
}


def variants(of: Mapping[str, Change]) -> dict[str, Peer]:
    return {name: lambda problem, change=change: change(problem).ours() for name, change in of.items()}


# --- peers --------------------------------------------------------------------------------------------------


def matmul(problem: TopkProblem) -> Contender:
    """`mm` and `topk`."""

    def call() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return tuple((problem.users @ problem.catalog.T).topk(problem.k))

    return Contender(call)


def matmul_bf16(problem: TopkProblem) -> Contender:
    """The same over a table that was rounded to bf16 before: half the bytes, and not exact."""
    if problem.users.dtype != torch.float32:
        raise Refused("the table is not float32")
    catalog = problem.catalog.bfloat16()

    def call() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return tuple((problem.users.bfloat16() @ catalog.T).topk(problem.k))

    return Contender(call, note="rounds the table and the scores to bf16")


# --- cases --------------------------------------------------------------------------------------------------

PEERS = {
    "mm-topk": matmul,
    "mm-topk-bf16": matmul_bf16,
    "openvino": openvino.topk,
    "onnxruntime": onnxruntime.topk,
    "scann": brute_force.scann,
    "faiss-flat": brute_force.faiss_flat,
    "faiss-flat-blas": brute_force.faiss_flat_blas,
}


def _case(
    suite: str,
    users: int,
    items: int,
    dim: int,
    k: int,
    dtype: str,
    *,
    family: str = "catalog",
    peers: Mapping[str, Peer] = PEERS,
) -> Case:
    make = partial(topk_problem, users, items, dim, k, dtype)
    sizes = {"B": users, "N": items, "D": dim, "k": k}
    return Case(OP, f"{family}/{users},{items},{dim},{k}/{dtype}", suite, dtype, sizes, make, peers)


WITH_FILTERS = PEERS | variants(FILTERS)
HARD = variants(FILTERS | VARIANTS | FILTERED)


CASES = [
    _case("smoke", 3, 5000, 32, 10, "fp32", peers=PEERS | HARD),
    *(
        _case("standard", b, 100_000, 64, 100, dtype, peers=WITH_FILTERS)
        for dtype in ("fp32", "bf16")
        for b in (1, 16, 256)
    ),
    *(
        _case("standard", b, 1_000_000, 64, 100, dtype, peers=WITH_FILTERS)
        for dtype in ("fp32", "bf16")
        for b in (1, 16, 256)
    ),
    *(_case("standard", b, 1_000_000, 64, 100, "fp32", family="variants", peers=HARD) for b in (1, 16)),
    *(_case("full", b, 1_000_000, 128, 100, "fp32", peers=WITH_FILTERS) for b in (1, 16, 256)),
    *(
        _case("full", b, 1_000_000, 64, k, "fp32", peers=WITH_FILTERS)
        for b in (1, 16)
        for k in (1, 1000, 4096)
    ),
    *(
        _case("full", b, 10_000_000, 64, 100, dtype, peers=WITH_FILTERS)
        for dtype in ("fp32", "bf16")
        for b in (1, 16)
    ),
]
