"""The performance model over attnrec's kernels and their peers, where there is no GPU to measure.

    python -m benches.model [--arch 80 90] [--json FILE] [--docs FILE]     the report
    python -m benches.model --explain target_attention._forward            pipe by pipe
    python -m benches.model --choose target_attention [--arch 80 90]       launch parameters into the tables

Everything is compiled ahead of time by `attnrec.kernels.aot`, peers under the same stand-in driver by
`benches/model_peers.py`, and goes through `benches.sassmodel`. Figures are costs in SM cycles for 1,000
scores (a score is a row and an event): the smaller the better. They are modelled and only compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from attnrec.kernels import MODULES, aot, launch, tune
from attnrec.kernels.aot_cases import DTYPES, OPS, Case
from attnrec.kernels.launch import Launch, forced, table
from attnrec.kernels.standin import Launched
from triton import CompilationError

from benches import model_page, model_peers
from benches.sassmodel import CHIPS, DEFAULT, Analysis, analyse, load, notes, report

# FLOP of a score and head dim in the matrix products of a kernel's loop.
FORWARD, SCORES, BACKWARD_ROWS, BACKWARD_EVENTS = 4, 2, 6, 8


@dataclass(frozen=True)
class Work:
    """What a kernel does: its name in the launch table, FLOP of a score and head dim, which side a block
    holds while it runs over the other, and how many blocks do so for the same rows, each for a part of the
    values."""

    table: str
    flops: float
    stationary: str = "rows"
    parts: int = 1


WORK = {
    "target_attention._forward": Work("target_attention", FORWARD),
    "target_attention_backward._rows": Work("target_attention_backward_rows", BACKWARD_ROWS),
    "target_attention_backward_events.grad_events": Work(
        "target_attention_backward_events", BACKWARD_EVENTS, "events"
    ),
    "catalog_topk._scan": Work("catalog_topk", SCORES),
}
# Candidates of a user and events of its history; "loop" is a history without end.
SHAPES = {
    "20 x 50": (20, 50),
    "256 x 50": (256, 50),
    "256 x 200": (256, 200),
    "256 x 1024": (256, 1024),
    "1 x 1024": (1, 1024),
    "loop": (1 << 20, 1 << 20),
}
# With one candidate a call is bound by memory.
CHOSEN_BY = ("20 x 50", "256 x 50", "256 x 200", "256 x 1024", "loop")
CHUNK = 1024  # `target_attention`'s
ONE_CHUNK = f", no history above {CHUNK:,} events"
LAUNCH_US = 2.5  # [guess] a small kernel behind another one, in a CUDA graph
BANDWIDTH = {80: 2.0e12, 90: 3.35e12}  # bytes per second, data sheets of the A100 80 GB and the H100 SXM


@dataclass
class Modelled:
    """One compiled kernel on one chip."""

    kernel: str
    table: str  # its name in the launch table, or that of the kernel it is a peer of
    arch: int
    dtype: str
    head_dim: int
    launch: tuple[int, int, int, int]  # block_m, block_n, warps, stages
    registers: int
    shared_bytes: int
    blocks: int  # resident on an SM
    warps: int  # of a scheduler
    pipe: str  # that bounds the loop
    bound: float  # cycles of an SM for 1,000 scores with perfect overlap
    loop: float  # the same by the simulation
    order: tuple[float, float]  # by other orders of the warps: differences inside are noise
    instructions: float  # issued for a score, all lanes together divided by 32 lanes
    share_of_ceiling: float
    ceiling: str
    notes: list[str]
    # Side that a block holds, how many of it, how many of the other an iteration takes, heads in a tile; SM
    # cycles of a block outside its loop (the masked tile among them) and of an iteration.
    block: tuple[str, int, float, int, float, float]
    costs: dict[str, float] = field(default_factory=dict)  # of SHAPES

    def shape_cost(self, candidates: int, events: int) -> float:
        """SM cycles for 1,000 scores of users with so many candidates and events; rows of a tile that have
        no candidate cost as the others."""
        stationary, held, width, pack, fixed, per_trip = self.block
        rows = candidates * pack
        mine, other = (rows, events) if stationary == "rows" else (events, rows)
        trips = max(other / width - 1, 0)  # the masked tile is in `fixed`
        return 1000 * math.ceil(mine / held) * (fixed + trips * per_trip) / (rows * events)


def modelled(
    a: Analysis, kernel: str, dtype: str, head_dim: int, work: Work, tile: Launch, pack: int = 1
) -> Modelled:
    """Costs of a kernel whose block holds `tile.block_m` rows (or `block_n` events) and steps over the other
    side. `pack` heads of a candidate are rows of one tile."""
    native = launch.native_head_dim(head_dim)
    warps = a.kernel.threads // 32
    scores = a.flops / (work.flops * native)  # of a warp and iteration, which other parts have again
    step = warps * scores  # of a block and iteration
    # From cycles of a sub-partition and warp to cycles of an SM for 1,000 scores.
    sm = 1000 * work.parts / (4 * scores)
    held = tile.block_m if work.stationary == "rows" else tile.block_n
    width = step / held  # of the other side, that one iteration takes
    per_trip = a.cycles * warps / 4 * work.parts  # cycles of an SM for an iteration of the blocks of a tile
    fixed = max(a.block_cycles(2) * work.parts - 2 * per_trip, 0.0)

    low, high = a.order_range
    m = Modelled(
        kernel=kernel,
        table=work.table,
        arch=a.chip.sm,
        dtype=dtype,
        head_dim=head_dim,
        launch=tuple(tile),
        registers=a.kernel.regs,
        shared_bytes=a.kernel.smem,
        blocks=a.occupancy.blocks,
        warps=a.warps,
        pipe=a.bound_pipe,
        bound=a.bound * sm,
        loop=a.cycles * sm,
        order=(low * sm, high * sm),
        instructions=len(a.loop.path) * 32 * work.parts / scores,
        share_of_ceiling=a.share_of_ceiling,
        ceiling=a.ceiling_pipe,
        notes=notes(a),
        block=(work.stationary, held, width, pack, fixed, per_trip),
    )
    m.costs = {name: m.shape_cost(*shape) for name, shape in SHAPES.items()}
    return m


def analysis_of(launched: Launched) -> Analysis:
    """The model's view of what a launch had compiled."""
    meta = launched.metadata
    name = aot.kernel_name(launched)
    # Triton's cubins have no static shared memory: all of it is in the metadata.
    kernel = load(launched.file("cubin"), 32 * meta.num_warps, kernel=launched.name, source=name)
    kernel.smem = meta.shared
    return analyse(kernel)


