"""docs/scale.md, written from the measurements and the paper model of `python -m benches.scale`."""

from __future__ import annotations

from typing import Any

from benches.model_page import table
from benches.scale import (
    Assumptions,
    Figures,
    Host,
    figures,
    loss_received,
    topk_received,
)

HEAD = """# More than one machine

Written by `python -m benches.scale --docs docs/scale.md`. `attnrec.ShardedCatalog` spreads a catalogue's
rows over the ranks of `torch.distributed` (gloo on CPUs, NCCL where there are GPUs; the latter has not run
yet).

```python
import torch

import attnrec

catalog = attnrec.ShardedCatalog(torch.randn(1000, 16))  # under torchrun each rank keeps its own rows
users, target = torch.randn(4, 16), torch.tensor([3, 14, 159, 265])
scores, ids, lse = catalog.topk(users, k=10)  # on every rank the same, bitwise those of one process
loss = catalog.cross_entropy(users, target)
```

## What holds
"""

HOLDS = [
    (
        "made from",
        "the whole table on every rank, a rank's own rows (any number, also none), a DTensor `Shard(0)`, a "
        "saved folder",
    ),
    (
        "`topk`",
        "local top-k, then a merge: ids are global, ties by the lower id, scores and ids bitwise those of "
        "one process; `lse` within 1e-5 (with a filter as in [the catalogue](catalog.md))",
    ),
    (
        "`cross_entropy`",
        "each rank's log-sum-exp merged; the table's gradient stays on its rank, the users' is summed in the "
        "order of ranks: two runs are bitwise equal. All options but negatives",
    ),
    (
        "`lookup`",
        "rows of global ids wherever they are, with gradient: history items, sampled negatives",
    ),
    (
        "`own_users=True`",
        "every rank brings users of its own (data parallel); without it all ranks have the same",
    ),
    (
        "`update`, `append`",
        "by global ids; new items go to the last rank, so that no id changes and no row moves, and "
        "`balance()` evens the ranks out",
    ),
    (
        "`save`, `load`",
        "`torch.distributed.checkpoint`, safetensors and no pickles; any number of ranks reads what any "
        "other wrote. A write that fails or is killed leaves the old checkpoint",
    ),
    ("memory", "no rank has the whole table, `[T, N]` or a row of it"),
    (
        "a lost rank",
        "a rank that is killed is an error on the others at once, one that hangs after the process group's "
        "timeout (`init_process_group(timeout=...)`; 5 minutes in the recommender's training)",
    ),
]

TRAINING = """    torchrun --nproc-per-node 2 -m attnrec.recommender -- train

trains the recommender's retrieval head so: embeddings, features, biases, their gradients and Adam's moments
are spread over the processes, the encoder is the same on all. The ranking head is the same on all as a whole,
and each takes its part of a batch's users. The run can be killed and goes on with `--resume`, on the same
number of processes to bitwise the same weights, or on another number. (The `--` is for torchrun, which would
take `--run` for one of its own options.)

A script of your own ends best with `attnrec.catalog.sharded_group.disconnect()`: a process whose interpreter
ends while gloo's threads still hold a tensor is aborted by PyTorch, and torchrun reports a failure.
"""

MEASURED = """## Measured here

`python -m benches.scale --measure`: float32, D = 64, k = 100, one thread a rank, all ranks on one machine,
which is {machine}.

*Clock* is the time from a barrier to the last rank's end. *Processor* is what the slowest rank's own thread
used, in which waiting does not count. This machine has {cores} cores: **4 ranks share them, so that their
clock cannot fall below that of {cores}**, and shows what merging and switching cost. That the work divides is
seen in the processor's time; what stays is each rank's own k candidates, and the merge. Nothing here crosses
a network. *Received* is what a rank's collectives brought, counted, and the same as the model's formula.
"""

PAPER = """## On paper: {items:,.0f} items on {hosts} hosts

**Not measured: a model, with its assumptions as arguments** (`python -m benches.scale --help`). D = {dim},
k = {k}. Each host brings {users} users to a call of `topk`, and {positions:,} positions and as many events to
a step of training (`own_users=True`). A message takes {latency:g} µs, and a collective one message for each
other host; storage writes {disk:g} GB/s a host; nothing overlaps. The hosts are nominal: rates that the
kernels would have to reach, and prices that are no one's quote.
"""

READING = """What it says:

- A call of few users is bound by reading the filter, one of many by its products. The network carries
  candidates, not rows: as much whatever N is.
- The full softmax over so many items is a matter of products, 8·T·N·D operations a step. On servers it is
  out of the question, and dear on accelerators. Sampled negatives (`lookup` their rows,
  `attnrec.catalog_cross_entropy` with `negatives=`) cost next to nothing beside it, and are bound by the
  network.
- Gathering is a ring, so that latency grows with the hosts; from a few hundred on it wants a tree, or two
  levels.
"""


