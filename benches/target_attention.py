"""Target attention: the design's table of CPU shapes, ranking requests, jagged batches, published shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

import attnrec
from attnrec import reference
from benches.case import Case, Contender, Counts, Peer, Verdict, compare
from benches.jagged import PACKED, Batch, make_batch, other_orders, torch_contender
from benches.lengths import CPU_TABLE, log_normal, zipf
from benches.peers import flash, flex, jax, onnxruntime, openvino, plain, sdpa, xformers

OP = "target_attention"
# Others round in other places than plain PyTorch does, so they may be further from the exact result than we.
OURS, OURS_GRADIENT, PEERS = 2.0, 3.0, 10.0
# Further orders of summation that plain PyTorch's error is taken from. In growth-heads/16 one row's largest
# weight decides: plain PyTorch is off by 3.0e-7 there in its own order, by up to 8.6e-7 in eight others.
ORDERS = 3
MUCH = 1 << 28  # scores times head dim: with more one further order has to do, which has many rows to err in


def count(
    pairs: int, rows: int, events: int, *, heads: int, kv_heads: int, dim: int, size: int, train: bool
) -> Counts:
    """Of the forward pass two products; with the backward five more (scores again, dV, dP, dQ, dK).

    Args:
        pairs: candidates times the events that each sees, summed over the users.
        rows, events: T_c, T_l.
        size: bytes of an element.
    """
    products = 7 if train else 2
    passes = 2 if train else 1  # the backward reads what the forward did, and writes as much in gradients
    numbers = passes * dim * (2 * rows * heads + 2 * events * kv_heads) + (
        2 * rows * heads * dim if train else 0
    )
    return Counts(
        flops=2.0 * products * pairs * heads * dim,
        bytes=float(numbers * size + passes * 4 * rows * heads),  # and lse in fp32
        exps=float(passes * pairs * heads),
    )


class AttentionProblem:
    """`out`, or `out` and the gradients of query, key and value."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def counts(self) -> Counts:
        batch = self.batch
        return count(
            batch.pairs,
            batch.query.shape[0],
            batch.key.shape[0],
            heads=batch.query.shape[1],
            kv_heads=batch.key.shape[1],
            dim=batch.query.shape[2],
            size=batch.query.element_size(),
            train=batch.train,
        )

    def ours(self) -> Contender:
        batch, visible = self.batch, self.batch.visible

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attnrec.target_attention(
                query, key, value, batch.q_offsets, batch.kv_offsets, visible=visible
            )

        return torch_contender(batch, attend, PACKED)

    def backend(self) -> str:
        batch = self.batch
        arguments = batch.query, batch.key, batch.value, batch.q_offsets, batch.kv_offsets
        return attnrec.explain(attnrec.target_attention, *arguments, visible=batch.visible).backend

    @cached_property
    def expected(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """By plain PyTorch in the case's dtype, in several orders of summation, and exactly."""
        ways = [by_reference(self.batch)]
        _, heads, dim = self.batch.query.shape
        passes = 3 if self.batch.train else 1
        count = ORDERS if passes * self.batch.pairs * heads * dim <= MUCH else 1
        ways += [back(by_reference(shuffled)) for shuffled, back in other_orders(self.batch, count)]
        return ways, by_reference(self.batch.double())

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factors = [OURS, *[OURS_GRADIENT] * 3] if ours else [PEERS] * 4
        names = ["out", "grad_query", "grad_key", "grad_value"]
        n = 4 if self.batch.train else 1
        return compare(results, *self.expected, factors=factors[:n], names=names[:n])


def backend_of(device: torch.device, dtype: torch.dtype, *, heads: int, dim: int) -> str:
    """The backend that serves a model's attention."""
    x, of = torch.zeros(1, heads, dim, device=device, dtype=dtype), torch.tensor([0, 1], device=device)
    return attnrec.explain(attnrec.target_attention, x, x, x, of, of).backend


def by_reference(batch: Batch) -> list[Tensor]:
    """`out` and the gradients, user by user: the gradient of one user's slice is as large as the whole batch,
    so that of all at once 256 users took a minute."""

    def of_user(user: Batch) -> list[Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            given = query, key, value, user.q_offsets, user.kv_offsets
            return reference.target_attention(*given, visible=user.visible)[0]

        contender = torch_contender(user, attend, PACKED)
        return contender.read(contender.call())

    return [torch.cat(parts) for parts in zip(*map(of_user, batch.by_user()), strict=True)]


# --- cases --------------------------------------------------------------------------------------------------


def _of_batch(peer: Callable[[Batch], Contender]) -> Peer:
    return lambda problem: peer(problem.batch)


ENGINES = {"openvino": openvino.attention, "onnxruntime": onnxruntime.attention}
ON_GPU = {"flash-attn": flash.attention, "xformers": xformers.attention}
DENSE = {"sdpa": sdpa.contiguous, "sdpa-strided": sdpa.strided}
JAGGED = {"sdpa-loop": sdpa.loop, "sdpa-padded": sdpa.padded, "sdpa-nested": sdpa.nested}
# These compile for tens of seconds, so they stand in two families only.
COMPILED = {"flex_attention": flex.attention, "compiled-reference": plain.compiled}


def attention_case(
    name: str,
    suite: str,
    dtype: str,
    candidates: Sequence[int],
    events: Sequence[int],
    peers: dict[str, Callable[[Batch], Contender]],
    *,
    heads: int,
    dim: int,
    kv_heads: int | None = None,
    causal: bool = False,
    train: bool = False,
    varied: tuple[str, int] | None = None,
    threads: int | None = None,
    variants: Mapping[str, Peer] | None = None,
) -> Case:
    def make(device: torch.device) -> AttentionProblem:
        return AttentionProblem(
            make_batch(
                candidates,
                events,
                heads=heads,
                dim=dim,
                kv_heads=kv_heads,
                dtype=dtype,
                device=device,
                causal=causal,
                train=train,
            )
        )

    sizes: dict[str, int | str] = {"B": len(candidates), "H": heads}
    if kv_heads:
        sizes["H_kv"] = kv_heads
    sizes |= {"C": _range(candidates), "L": _range(events), "D": dim}
    by_name = {peer: _of_batch(prepare) for peer, prepare in peers.items()} | dict(variants or {})
    return Case(OP, f"{name}/{dtype}", suite, dtype, sizes, make, by_name, varied, threads)


def _range(counts: Sequence[int]) -> int | str:
    least, most = min(counts), max(counts)
    return least if least == most else f"{least}…{most} (mean {round(sum(counts) / len(counts))})"


def _dense(family: str, suite: str, shape: tuple[int, ...], peers: dict, **options) -> list[Case]:
    users, heads, candidates, events, dim = shape
    name = f"{family}/{','.join(map(str, shape))}"
    return [
        attention_case(
            name, suite, dtype, [candidates] * users, [events] * users, peers, heads=heads, dim=dim, **options
        )
        for dtype in ("fp32", "bf16")
    ]


def _jagged(
    family: str,
    suite: str,
    candidates: list[int],
    events: list[int],
    heads: int,
    dim: int,
    peers: dict,
    **options,
) -> list[Case]:
    name = f"{family}/{len(candidates)},{heads},{max(candidates)},{max(events)},{dim}"
    return [
        attention_case(name, suite, dtype, candidates, events, peers, heads=heads, dim=dim, **options)
        for dtype in ("fp32", "bf16")
    ]


def _compiled(cases: list[Case]) -> list[Case]:
    """Compiling takes long: bf16, which is for GPUs, stands in `full`."""
    return [case if case.dtype == "fp32" else replace(case, suite="full") for case in cases]


def _standard() -> list[Case]:
    cases = []
    peers = DENSE | ENGINES | ON_GPU
    for shape in CPU_TABLE:
        cases += _dense("table", "standard", shape, peers)
    cases += _compiled(_dense("compiled", "standard", CPU_TABLE[0], DENSE | COMPILED))

    # Users with long-tailed histories: dense peers pad to the longest.
    peers = JAGGED | ENGINES | ON_GPU
    events, candidates = log_normal(64, 120, 1.0, 2000), log_normal(64, 40, 0.8, 400, seed=1)
    cases += _jagged("log-normal", "standard", candidates, events, 4, 32, peers)
    few = candidates[:6], events[:6]
    cases += _compiled(_jagged("compiled-log-normal", "standard", *few, 4, 32, JAGGED | COMPILED))
    cases += _jagged("zipf", "standard", [50] * 64, zipf(64, 4000), 4, 32, peers)

    # A ranking request: one user.
    peers = DENSE | ENGINES | ON_GPU
    for candidates_of_request in (20, 200, 2000):
        for events_of_request in (50, 1000, 10000):
            shape = (1, 4, candidates_of_request, events_of_request, 32)
            cases += _dense("request", "standard", shape, peers)
    return cases


def _published() -> list[Case]:
    peers = DENSE | ENGINES | ON_GPU
    cases = []
    # IKBO (FBGEMM): 2,048 candidates, 64 of each user.
    for events in (512, 4096, 16384):
        suite = "full" if events == 16384 else "standard"
        cases += _dense("ikbo", suite, (32, 2, 64, events, 128), peers)
    # The same with its 64 query rows a candidate.
    cases += _dense("ikbo-64-rows", "full", (32, 2, 64 * 64, 512, 128), DENSE)
    # hstu_cross_attn (facebookexperimental/triton): histories near the longest, half to all of it as queries.
    events = [1024 - 16 * i for i in range(8)]
    candidates = [n // 2 + i * n // 16 for i, n in enumerate(events)]
    cases += _jagged("hstu-cross", "standard", candidates, events, 2, 128, JAGGED | ON_GPU, kv_heads=1)
    # One query over a history of 10,000 events (Douyin's STCA).
    cases += _dense("stca", "standard", (16, 4, 1, 10000, 32), peers)
    # generative-recommenders issue 530: 32 users, 2,048 candidates in all, histories of about 1,024.
    events = log_normal(32, 1024, 0.25, 2048)
    cases += _jagged("mean-1024", "full", [64] * 32, events, 4, 128, JAGGED | ENGINES | ON_GPU)
    return cases


def _training() -> list[Case]:
    cases = []
    for shape in CPU_TABLE:
        # JAX compiles for long, and is the slowest of them.
        engine = {"jax": jax.attention} if shape in CPU_TABLE[:2] else {}
        cases += _dense("train", "standard", shape, DENSE | engine | ON_GPU, train=True)
    events, candidates = log_normal(64, 120, 1.0, 2000), log_normal(64, 40, 0.8, 400, seed=1)
    loops = {name: JAGGED[name] for name in ("sdpa-loop", "sdpa-padded")}
    peers = loops | {"jax": jax.attention} | ON_GPU
    cases += _jagged("train-log-normal", "standard", candidates, events, 4, 32, peers, train=True)
    # Causal self-attention over histories, as a sequence encoder has it.
    peers = loops | {"jax": jax.attention}
    histories = log_normal(64, 80, 0.7, 200)
    cases += _jagged("train-causal", "standard", histories, histories, 2, 32, peers, causal=True, train=True)
    return cases


def _smoke() -> list[Case]:
    peers = DENSE | ENGINES
    cases = _dense("small", "smoke", (2, 2, 16, 40, 16), peers)
    jagged = log_normal(6, 20, 1.0, 100), log_normal(6, 8, 0.8, 30, seed=1)
    cases += _jagged("small-jagged", "smoke", jagged[1], jagged[0], 2, 16, JAGGED | ENGINES)[:1]
    cases += _dense("small-train", "smoke", (2, 2, 16, 40, 16), DENSE, train=True)[:1]
    return cases


CASES: list[Case] = [*_smoke(), *_standard(), *_published(), *_training()]