def constants(launched: Launched) -> dict[str, Any]:
    names = launched.source.fn.arg_names
    return {names[path[0]]: x for path, x in launched.source.constants.items()}


def of_launch(launched: Launched, case: Case) -> Modelled | None:
    """The figures of one of attnrec's kernels; None for one that has no loop over tiles."""
    name = aot.kernel_name(launched)
    if name not in WORK:
        return None
    options, meta = constants(launched), launched.metadata
    tile = Launch(options["BLOCK_M"], options["BLOCK_N"], meta.num_warps, meta.num_stages)
    a = analysis_of(launched)
    label = name + ONE_CHUNK * (options.get("CHUNKS") == "one")
    return modelled(a, label, case["dtype"], case["head_dim"], WORK[name], tile, options.get("PACK", 1))


# --- ours ---------------------------------------------------------------------------------------------------


def plain_case(op: str, dtype: str, head_dim: int) -> Case:
    case = {name: values[0] for name, values in OPS[op].axes.items()}
    return case | usual(op) | {"dtype": dtype, "head_dim": head_dim}


def usual(op: str) -> Case:
    """What batches have where it is not an option: candidates enough for a chip, and more events than a chunk
    (a kernel that is ready for long histories serves them, whether there is one or not, unless the call says
    that there is none)."""
    histories = OPS[op].axes.get("history", ())
    return next(
        ({"history": history} for history in ("long, full", "short, full") if history in histories), {}
    )


