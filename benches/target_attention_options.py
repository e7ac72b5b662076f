"""What target attention's options cost, and whether threads share the work: ours against ours.

A contender whose name begins with `+` is attnrec's own call with something added: its ratio is the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import attnrec
from attnrec import reference
from benches.case import Case, Contender, Refused, Verdict, compare
from benches.jagged import Batch
from benches.lengths import CPU_TABLE
from benches.peers import sdpa
from benches.run import thread_count
from benches.target_attention import ORDERS, OURS, AttentionProblem, attention_case

Options = dict[str, Tensor]


def with_options(make: Callable[[Batch], Options], problem: AttentionProblem) -> Contender:
    """The problem's call with more arguments, held against the reference with the same."""
    batch, options = problem.batch, make(problem.batch)

    def call() -> Tensor:
        with torch.inference_mode():
            return attnrec.target_attention(
                batch.query, batch.key, batch.value, batch.q_offsets, batch.kv_offsets, **options
            )

    def expected(columns: Tensor, dtype: torch.dtype) -> list[Tensor]:
        def shuffled(name: str, x: Tensor) -> Tensor:
            x = x[..., columns] if name == "self_key" else x
            return x.to(dtype) if x.is_floating_point() else x

        given = {name: shuffled(name, x) for name, x in options.items()}
        query, key = (x[..., columns].to(dtype) for x in (batch.query, batch.key))
        value = batch.value.to(dtype)
        return [reference.target_attention(query, key, value, batch.q_offsets, batch.kv_offsets, **given)[0]]

    def check(results: Sequence[Tensor]) -> Verdict:
        dim, generator = batch.query.shape[-1], torch.Generator().manual_seed(1)
        orders = [torch.arange(dim), *(torch.randperm(dim, generator=generator) for _ in range(ORDERS))]
        ways = [expected(order, batch.query.dtype) for order in orders]
        exact = expected(orders[0], torch.float64)
        return compare(results, ways, exact, factors=[OURS], names=["out"])

    return Contender(call, check=check)


def _everything_visible(batch: Batch) -> Options:
    return {"visible": torch.repeat_interleave(torch.tensor(batch.events), torch.tensor(batch.candidates))}


def _rising_visible(batch: Batch) -> Options:
    """From few events to all: half of the work is left."""
    rising = [
        torch.linspace(n / c, n, c).long().clamp(min=1)
        for c, n in zip(batch.candidates, batch.events, strict=True)
    ]
    return {"visible": torch.cat(rising)}


def _key_bias(batch: Batch) -> Options:
    generator = torch.Generator().manual_seed(2)
    return {"key_bias": torch.randn(batch.key.shape[0], batch.query.shape[1], generator=generator)}


def _self_slot(batch: Batch) -> Options:
    generator = torch.Generator().manual_seed(3)
    shape = batch.query.shape[0], *batch.key.shape[1:]
    return {
        name: torch.randn(shape, generator=generator).to(batch.query.dtype)
        for name in ("self_key", "self_value")
    }


def _kv_lengths(batch: Batch) -> Options:
    return {"kv_lengths": torch.tensor(batch.events)}


def _on_device(make: Callable[[Batch], Options], batch: Batch) -> Options:
    return {name: x.to(batch.device) for name, x in make(batch).items()}


OPTIONS = {
    "+visible": _everything_visible,
    "+visible rising": _rising_visible,
    "+key_bias": _key_bias,
    "+self slot": _self_slot,
    "+kv_lengths": _kv_lengths,
}


def one_thread(problem: AttentionProblem) -> Contender:
    """The same call on one thread: its ratio is how many threads the usual call keeps busy."""
    if problem.batch.device.type != "cpu" or torch.get_num_threads() == 1:
        raise Refused("there is one thread only")
    contender = problem.ours()

    def call() -> Tensor:
        with thread_count(1):
            return contender.call()

    return Contender(call, contender.read)


def _option_case(suite: str, dtype: str, shape: tuple[int, ...]) -> Case:
    users, heads, candidates, events, dim = shape
    variants = {name: partial(with_options, partial(_on_device, make)) for name, make in OPTIONS.items()}
    name = f"options/{','.join(map(str, shape))}"
    sizes = [candidates] * users, [events] * users
    return attention_case(name, suite, dtype, *sizes, {}, heads=heads, dim=dim, variants=variants)


def _balance() -> list[Case]:
    """One user with 10,000 events among 1,000 with 20."""
    candidates, events = [20] * 1001, [20] * 500 + [10_000] + [20] * 500
    return [
        attention_case(
            f"balance/{len(events)},4,20,{max(events)},32",
            "standard",
            dtype,
            candidates,
            events,
            {"sdpa-loop": sdpa.loop},
            heads=4,
            dim=32,
            variants={"+one thread": one_thread},
        )
        for dtype in ("fp32", "bf16")
    ]


# The whole table in `full`: the reference takes most of the time.
_STANDARD = (CPU_TABLE[0], CPU_TABLE[3], CPU_TABLE[5], CPU_TABLE[6])
CASES = [
    _option_case("smoke", "fp32", (2, 2, 16, 40, 16)),
    *(
        _option_case("standard" if shape in _STANDARD else "full", dtype, shape)
        for shape in CPU_TABLE
        for dtype in ("fp32", "bf16")
    ),
    *_balance(),
]
