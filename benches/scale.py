"""How `ShardedCatalog` grows with items, users and ranks: measured here, and on paper for many hosts.

python -m benches.scale                          the tables, from the committed measurements
python -m benches.scale --measure                measures them again, on 1, 2 and 4 ranks (a minute or two)
python -m benches.scale --docs docs/scale.md     writes the page
python -m benches.scale --items 1e8 --hosts 8    the paper model with other assumptions
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benches import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results" / "scale" / "measured.json"
RANKS = (1, 2, 4)


# --- measured -----------------------------------------------------------------------------------------------


def _topk(items: int, rows: int, kind: str = "fp32") -> dict[str, Any]:
    return {"op": "topk", "items": items, "rows": rows, "dim": 64, "k": 100, "filter": kind}


def _loss(items: int, rows: int) -> dict[str, Any]:
    return {"op": "cross_entropy", "items": items, "rows": rows, "dim": 64}


CASES = [
    *(_topk(items, 16) for items in (50_000, 100_000, 200_000, 400_000)),
    *(_topk(200_000, users) for users in (1, 64, 256)),
    *(_topk(200_000, users, "int8") for users in (1, 16, 64, 256)),
    *(_loss(items, 256) for items in (12_500, 25_000, 50_000)),
    *(_loss(25_000, positions) for positions in (64, 1024)),
]


def measure(cases: list[dict[str, Any]], ranks: tuple[int, ...] = RANKS) -> list[dict[str, Any]]:
    """The cases on so many processes of this machine, each with one thread."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "cases.json", Path(folder) / "results.json"
        wanted.write_text(json.dumps(cases))
        for count in ranks:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={count}", "-m", "benches.scale_worker", str(wanted), str(found)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            ended = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            if ended.returncode:
                raise SystemExit(f"{count} ranks: {ended.stderr[-3000:]}")
            rows += json.loads(found.read_text())
    return rows


# --- what travels -------------------------------------------------------------------------------------------
# Bytes that a rank receives; the test holds them against what its collectives really brought.


def topk_received(ranks: int, users: int, k: int) -> int:
    """The same users on all ranks: scores, ids and log-sum-exp of every other rank."""
    return (ranks - 1) * users * (4 * (k + 1) + 8 * k)


