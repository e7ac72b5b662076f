"""One rank of `python -m benches.scale --measure`, started by torchrun: times ShardedCatalog on its rows.

    torchrun --nproc-per-node 2 -m benches.scale_worker CASES.json RESULTS.json

A call is timed twice over: by the clock, from a barrier to the last rank's end, and by the processor time of
the rank's own thread, in which waiting for other ranks and for a core does not count.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from attnrec import ShardedCatalog
from attnrec.catalog.sharded_group import Group, Sharding, disconnect

SAMPLES, LEAST_SECONDS = 5, 0.3


class Received:
    """Counts the bytes that collectives bring from other ranks."""

    def __init__(self) -> None:
        self.total = 0
        gather, exchange = dist.all_gather, dist.all_to_all_single
        rank = dist.get_rank()

        def all_gather(out: list[torch.Tensor], x: torch.Tensor, **options: Any) -> Any:
            self.total += (len(out) - 1) * x.numel() * x.element_size()
            return gather(out, x, **options)

        def all_to_all(
            out: torch.Tensor, x: torch.Tensor, got: list[int], sent: list[int], **options: Any
        ) -> Any:
            self.total += (sum(got) - got[rank]) * out.element_size()
            return exchange(out, x, got, sent, **options)

        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all


def call_of(case: dict[str, Any], group: Group) -> Callable[[], Any]:
    """The call that a case times, on rows and users of its own."""
    own = Sharding.even(group, case["items"]).count
    random = torch.Generator().manual_seed(group.rank)
    shared = torch.Generator().manual_seed(1000)
    rows = torch.randn(own, case["dim"], generator=random)
    users = torch.randn(case["rows"], case["dim"], generator=shared) / case["dim"] ** 0.5
    if case["op"] == "topk":
        catalog = ShardedCatalog.from_rows(rows, dtype=case["filter"])
        return lambda: catalog.topk(users, case["k"])
    target = torch.randint(0, case["items"], (case["rows"],), generator=shared)
    catalog = ShardedCatalog.from_rows(rows.requires_grad_())
    users.requires_grad_()

    def step() -> None:
        rows.grad = users.grad = None
        catalog.cross_entropy(users, target).backward()

    return step


def timed(call: Callable[[], Any], group: Group, received: Received) -> dict[str, float]:
    """Medians of the calls, in seconds; of the ranks the slowest."""
    call()
    clock: list[float] = []
    processor: list[float] = []
    received.total = 0
    call()
    taken = received.total
    enough = torch.zeros(1)
    while not enough:
        dist.barrier()
        started, used = time.perf_counter(), time.thread_time()
        call()
        processor.append(time.thread_time() - used)
        dist.barrier()
        clock.append(time.perf_counter() - started)
        enough = group.gather(torch.tensor([len(clock) >= SAMPLES and sum(clock) >= LEAST_SECONDS]).float())[
            0
        ]
    slowest = group.gather(torch.tensor([statistics.median(clock), statistics.median(processor)])).amax(0)
    return {"clock": slowest[0].item(), "processor": slowest[1].item(), "received": taken}


def main(cases: Path, results: Path) -> None:
    dist.init_process_group("gloo")
    group, received = Group(), Received()
    found = []
    for case in json.loads(cases.read_text()):
        found.append({**case, "ranks": group.size, **timed(call_of(case, group), group, received)})
    if group.rank == 0:
        results.write_text(json.dumps(found))
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