def measured_tables(found: dict[str, Any]) -> list[str]:
    """One table an op: a line for each size, a pair of columns for each number of ranks."""
    lines: list[str] = []
    rows, ranks = found["rows"], sorted({row["ranks"] for row in found["rows"]})
    for op, of_rows in (("topk", "users"), ("cross_entropy", "positions")):
        names = {"topk": "`topk`", "cross_entropy": "`cross_entropy`, forward and backward"}
        header = ["N", of_rows, *(["filter"] if op == "topk" else [])]
        for count in ranks:
            header += [f"{count} rank{'s' * (count > 1)}: clock, ms", "processor, ms"]
        header += [f"received by each of {ranks[-1]}, KB"]
        body = []
        mine = [row for row in rows if row["op"] == op]
        sizes = [{key: row[key] for key in ("items", "rows", "filter") if key in row} for row in mine]
        for size in [x for i, x in enumerate(sizes) if x not in sizes[:i]]:
            line = [f"{size['items']:,}", f"{size['rows']:,}", *([size["filter"]] if op == "topk" else [])]
            for count in ranks:
                (row,) = (r for r in mine if r["ranks"] == count and size.items() <= r.items())
                line += [f"{1e3 * row['clock']:.1f}", f"{1e3 * row['processor']:.1f}"]
            body.append([*line, f"{row['received'] / 1e3:,.1f}"])
        lines += [f"### {names[op]}", "", *table(header, body)]
    return lines


def modelled_received(row: dict[str, Any]) -> int:
    """The formula's bytes for a measured row."""
    if row["op"] == "topk":
        return topk_received(row["ranks"], row["rows"], row["k"])
    return loss_received(row["ranks"], row["rows"], row["dim"])


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1e3 * seconds:,.2f} ms"


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def paper_tables(hosts: list[Host], assumed: Assumptions) -> list[str]:
    of_hosts: list[tuple[Host, Figures]] = [(host, figures(host, assumed)) for host in hosts]
    lines = table(
        ["assumed", *(host.name for host in hosts)],
        [
            ["memory", *(f"{host.memory:g} GB at {host.bandwidth:g} GB/s" for host in hosts)],
            ["products", *(f"{host.rate:g} TFLOP/s" for host in hosts)],
            ["network", *(f"{host.network:g} Gbit/s" for host in hosts)],
            ["price", *(f"${host.price:g} an hour" for host in hosts)],
        ],
    )

    def fits(count: float, host: Host) -> str:
        share = count / (host.memory * 1e9)
        return (
            f"{_bytes(count)}, {share:.0%} of its memory" if share <= 1 else f"{_bytes(count)}: **too much**"
        )

    lines += table(
        ["each host", *(host.name for host in hosts)],
        [
            ["serving: float32 rows and int8 filter", *(fits(f.serving, h) for h, f in of_hosts)],
            ["`topk`: reading the filter", *(_time(f.read) for _, f in of_hosts)],
            ["or the filter's products, if longer", *(_time(f.products) for _, f in of_hosts)],
            ["network: bytes", *(_time(f.topk_network) for _, f in of_hosts)],
            ["network: messages", *(_time(f.topk_latency) for _, f in of_hosts)],
            [f"**a call of {assumed.users * assumed.hosts:,} users**", *(_time(f.topk) for _, f in of_hosts)],
            ["users a second, all hosts", *(f"{f.users_per_second:,.0f}" for _, f in of_hosts)],
            ["a million users", *(f"${f.per_million:,.2f}" for _, f in of_hosts)],
            ["training: rows, gradient, two moments", *(fits(f.training, h) for h, f in of_hosts)],
            ["full softmax: products", *(_time(f.loss_products) for _, f in of_hosts)],
            ["network: bytes", *(_time(f.loss_network) for _, f in of_hosts)],
            ["network: messages", *(_time(f.loss_latency) for _, f in of_hosts)],
            [
                f"**a step of {assumed.positions * assumed.hosts:,} positions**",
                *(_time(f.step) for _, f in of_hosts),
            ],
            [f"the same with {assumed.negatives:,.0f} negatives", *(_time(f.sampled) for _, f in of_hosts)],
            ["checkpoint of rows and moments", *(_bytes(f.checkpoint) for _, f in of_hosts)],
            ["writing it", *(_time(f.checkpoint_time) for _, f in of_hosts)],
        ],
    )
    return lines


def page(found: dict[str, Any], hosts: list[Host], assumed: Assumptions) -> str:
    lines = [
        HEAD,
        *table(["", ""], HOLDS),
        TRAINING,
        MEASURED.format(machine=found["machine"], cores=found["cores"]),
        *measured_tables(found),
        PAPER.format(**vars(assumed)),
        *paper_tables(hosts, assumed),
        READING,
    ]
    return "\n".join(lines).rstrip()