def loss_received(ranks: int, positions: int, dim: int) -> int:
    """The same users on all ranks, float32: two numbers a position forward, the users' gradient backward."""
    chunk = -(-positions * dim // ranks)
    return (ranks - 1) * (8 * positions + 2 * 4 * chunk)


def own_topk_received(ranks: int, users: int, dim: int, k: int) -> int:
    """`users` of each rank's own: the other ranks' users, and for its own what they have found."""
    return (ranks - 1) * (8 + users * (4 * dim + 4 * (k + 1) + 8 * k))


def own_loss_received(ranks: int, positions: int, dim: int, events: int) -> int:
    """`positions` and `events` of each rank's own, float32: users and targets there, gradients back; and both
    ways the rows of the events, looked up."""
    total = ranks * positions
    loss = 8 + positions * (8 + 4 * dim) + 8 * total + 4 + positions * (4 + 4 * dim)
    return (ranks - 1) * (loss + 8 + events * (8 + 2 * 4 * dim))


# --- on paper -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """One rank's machine or accelerator. Nominal figures: an assumption, not a measurement or a quote."""

    name: str
    bandwidth: float  # GB/s of its memory
    rate: float  # TFLOP/s of products that the kernels reach
    memory: float  # GB
    network: float  # Gbit/s
    price: float  # $ an hour


@dataclass(frozen=True)
class Assumptions:
    items: float = 1e9
    hosts: int = 64
    dim: int = 64
    k: int = 100
    users: int = 16  # that a host brings to a call of topk
    positions: int = 1024  # that a host brings to a step of training, with as many events to look up
    negatives: float = 1e5  # of the sampled loss beside the full one
    latency: float = 20.0  # microseconds a message
    disk: float = 1.0  # GB/s of a host's storage


HOSTS = [
    Host("CPU server", bandwidth=200, rate=3, memory=256, network=25, price=2.0),
    Host("GPU", bandwidth=2000, rate=200, memory=80, network=100, price=3.0),
]


@dataclass(frozen=True)
class Figures:
    """Of one host; seconds, bytes and $."""

    serving: float  # bytes: float32 rows and their int8 filter
    training: float  # bytes: float32 rows, gradient, Adam's two moments
    read: float
    products: float
    topk_network: float
    topk_latency: float
    topk: float  # a call
    users_per_second: float
    per_million: float  # $ for a million users
    loss_products: float
    loss_network: float
    loss_latency: float
    step: float
    sampled: float  # a step with shared negatives instead, looked up by every host
    checkpoint: float  # bytes: rows and moments
    checkpoint_time: float


def figures(host: Host, a: Assumptions) -> Figures:
    """The model: nothing overlaps, no host is slower than another, a message a rank and collective."""
    n, wire = a.items / a.hosts, host.network * 1e9 / 8
    row, filter_row = 4 * a.dim, a.dim + 8  # int8, a scale and an error bound
    message = (a.hosts - 1) * a.latency * 1e-6
    every_user = a.users * a.hosts
    read = n * filter_row / (host.bandwidth * 1e9)
    products = 2 * every_user * n * a.dim / (host.rate * 1e12)
    topk_network = own_topk_received(a.hosts, a.users, a.dim, a.k) / wire
    topk_latency = 4 * message  # counts, users, scores, ids
    topk = max(read, products) + topk_network + topk_latency
    total = a.positions * a.hosts
    loss_products = 8 * total * n * a.dim / (host.rate * 1e12)
    loss_network = own_loss_received(a.hosts, a.positions, a.dim, a.positions) / wire
    loss_latency = 11 * message  # 7 of the loss, 4 of the look-up
    sampled_products = 8 * a.positions * a.negatives * a.dim / (host.rate * 1e12)
    # their rows come from all hosts, and the gradients go back
    sampled_network = 2 * (a.negatives + 2 * a.positions) * row / wire
    return Figures(
        serving=n * (row + filter_row),
        training=4 * n * row,
        read=read,
        products=products,
        topk_network=topk_network,
        topk_latency=topk_latency,
        topk=topk,
        users_per_second=every_user / topk,
        per_million=1e6 / (every_user / topk) * a.hosts * host.price / 3600,
        loss_products=loss_products,
        loss_network=loss_network,
        loss_latency=loss_latency,
        step=loss_products + loss_network + loss_latency,
        sampled=sampled_products + sampled_network + 4 * message,
        checkpoint=3 * n * row,
        checkpoint_time=3 * n * row / (a.disk * 1e9),
    )


def main(arguments: list[str] | None = None) -> None:
    from benches import scale_page

    parser = argparse.ArgumentParser(prog="python -m benches.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure again, into benches/results/scale")
    parser.add_argument("--docs", type=Path, help="write the page there")
    for field in fields(Assumptions):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"({field.default:g})")
    parser.add_argument(
        "--host",
        action="append",
        metavar="NAME,GB/s,TFLOP/s,GB,Gbit/s,$/h",
        help="a kind of host for the paper model; may be repeated, in place of the two that are there",
    )
    options = parser.parse_args(arguments)
    if options.measure:
        found = {
            "machine": machine.line(machine.describe(1, torch.device("cpu"))),
            "cores": machine.describe(1, torch.device("cpu"))["cores"],
            "rows": measure(CASES),
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    assumed = Assumptions(**{field.name: getattr(options, field.name) for field in fields(Assumptions)})
    hosts = HOSTS
    if options.host:
        parts = [text.split(",") for text in options.host]
        hosts = [Host(name, *map(float, numbers)) for name, *numbers in parts]
    measured = json.loads(RESULTS.read_text())
    print("\n".join(scale_page.measured_tables(measured) + scale_page.paper_tables(hosts, assumed)))
    if options.docs:
        options.docs.write_text(scale_page.page(measured, hosts, assumed) + "\n")


if __name__ == "__main__":
    main()
