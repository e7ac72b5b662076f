"""Which events mattered: all weights, or the heaviest few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

import attnrec
from attnrec import reference
from benches.case import Case, Contender, Counts, Verdict, compare
from benches.jagged import CONTIGUOUS, PADDED, Batch, make_batch, padding_mask
from benches.lengths import log_normal

OP = "target_attention_weights"
OURS, PEERS = 2.0, 10.0
ORDERS = 3  # as target_attention's


def count(pairs: int, rows: int, events: int, *, heads: int, dim: int, size: int, top: int | None) -> Counts:
    """One product; written are all weights, or the heaviest `top` of each row and head with int64 numbers."""
    written = pairs * heads * size if top is None else rows * heads * top * (size + 8)
    return Counts(
        flops=2.0 * pairs * heads * dim,
        bytes=float((rows + events) * heads * dim * size + written),
        exps=float(pairs * heads),
    )


class WeightsProblem:
    """`weights [Σ C·L, H]`; with `top` the weights `[T_c, H, top]` and the events that have them.

    Which events are the heaviest is a matter of rounding where two weigh nearly the same, so what is compared
    is how much the named ones weigh, exactly.
    """

    def __init__(self, batch: Batch, top: int | None) -> None:
        self.batch, self.top = batch, top

    @property
    def device(self) -> torch.device:
        return self.batch.device

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        batch = self.batch
        return batch.query, batch.key, batch.q_offsets, batch.kv_offsets

    def counts(self) -> Counts:
        batch = self.batch
        rows, heads, dim = batch.query.shape
        size = batch.query.element_size()
        return count(batch.pairs, rows, batch.key.shape[0], heads=heads, dim=dim, size=size, top=self.top)

    def ours(self) -> Contender:
        def call() -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                return attnrec.target_attention_weights(*self.arguments, top=self.top)

        return Contender(call, lambda raw: [raw[0]] if self.top is None else list(raw))

    def backend(self) -> str:
        return attnrec.explain(attnrec.target_attention_weights, *self.arguments, top=self.top).backend

    @cached_property
    def expected(self) -> tuple[list[Tensor], Tensor]:
        """All weights by plain PyTorch, in several orders of summation, and exactly."""
        wide = [x.double() if x.is_floating_point() else x for x in self.arguments]
        query, key, *of = self.arguments
        generator = torch.Generator().manual_seed(1)
        orders = [torch.randperm(query.shape[-1], generator=generator) for _ in range(ORDERS)]
        given = [self.arguments, *((query[..., order], key[..., order], *of) for order in orders)]
        *ways, exact = (reference.target_attention_weights(*x)[0] for x in (*given, wide))
        return ways, exact

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factor = OURS if ours else PEERS
        ways, exact = self.expected
        if self.top is None:
            return compare(results, [[x] for x in ways], [exact], factors=[factor], names=["weights"])
        weights, events = results
        named = []
        for of_user, ids in zip(self._by_user(exact), events.split(self.batch.candidates), strict=True):
            if ids.min() < 0 or ids.max() >= of_user.shape[-1]:
                return Verdict(float("nan"), 0.0, "an event that the user has not")
            if (ids.sort(-1).values.diff(dim=-1) == 0).any():
                return Verdict(float("nan"), 0.0, "an event named twice")
            named.append(of_user.gather(-1, ids))
        names = ["weights", "exact weights of the named events"]
        limits = [[self._heaviest(x)] * 2 for x in ways], [self._heaviest(exact)] * 2
        got = [weights, torch.cat(named).to(weights.dtype)]
        return compare(got, *limits, factors=[factor] * 2, names=names)

    def _heaviest(self, weights: Tensor) -> Tensor:
        """`[T_c, H, top]`"""
        return torch.cat([of_user.topk(self.top, dim=-1).values for of_user in self._by_user(weights)])

    def _by_user(self, weights: Tensor) -> list[Tensor]:
        """`[C, H, L]` of each user."""
        counts = list(zip(self.batch.candidates, self.batch.events, strict=True))
        parts = weights.split([c * n for c, n in counts])
        return [part.view(c, n, -1).transpose(1, 2) for part, (c, n) in zip(parts, counts, strict=True)]


# --- peers --------------------------------------------------------------------------------------------------


def _dense_weights(query: Tensor, key: Tensor, keep: Tensor | None) -> Tensor:
    """`[B, H, C, L]`, as a hand-written module computes them."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return scores.softmax(-1)


