"""What changing a catalogue costs: time and memory, and what its searches notice.

    python -m benches.catalog_update                                 a million items of 64 dims, int8 filter
    python -m benches.catalog_update --items 100000 --dtype fp32
    python -m benches.catalog_update --seconds 10 --updates 100      of serving, with 100 updates a second

Times are wall-clock, the median of several calls; memory is the most that a call adds to the process's.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attnrec import Catalog
from benches import console, machine
from benches.measure import peak_memory, quantile
from benches.tables import bytes_ as in_words
from benches.tables import seconds as in_time

CPU = torch.device("cpu")
MOST_ROUNDS = 30
K = 100


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benches.catalog_update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--items", type=int, default=1_000_000)
    add("--dim", type=int, default=64)
    add("--dtype", choices=("fp32", "bf16", "int8"), default="int8")
    add("--threads", type=int, default=torch.get_num_threads())
    add(
        "--seconds",
        type=float,
        default=4.0,
        help="of serving, without and with updates each; of a change a quarter",
    )
    add("--updates", type=float, default=20.0, help="a second while serving, of 100 items each")
    return parser.parse_args(arguments)


def measured(call: Callable[[], Any], seconds: float) -> tuple[float, int | None]:
    """Median time of a call that may be repeated, in about so many seconds, and its memory."""
    memory = peak_memory(call, CPU)
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < MOST_ROUNDS):
        taken.append(timed(call))
    return quantile(taken, 0.5), memory


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def changes(table: torch.Tensor, dtype: str, seconds: float) -> Iterator[tuple[str, float, int | None]]:
    """Rows of the table of changes: what, seconds, bytes."""
    items, dim = table.shape
    yield "pack", *measured(lambda: Catalog.pack(table, dtype), seconds)
    yield (
        "first update, of 1 item",
        *measured(lambda: Catalog.pack(table, "fp32").update([0], table[:1]), seconds),
    )
    catalog = Catalog.pack(table, dtype)
    catalog.update([0], table[:1])
    for count in (1, 100, 10_000, 100_000):
        if count > items:
            break
        ids, rows = torch.randperm(items)[:count], torch.randn(count, dim)
        yield f"update of {count:,}", *measured(lambda ids=ids, rows=rows: catalog.update(ids, rows), seconds)
    block = torch.randn(max(items // 100, 1), dim)
    taken: list[float] = []
    while len(catalog) < 2 * items:  # 100 calls, of which the first moves the catalogue
        taken.append(timed(lambda: catalog.append(block)))
    yield f"append of {len(block):,}, median", quantile(taken, 0.5), None
    yield f"append of {len(block):,}, mean until it has doubled", sum(taken) / len(taken), None
    full = Catalog.pack(table, dtype)
    yield f"append of {len(block):,}, with the move", max(taken), peak_memory(lambda: full.append(block), CPU)


def files(
    table: torch.Tensor, dtype: str, seconds: float, folder: Path
) -> Iterator[tuple[str, float, int | None]]:
    path = folder / "catalog.safetensors"
    catalog, user = Catalog.pack(table, dtype), torch.randn(1, table.shape[1])
    yield "save", *measured(lambda: catalog.save(path), seconds)
    yield "load, mapped", *measured(lambda: Catalog.load(path), seconds)
    yield (
        "load, mapped, and a search",
        *measured(lambda: Catalog.load(path).topk(user, min(K, len(table))), seconds),
    )
    yield "load into memory", *measured(lambda: Catalog.load(path, mmap=False), seconds)


@contextmanager
def updating(catalog: Catalog, every: float, waited: list[float]) -> Iterator[None]:
    """Another thread updates 100 random items at regular times; how long each took goes to `waited`."""
    stop = threading.Event()
    count = min(100, len(catalog))

    def work() -> None:
        while not stop.wait(every):
            ids = torch.randint(0, len(catalog), (count,))
            waited.append(timed(lambda ids=ids: catalog.update(ids, torch.randn(count, catalog.dim))))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def serving(
    table: torch.Tensor, dtype: str, seconds: float, updates: float
) -> Iterator[tuple[str, int, float, float, float]]:
    """What, calls, and of their seconds the median, the 99th percentile and the largest."""
    catalog = Catalog.pack(table, dtype)
    catalog.update([0], table[:1])
    user, k = torch.randn(1, table.shape[1]), min(K, len(table))

    def searches() -> list[float]:
        taken, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            taken.append(timed(lambda: catalog.topk(user, k)))
        return taken

    waited: list[float] = []
    searches()
    alone = searches()
    with updating(catalog, 1 / updates, waited):
        beside = searches()
    for what, taken in (
        ("search, nobody updates", alone),
        (f"search, {updates:g} updates a second", beside),
        ("update of 100 beside the searches", waited),
    ):
        if taken:
            yield what, len(taken), quantile(taken, 0.5), quantile(taken, 0.99), max(taken)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = torch.randn(options.items, options.dim)
    console.say(machine.line(machine.describe(options.threads, CPU, ())))
    title = f"{options.items:,} items of {options.dim} dims in fp32 ({in_words(table.nbytes)})"
    with tempfile.TemporaryDirectory() as folder:
        each = options.seconds / 4
        rows = [
            *changes(table, options.dtype, each),
            *files(table, options.dtype, each, Path(folder)),
        ]
    console.table(
        f"{title}, dtype {options.dtype}",
        ("change", "time", "peak memory"),
        [(what, in_time(taken), in_words(used)) for what, taken, used in rows],
    )
    console.table(
        f"one user's {min(K, options.items)} best, {options.threads} threads",
        ("call", "calls", "median", "99 %", "longest"),
        [
            (what, str(calls), *(in_time(x) for x in times))
            for what, calls, *times in serving(table, options.dtype, options.seconds, options.updates)
        ],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
