"""A ranking service: requests with Poisson arrivals and mixed lengths, answered by one process.

The model is the usual one: embeddings of the user's events and of the candidates, target attention of each
candidate over the history, an MLP, a click probability. Ours and the peers share its parameters and differ in
the attention and what it needs: ours takes a batch of requests packed, plain PyTorch padded and masked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import attnrec
from benches import target_attention
from benches.case import DTYPES, Case, Contender, Counts, Verdict, compare
from benches.jagged import padding_mask
from benches.lengths import log_normal, offsets
from benches.measure import quantile, time_calls
from benches.run import OURS

OP = "serving"
LIMIT, LIMIT_OF_PEERS = 4.0, 10.0  # a whole model's roundings
ITEMS, DIM, HEADS, HIDDEN = 20_000, 64, 2, 128
LOAD = 0.7  # arrivals a second, as a part of what plain PyTorch can answer


@dataclass(frozen=True)
class Request:
    history: Tensor  # ids [L]
    candidates: Tensor  # ids [C]


class Ranker(nn.Module):
    """Contenders differ in `attend(query, key, value)`, all `[..., n, H, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, DIM)
        self.query, self.key_value = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
        self.mlp = nn.Sequential(nn.Linear(2 * DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward_packed(self, history: Tensor, candidates: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Ids `[T_l]` and `[T_c]` → click probabilities `[T_c]`."""
        item = self.items(candidates)
        query = self.query(item).unflatten(-1, (HEADS, -1))
        key, value = self.key_value(self.items(history)).unflatten(-1, (2, HEADS, -1)).unbind(-3)
        interest = attend(query, key, value).flatten(-2)
        return self.mlp(torch.cat([item, interest], -1)).squeeze(-1).sigmoid()

    def forward_padded(self, history: Tensor, candidates: Tensor, keep: Tensor | None) -> Tensor:
        """Ids `[B, L]` and `[B, C]`, `keep [B, 1, 1, L]` → `[B, C]`, by PyTorch's own attention."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)

        return self.forward_packed(history, candidates, attend)


def requests(count: int, *, seed: int = 0) -> list[Request]:
    """20 … 1,000 candidates, 10 … 4,000 events, both with long tails."""
    generator = torch.Generator().manual_seed(seed)
    events = log_normal(count, 200, 1.0, 4000, seed=seed + 1)
    candidates = log_normal(count, 150, 0.8, 1000, seed=seed + 2)

    def ids(n: int) -> Tensor:
        return torch.randint(ITEMS, (n,), generator=generator)

    return [Request(ids(max(n, 10)), ids(max(c, 20))) for n, c in zip(events, candidates, strict=True)]


# --- the service --------------------------------------------------------------------------------------------

Answer = Callable[[Sequence[Request]], list[Tensor]]


def simulate(
    answers: Sequence[Answer],
    stream: Sequence[Request],
    arrivals: Sequence[float],
    *,
    most: int,
    clock: Callable[[], float],
) -> list[list[float]]:
    """Seconds from arrival to answer of every request, for each of `answers`.

    Each is a service of its own with its own clock: it takes up to `most` of the requests that wait, and its
    clock goes on by the time that this really took, or to the next arrival where nothing waits; so idle time
    costs nothing here. They take turns call by call, so that a slow phase of the machine meets all of them.
    """
    services = [_Service(answer, stream, arrivals, most, clock) for answer in answers]
    running = deque(services)
    while running:
        service = running.popleft()
        if service.step():
            running.append(service)
    return [service.latencies for service in services]


class _Service:
    def __init__(
        self,
        answer: Answer,
        stream: Sequence[Request],
        arrivals: Sequence[float],
        most: int,
        clock: Callable[[], float],
    ) -> None:
        self.answer, self.stream, self.arrivals, self.most, self.clock = answer, stream, arrivals, most, clock
        self.now, self.next = 0.0, 0
        self.latencies: list[float] = []

    def step(self) -> bool:
        """Answers the next batch; False when there is none."""
        if self.next == len(self.stream):
            return False
        self.now = max(self.now, self.arrivals[self.next])
        last = self.next + 1
        while last < len(self.stream) and last - self.next < self.most and self.arrivals[last] <= self.now:
            last += 1
        start = self.clock()
        self.answer(self.stream[self.next : last])
        self.now += self.clock() - start
        self.latencies += [self.now - arrival for arrival in self.arrivals[self.next : last]]
        self.next = last
        return True


def poisson(count: int, rate: float, *, seed: int = 0) -> list[float]:
    """Arrival times of a Poisson process, in seconds."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (-torch.log1p(-uniform) / rate).cumsum(0).tolist()


def summary(latencies: Sequence[float], arrivals: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 in seconds, and answers a second from the first arrival to the last answer."""
    last = max(arrival + latency for arrival, latency in zip(arrivals, latencies, strict=True))
    found = {f"p{q}": quantile(latencies, q / 100) for q in (50, 95, 99)}
    return found | {"requests_per_second": len(latencies) / (last - arrivals[0])}


# --- the case: what one batch of requests takes -------------------------------------------------------------


class ServingProblem:
    """The click probabilities of some requests at once, one behind the other."""

    def __init__(self, batch: Sequence[Request], dtype: str, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = Ranker().to(device, DTYPES[dtype]).eval()
        self.batch, self.device = batch, device

    def counts(self) -> Counts:
        """Attention, projections and MLP; of the embedding table the rows that are looked up."""
        rows = sum(len(r.candidates) for r in self.batch)
        events = sum(len(r.history) for r in self.batch)
        pairs = sum(len(r.candidates) * len(r.history) for r in self.batch)
        size = self.model.items.weight.element_size()
        attention = target_attention.count(
            pairs, rows, events, heads=HEADS, kv_heads=HEADS, dim=DIM // HEADS, size=size, train=False
        )
        dense = 2.0 * (rows * (DIM * DIM + 2 * DIM * HIDDEN + HIDDEN) + events * 2 * DIM * DIM)
        return Counts(attention.flops + dense, float(size * DIM * (rows + events)), attention.exps)

    def ours(self) -> Contender:
        return Contender(lambda: torch.cat(packed(self.model)(self.batch)))

    def backend(self) -> str:
        return "model"

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        def results(model: Ranker) -> list[Tensor]:
            answer = padded(model)
            return [torch.cat([answer([request])[0] for request in self.batch])]

        with torch.random.fork_rng(devices=[]):
            exact = Ranker().to(self.device, torch.float64).eval()
        exact.load_state_dict(self.model.state_dict())
        return results(self.model), results(exact)

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factor = LIMIT if ours else LIMIT_OF_PEERS
        return compare(results, *self.expected, factors=[factor], names=["probabilities"])


def packed(model: Ranker) -> Answer:
    """Ours: the requests one behind the other."""

    def answer(batch: Sequence[Request]) -> list[Tensor]:
        events = [len(request.history) for request in batch]
        candidates = [len(request.candidates) for request in batch]
        of = offsets(candidates), offsets(events)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attnrec.target_attention(query, key, value, *of)

        with torch.inference_mode():
            history = torch.cat([request.history for request in batch])
            ids = torch.cat([request.candidates for request in batch])
            return list(model.forward_packed(history, ids, attend).split(candidates))

    return answer


def padded(model: Ranker, forward: Callable[..., Tensor] | None = None) -> Answer:
    """Plain PyTorch: a batch is padded to its longest; one request needs neither padding nor mask."""
    forward = model.forward_padded if forward is None else forward

    def answer(batch: Sequence[Request]) -> list[Tensor]:
        with torch.inference_mode():
            history = pad_sequence([request.history for request in batch], batch_first=True)
            ids = pad_sequence([request.candidates for request in batch], batch_first=True)
            mask = padding_mask([len(request.history) for request in batch], history.device)
            keep = None if mask is None else mask[:, None, None, :]
            found = forward(history, ids, keep)
            return [row[: len(request.candidates)] for row, request in zip(found, batch, strict=True)]

    return answer


def compiled_answer(model: Ranker) -> Answer:
    """The same, compiled for any size."""
    return padded(model, torch.compile(model.forward_padded, dynamic=True))


def plain(problem: ServingProblem) -> Contender:
    answer = padded(problem.model)
    return Contender(lambda: torch.cat(answer(problem.batch)))


def compiled(problem: ServingProblem) -> Contender:
    torch._dynamo.reset()
    answer = compiled_answer(problem.model)
    return Contender(lambda: torch.cat(answer(problem.batch)))


ANSWERS: dict[str, Callable[[Ranker], Answer]] = {
    OURS: packed,
    "pytorch": padded,
    "pytorch-compiled": compiled_answer,
}


def serve(problem: ServingProblem, names: Sequence[str], *, count: int, most: int) -> dict[str, Any]:
    """Latencies and answers a second of each at one and the same stream of requests.

    The load is `LOAD` of what plain PyTorch answers one by one; where it did not run, of what ours does.
    """
    stream = requests(count)
    answers = {name: ANSWERS[name](problem.model) for name in names}
    for answer in answers.values():  # what compiles, compiles before the clock runs
        for i in range(0, min(count, 4 * most), most):
            answer(stream[i : i + most])
    first = answers.get("pytorch", answers[OURS])
    some = stream[: min(count, 100)]
    seconds = [time_calls(lambda r=request: first([r]), 1, problem.device) for request in some]
    rate = LOAD * len(seconds) / sum(seconds)
    arrivals = poisson(count, rate)
    latencies = simulate(list(answers.values()), stream, arrivals, most=most, clock=time.perf_counter)
    return {
        "requests": count,
        "most_at_once": most,
        "arrivals_per_second": rate,
        "services": {name: summary(of, arrivals) for name, of in zip(answers, latencies, strict=True)},
    }


def _case(suite: str, dtype: str, batch: int, *, count: int) -> Case:
    def make(device: torch.device) -> ServingProblem:
        return ServingProblem(requests(batch, seed=7), dtype, device)

    drawn = requests(batch, seed=7)
    sizes: dict[str, int | str] = {
        "B": batch,
        "H": HEADS,
        "T_c": sum(len(request.candidates) for request in drawn),
        "T_l": sum(len(request.history) for request in drawn),
        "D": DIM // HEADS,
    }
    peers = {"pytorch": plain} if suite == "smoke" else {"pytorch": plain, "pytorch-compiled": compiled}
    more = partial(serve, count=count, most=batch)
    return Case(OP, f"up-to-{batch}/{count}/{dtype}", suite, dtype, sizes, make, peers, more=more)


CASES = [
    _case("smoke", "fp32", 2, count=20),
    *(_case("standard", "fp32", batch, count=1000) for batch in (1, 8)),
    _case("full", "bf16", 8, count=1000),
]