def matmul(
    problem: WeightsProblem, function: Callable[..., Tensor] = _dense_weights, note: str = ""
) -> Contender:
    """`softmax(q kᵀ)` over a dense or padded batch, then `topk` where the heaviest are wanted."""
    batch, top = problem.batch, problem.top
    layout = CONTIGUOUS if batch.dense else PADDED
    query, key = layout.to(batch.query, batch.candidates), layout.to(batch.key, batch.events)
    keep = padding_mask(batch.events, batch.device)

    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            weights = function(query, key, keep)
            return (weights,) if top is None else tuple(weights.topk(top, dim=-1))

    def read(raw: tuple[Tensor, ...]) -> list[Tensor]:
        if top is not None:
            return [layout.back(x, batch.candidates) for x in raw]
        users = zip(raw[0], batch.candidates, batch.events, strict=True)
        return [torch.cat([user[:, :c, :n].permute(1, 2, 0).flatten(0, 1) for user, c, n in users])]

    return Contender(call, read, note=note if batch.dense else "padding not timed")


def loop(problem: WeightsProblem) -> Contender:
    """The same, user by user."""
    batch, top = problem.batch, problem.top

    def call() -> list[tuple[Tensor, ...]]:
        with torch.inference_mode():
            users = zip(batch.query.split(batch.candidates), batch.key.split(batch.events), strict=True)
            weights = [_dense_weights(q.transpose(0, 1), k.transpose(0, 1), None) for q, k in users]
            return [(w,) if top is None else tuple(w.topk(top, dim=-1)) for w in weights]

    def read(raw: list[tuple[Tensor, ...]]) -> list[Tensor]:
        if top is None:
            return [torch.cat([w.permute(1, 2, 0).flatten(0, 1) for (w,) in raw])]
        return [torch.cat([user[i].transpose(0, 1) for user in raw]) for i in range(2)]

    return Contender(call, read)


def compiled(problem: WeightsProblem) -> Contender:
    torch._dynamo.reset()
    return matmul(problem, torch.compile(_dense_weights, dynamic=False))


# --- cases --------------------------------------------------------------------------------------------------


def _case(
    family: str, suite: str, candidates: list[int], events: list[int], dtype: str, top: int | None
) -> Case:
    heads, dim = 4, 32
    peers = {"matmul-softmax": matmul}
    if len(set(events)) > 1:
        peers |= {"loop": loop}
    elif suite != "smoke":
        peers |= {"compiled": compiled}

    def make(device: torch.device) -> WeightsProblem:
        return WeightsProblem(
            make_batch(candidates, events, heads=heads, dim=dim, dtype=dtype, device=device), top
        )

    sizes = {"B": len(candidates), "H": heads, "C": max(candidates), "L": max(events), "D": dim}
    shape = ",".join(str(n) for n in sizes.values())
    readout = "all" if top is None else f"top-{top}"
    return Case(OP, f"{family}-{readout}/{shape}/{dtype}", suite, dtype, sizes, make, peers)


_EVENTS, _CANDIDATES = log_normal(64, 120, 1.0, 2000), log_normal(64, 40, 0.8, 400, seed=1)
CASES = [
    *(_case("small", "smoke", [5, 3], [20, 9], "fp32", top) for top in (None, 4)),
    *(_case("table", "standard", [256] * 8, [200] * 8, dtype, 10) for dtype in ("fp32", "bf16")),
    _case("table", "standard", [256] * 8, [200] * 8, "fp32", None),
    _case("request", "standard", [200], [10000], "fp32", 10),
    *(
        _case("log-normal", "standard", _CANDIDATES, [max(10, n) for n in _EVENTS], "fp32", top)
        for top in (None, 10)
    ),
]
