"""A queue of requests before one process, simulated with real service times."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benches.measure import quantile

Answer = Callable[[Sequence[Any]], Any]  # some requests at once


def simulate(
    answers: Sequence[Answer],
    stream: Sequence[Any],
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
        stream: Sequence[Any],
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