def served(op: str, plain: Case) -> list[tuple[Case, list[str]]]:
    """Cases of an op, and the shapes that the kernel of each serves."""
    few = [shape for shape, (candidates, _) in SHAPES.items() if candidates <= launch.FEW_ROWS]
    many = [shape for shape in SHAPES if shape not in few]
    by_rows = [(plain | {"history": "short"}, few), (plain | {"history": "short, full"}, many)]
    if usual(op) == {"history": "long, full"}:
        short = [shape for shape, (_, events) in SHAPES.items() if events <= CHUNK]
        return [(plain, list(SHAPES)), *((case, [x for x in of if x in short]) for case, of in by_rows)]
    return by_rows if usual(op) else [(plain, list(SHAPES))]


def ours(task: tuple[int, str, str, int]) -> list[Modelled]:
    """The kernels of an op without options, with the costs of the shapes that each serves."""
    arch, op, dtype, head_dim = task
    found = {}
    for case, shapes in served(op, plain_case(op, dtype, head_dim)):
        for launched in aot.launches(arch, op, case):
            if m := of_launch(launched, case):
                known = found.setdefault(launched.metadata.hash, replace(m, costs={}))
                known.costs |= {shape: m.costs[shape] for shape in SHAPES if shape in {*known.costs, *shapes}}
    return list(found.values())


# --- choosing launch parameters -----------------------------------------------------------------------------


def by_model(arch: int) -> Callable[..., tune.Measure]:
    """What `attnrec.kernels.tune` takes for a stopwatch: the geometric mean of the costs over CHOSEN_BY.

    The shapes of tcgen05's products are not in the instruction: sm_100 takes the H100's order.
    """
    arch = min(arch, 90)

    def measure_of(name: str, entry: dict[str, Any], head_dim: int) -> tune.Measure:
        case = next(iter(tune.cases_of(name, entry, head_dim)))
        case |= {} if launch.SIZES & entry.keys() else usual(tune.OP_OF[name])
        kernels = {kernel for kernel, work in WORK.items() if work.table == name}

        def measure(launch: Launch) -> float | None:
            try:
                with forced(name, launch):
                    for launched in aot.launches(arch, tune.OP_OF[name], case):
                        if aot.kernel_name(launched) in kernels:
                            by_shape = of_launch(launched, case).costs
                            costs = [by_shape[shape] for shape in CHOSEN_BY]
                            return math.exp(sum(map(math.log, costs)) / len(costs))
            except (ValueError, CompilationError):  # does not fit on the chip, does not compile
                pass
            return None

        return measure

    return measure_of


def choose(name: str, archs: Iterable[int], head_dims: Iterable[int] | None) -> None:
    """Rewrites a kernel's half-precision entries in the tables of `archs`."""
    for arch in archs:
        kernels = dict(table(arch))
        kept, chosen = [], []
        for entry in kernels[name]:
            for head_dim in entry["head_dim"]:
                one = entry | {"head_dim": [head_dim]}
                skip = entry["dtype"] != "half" or (head_dims and head_dim not in head_dims)
                found = [one] if skip else tune.retuned(name, [one], by_model(arch), arch, "model")
                (kept if skip else chosen).extend(found)
                if not skip:
                    print(f"sm_{arch} {name}: {json.dumps(found[0])}", flush=True)
        kernels[name] = chosen + kept
        tune.write(arch, kernels)


# --- peers --------------------------------------------------------------------------------------------------


def peers(task: tuple[int, str, int]) -> list[Modelled]:
    """The kernels of every installed peer."""
    arch, dtype, head_dim = task
    found = []
    for peer in model_peers.PEERS:
        if not peer.installed():
            continue
        for launched in peer.launches(arch, DTYPES[dtype], head_dim):
            name, flops, rows, events = peer.kernels[launched.name]
            sizes, meta = constants(launched), launched.metadata
            tile = Launch(sizes[rows], sizes[events], meta.num_warps, meta.num_stages)
            work = Work(name, flops, peer.stationary.get(launched.name, "rows"))
            if launched.name in peer.parts:  # the product of scores is done again for each part of the values
                whole, of_block = (sizes[constant] for constant in peer.parts[launched.name])
                parts = launch.cdiv(launch.native_head_dim(whole), of_block)
                work = replace(work, flops=flops * (1 + 1 / parts) / 2, parts=parts)
            try:
                a = analysis_of(launched)
            except (
                ValueError
            ):  # a tile that the chip has no shared memory for: it does not serve this head dim
                continue
            found.append(modelled(a, f"{peer.name}: {launched.name}", dtype, head_dim, work, tile))
    return found


