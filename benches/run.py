"""Runs cases: checks every result first, times what is right, and makes the rows of the tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benches.case import VARIANT, Case, Contender, Counts, Problem, Refused, Verdict
from benches.machine import Floors
from benches.measure import (
    SAMPLE,
    SAMPLE_BESIDE_POOLS,
    Times,
    captured,
    give_back_free_memory,
    interleaved,
    peak_memory,
    quick_collections,
    synchronize,
)

OURS = "attnrec"
LONGEST_CALL = 5.0  # seconds: a peer that takes longer is named and not timed, so that a suite has an end
Row = dict[str, Any]


def reproduce(case: Case, device: torch.device, threads: int, backend: str | None = None) -> str:
    """The command that runs this row alone."""
    where = "" if device.type == "cpu" else f" --device {device.type}"
    count = "" if case.threads else f" --threads {threads}"
    forced = "" if backend is None else f" --backend {backend}"
    return f"python -m benches --op {case.op} --case {case.name}{count}{where}{forced}"


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_case(
    case: Case,
    device: torch.device,
    *,
    threads: int,
    seconds: float = 3.0,
    graphs: bool = False,
    backend: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Row:
    """One row: `results` by contender, ours first; `refused`, with reasons; `wrong`, which have no speed.

    `backend` is the forced one, for the command that repeats the row; forcing it is the caller's.
    """
    row: Row = {
        "op": case.op,
        "case": case.name,
        "suite": case.suite,
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "varied": list(case.varied) if case.varied else None,
        "threads": case.threads or threads,
        "reproduce": reproduce(case, device, threads, backend),
        "results": {},
        "refused": {},
        "wrong": {},
    }
    started = time.perf_counter()
    with thread_count(row["threads"]), quick_collections():
        problem = case.make(device)
        counts = problem.counts()
        row |= {"flops": counts.flops, "bytes": counts.bytes, "exps": counts.exps}
        row["backend"] = problem.backend()
        right = _right_contenders(case, problem, device, row, say)
        if OURS not in right:
            return row  # without ours there is nothing to compare with
        say("timing")
        calls = {name: contender.call for name, (contender, _) in right.items()}
        if graphs:
            calls = _captured(calls, device, row)
            right = {name: of for name, of in right.items() if name in calls}
            if OURS not in right:
                return row
        sample = SAMPLE_BESIDE_POOLS if any(c.own_threads for c, _ in right.values()) else SAMPLE
        timed = interleaved(calls, device, sample=sample, seconds=seconds)
        say("memory")
        for name, (contender, verdict) in right.items():
            memory = peak_memory(contender.call, device)
            row["results"][name] = result(timed[name], row, memory, verdict, contender.note)
        if case.more is not None:
            say("more")
            row["more"] = case.more(problem, list(right))
    row["took"] = time.perf_counter() - started  # of a suite that has a time to keep
    return row


def _right_contenders(
    case: Case, problem: Problem, device: torch.device, row: Row, say: Callable[[str], None]
) -> dict[str, tuple[Contender, Verdict]]:
    """Those whose result was held against the reference and is right; the others go into the row."""
    prepare: dict[str, Callable[[], Contender]] = {OURS: problem.ours}
    prepare |= {name: lambda peer=peer: peer(problem) for name, peer in case.peers.items()}
    right = {}
    for name, make in prepare.items():
        say(f"checking {name}")
        try:
            contender = make()
            raw, seconds = timed_call(contender, device)
            if seconds > LONGEST_CALL and name != OURS:
                raw, seconds = timed_call(contender, device)  # the first may have compiled
                if seconds > LONGEST_CALL:
                    raise Refused(f"a call takes more than {LONGEST_CALL:.0f} s")
            results = contender.read(raw)
        except Refused as reason:
            row["refused"][name] = str(reason)
            continue
        except Exception as error:  # whatever a peer raises, and ours too: then it is wrong
            words = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            row["wrong" if is_ours(name) else "refused"][name] = words
            continue
        own = contender.check
        verdict = own(results) if own else problem.check(results, ours=is_ours(name))
        if verdict.right:
            right[name] = contender, verdict
        else:
            row["wrong"][name] = str(verdict)
        del raw, results
        give_back_free_memory()
    return right


def _captured(
    calls: dict[str, Callable[[], Any]], device: torch.device, row: Row
) -> dict[str, Callable[[], Any]]:
    """Those that can be captured, as CUDA graphs; the others go into the row."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = captured(call, device)
        except Exception as error:  # whatever a library does that a capture forbids
            row["refused"][name] = f"no CUDA graph: {error}".splitlines()[0][:300]
    return found


def timed_call(contender: Contender, device: torch.device) -> tuple[Any, float]:
    start = time.perf_counter()
    raw = contender.call()
    synchronize(device)
    return raw, time.perf_counter() - start


def result(times: Times, row: Row, memory: int | None, verdict: Verdict | None, note: str) -> dict[str, Any]:
    """What a row tells of one contender: `ratio` is its time over ours, `share` is `take_shares`'."""
    return {
        "seconds": times.median,
        "p10": times.p10,
        "p90": times.p90,
        "ratio": times.ratio,
        "rounds": times.rounds,
        "calls_per_sample": times.calls,
        "gflops": row["flops"] / times.median / 1e9,
        "gbytes_per_second": row["bytes"] / times.median / 1e9,
        "share": None,
        "memory": memory,
        "error": None if verdict is None else verdict.error,
        "allowed": None if verdict is None else verdict.allowed,
        "note": note,
    }


def take_shares(rows: Sequence[Row], floors: Floors) -> None:
    """Sets each row's floor, and of each contender the share that the floor is of its time."""
    for row in rows:
        counts = Counts(row["flops"], row["bytes"], row["exps"])
        row["floor_seconds"], row["bound"] = floors.seconds(counts, row["dtype"])
        for of in row["results"].values():
            of["share"] = row["floor_seconds"] / of["seconds"]


def is_ours(name: str) -> bool:
    """Whether the contender is our call, or that with something added."""
    return name == OURS or name.startswith(VARIANT)


def failed(row: Row) -> bool:
    return any(is_ours(name) for name in row["wrong"])


def fastest_peer(row: Row) -> tuple[str, float] | None:
    """The quickest peer's name and ratio (above 1: ours is faster); None where no peer ran."""
    ratios = {name: r["ratio"] for name, r in row["results"].items() if not is_ours(name)}
    if not ratios or OURS not in row["results"]:
        return None
    name = min(ratios, key=lambda n: ratios[n])
    return name, ratios[name]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else float("nan")
