"""Timing contenders against each other, and the memory that each takes."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

SAMPLE = 0.020  # seconds at least that one sample lasts
SAMPLE_BESIDE_POOLS = 0.040  # where a contender has its own pool of threads
LEAST_ROUNDS = 5
LEAST_OF_LONG = 3  # where five rounds would take five times the time that is meant for a case
MOST_ROUNDS = 25


@dataclass(frozen=True)
class Times:
    """Seconds per call of one contender; `ratio` is its time over the first contender's, round by round."""

    median: float
    p10: float
    p90: float
    ratio: float
    rounds: int
    calls: int  # in each sample


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between the two nearest, as numpy's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds per call, over `calls` of them; on a GPU those that the GPU needed."""
    if device.type == "cuda":
        return _time_on_gpu(call, calls, device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _time_on_gpu(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Between two events around each call, with a cold L2 cache before it.

    Emptying the cache takes the GPU longer than most launches take the processor, so that the launch is over
    when the GPU comes to the first event: small calls show the time of their kernels. What a launch costs on
    top is not in this figure.
    """
    cache = _twice_the_l2(device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize(device)
    for start, end in pairs:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / calls


@lru_cache
def _twice_the_l2(device: torch.device) -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call's launches as a CUDA graph: its replay. Raises where they cannot be captured.

    Warmed up on a side stream first, as capture wants it: what compiles or allocates does so there.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def calls_per_sample(call: Callable[[], Any], sample: float, device: torch.device) -> int:
    """How many calls make a sample of at least `sample` seconds."""
    calls, seconds = 1, time_calls(call, 1, device)  # the first is slower: caches, lazy set-up
    while seconds * calls < sample:
        calls = max(calls + 1, min(8 * calls, int(1.2 * sample / seconds)))
        seconds = time_calls(call, calls, device)
    return calls


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    sample: float = SAMPLE,
    seconds: float = 3.0,
) -> dict[str, Times]:
    """Times the contenders in rounds, one sample of each a round; the first is what ratios are taken to.

    A slow phase of the machine meets all of them alike, and the round-by-round ratio does not see it. The
    order turns with the rounds, so that nobody always follows the same neighbour, and a sample of many short
    calls begins with an untimed one, which takes the other's data out of the caches and wakes the threads.
    """
    device = torch.device(device)
    amount = {name: calls_per_sample(call, sample, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if enough(turn, time.perf_counter() - start, seconds):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if amount[name] > 1:
                calls[name]()
            samples[name].append(time_calls(calls[name], amount[name], device))
    base = samples[names[0]]
    return {name: times(taken, base, amount[name]) for name, taken in samples.items()}


def enough(rounds: int, taken: float, seconds: float) -> bool:
    """Whether a case that has `seconds` needs no further round after so many in so much time."""
    return taken > seconds and rounds >= (LEAST_ROUNDS if taken <= 5 * seconds else LEAST_OF_LONG)


def times(taken: Sequence[float], base: Sequence[float], calls: int) -> Times:
    ratio = statistics.median(mine / other for mine, other in zip(taken, base, strict=True))
    return Times(
        statistics.median(taken), quantile(taken, 0.1), quantile(taken, 0.9), ratio, len(taken), calls
    )


# --- memory -------------------------------------------------------------------------------------------------

HOW_MEMORY = (
    "the most that one call adds to the process's resident memory, its result included: VmHWM of "
    "/proc/self/status after resetting it through /proc/self/clear_refs (on a GPU: torch's peak statistics)"
)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes at the peak of one call above what was there before; None where the system does not tell."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    give_back_free_memory()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark to the present size
        before = _status("VmHWM")
        result = call()
        after = _status("VmHWM")
    except OSError:
        return None
    del result
    return max(after - before, 0)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Keeps what is there now, the libraries' own objects, out of the garbage collector's sight.

    A look at all of them takes 0.4 s, and a case of six contenders has a dozen: 7 of its 13 seconds.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back_free_memory() -> None:
    """Free memory that the allocator keeps would hide what a call takes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