def ratios(mine: list[Modelled], theirs: list[Modelled]) -> list[tuple[Modelled, Modelled, dict[str, float]]]:
    """Peers' cost over ours for the shapes that both serve: above 1 ours is the faster."""
    found = []
    for peer in theirs:
        for m in mine:
            same = (peer.table, peer.arch, peer.dtype, peer.head_dim)
            if (m.table, m.arch, m.dtype, m.head_dim) == same:
                found.append((m, peer, {s: peer.costs[s] / cost for s, cost in m.costs.items()}))
    return found


# --- floors -------------------------------------------------------------------------------------------------


def floors(m: Modelled, users: int, candidates: int, events: int, heads: int = 4) -> dict[str, float]:
    """Microseconds of a forward call: by the model with a full chip, of its bytes, and of one launch."""
    chip = CHIPS[DEFAULT[m.arch]]
    fixed = m.shape_cost(candidates, events)
    compute = users * heads * candidates * events * fixed / 1000 / chip.sms / chip.mhz
    size = 4 if m.dtype in ("float32", "tf32") else 2
    bytes_ = users * heads * m.head_dim * size * 2 * (candidates + events)
    return {"compute": compute, "memory": 1e6 * bytes_ / BANDWIDTH[m.arch], "launch": LAUNCH_US}


# --- the command --------------------------------------------------------------------------------------------


def collect(
    archs: list[int], ops: list[str], dtypes: list[str], head_dims: list[int], jobs: int
) -> tuple[list[Modelled], list[Modelled]]:
    """Ours and the peers'."""
    mine = [(arch, op, dtype, dim) for arch in archs for op in ops for dtype in dtypes for dim in head_dims]
    theirs = [(arch, dtype, dim) for arch in archs for dtype in dtypes for dim in head_dims]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        peer_rows = pool.map(peers, theirs)
        return [m for found in pool.map(ours, mine) for m in found], [m for f in peer_rows for m in f]


def main(argv: list[str] | None = None) -> int:
    modelled_ops = [op for op in dict.fromkeys(tune.OP_OF.values()) if op in MODULES]
    parser = argparse.ArgumentParser("python -m benches.model", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=[80, 90, 100])
    parser.add_argument("--op", nargs="+", default=modelled_ops, choices=modelled_ops)
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(launch.NATIVE_HEAD_DIMS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "tf32"])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--docs", type=Path, help="write them as a page there")
    parser.add_argument("--explain", metavar="KERNEL", help="report this kernel pipe by pipe")
    parser.add_argument(
        "--choose", metavar="NAME", help="decide this kernel's half-precision launch parameters"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    arguments = parser.parse_args(argv)
    if arguments.choose:
        choose(arguments.choose, arguments.arch, arguments.head_dim)
        return 0
    if arguments.explain:
        for arch in arguments.arch:
            for op in arguments.op:
                case = plain_case(op, arguments.dtype[0], arguments.head_dim[0])
                for launched in aot.launches(arch, op, case):
                    if arguments.explain in aot.kernel_name(launched):
                        print(report(analysis_of(launched)))
        return 0
    mine, theirs = collect(arguments.arch, arguments.op, arguments.dtype, arguments.head_dim, arguments.jobs)
    page = model_page.page(mine, theirs, ratios(mine, theirs), SHAPES, floors)
    print(page)
    if arguments.docs:
        arguments.docs.write_text(page + "\n" + model_page.behind(arguments.docs))
    if arguments.json:
        rows = {"ours": [asdict(m) for m in mine], "peers": [asdict(m) for m in theirs]}
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
