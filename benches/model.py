"""The performance model over attnrec's kernels and their peers, where there is no GPU to measure.

    python -m benches.model [--arch 80 90] [--json FILE] [--docs FILE]     the report
    python -m benches.model --explain target_attention._forward            pipe by pipe
    python -m benches.model --choose target_attention [--arch 80 90]       launch parameters into the tables

Everything is compiled ahead of time by `attnrec.kernels.aot`, peers by `benches/model_peers.py` under the same
stand-in driver, and goes through `benches.sassmodel`. Figures are costs in SM cycles for 1,000 scores (a score
is a row and an event), so smaller is better; they are modelled, not measured, and only compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from triton import CompilationError

from attnrec.kernels import MODULES, aot, launch, tune
from attnrec.kernels.aot_cases import OPS, Case
from attnrec.kernels.launch import Launch, forced, table
from attnrec.kernels.standin import Launched
from benches.sassmodel import analyse, load, notes, report
from benches.sassmodel.model import Analysis

# What a kernel's loop does: FLOP of a score and head dim in its matrix products, and which of the two sides a
# block holds while it runs over the other.
FORWARD, SCORES, BACKWARD_ROWS, BACKWARD_EVENTS = 4, 2, 6, 8


@dataclass(frozen=True)
class Work:
    table: str  # the name in the launch table
    flops: int
    stationary: str = "rows"


WORK = {
    "target_attention._forward": Work("target_attention", FORWARD),
    "target_attention_backward._rows": Work("target_attention_backward_rows", BACKWARD_ROWS),
    "target_attention_backward._events": Work("target_attention_backward_events", BACKWARD_EVENTS, "events"),
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
LAUNCH_US = 2.5  # [guess] a small kernel behind another one, in a CUDA graph
BANDWIDTH = {80: 2.0e12, 90: 3.35e12}  # bytes per second, data sheets of the A100 80 GB and the H100 SXM


@dataclass
class Modelled:
    """One compiled kernel on one chip."""

    kernel: str
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
    costs: dict[str, float] = field(default_factory=dict)  # of SHAPES
    notes: list[str] = field(default_factory=list)


def modelled(
    a: Analysis, kernel: str, dtype: str, head_dim: int, work: Work, tile: Launch, pack: int = 1
) -> Modelled:
    """Costs of a kernel whose block holds `tile.block_m` rows (or `block_n` events) and steps over the other
    side. `pack` heads of a candidate are rows of one tile."""
    native = launch.native_head_dim(head_dim)
    warps = a.kernel.threads // 32
    scores = a.flops / (work.flops * native)  # of a warp and iteration
    step = warps * scores  # of a block and iteration
    sm = 1000 / (4 * scores)  # from cycles of a sub-partition and warp to cycles of an SM for 1,000 scores
    held = tile.block_m if work.stationary == "rows" else tile.block_n
    width = step / held  # of the other side, that one iteration takes
    per_trip = a.cycles * warps / 4  # cycles of an SM for a block's iteration
    fixed = max(a.block_cycles(2) - 2 * per_trip, 0.0)

    def cost(candidates: int, events: int) -> float:
        rows = candidates * pack
        mine, other = (rows, events) if work.stationary == "rows" else (events, rows)
        # One iteration, of the masked tile, is in `fixed`.
        trips = max(other / width - 1, 0) if other < 1 << 20 else other / width
        return 1000 * math.ceil(mine / held) * (fixed + trips * per_trip) / (rows * events)

    low, high = a.order_range
    return Modelled(
        kernel=kernel,
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
        instructions=len(a.loop.path) * 32 / scores,
        share_of_ceiling=a.share_of_ceiling,
        ceiling=a.ceiling_pipe,
        costs={name: cost(*shape) for name, shape in SHAPES.items()},
        notes=notes(a),
    )


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
    return modelled(a, name, case["dtype"], case["head_dim"], WORK[name], tile, options.get("PACK", 1))


# --- ours ---------------------------------------------------------------------------------------------------


def plain_case(op: str, dtype: str, head_dim: int) -> Case:
    return {name: values[0] for name, values in OPS[op].axes.items()} | {"dtype": dtype, "head_dim": head_dim}


def ours(task: tuple[int, str, str, int]) -> list[Modelled]:
    """The kernels of an op without options."""
    arch, op, dtype, head_dim = task
    case = plain_case(op, dtype, head_dim)
    found = {}
    for launched in aot.launches(arch, op, case):
        if launched.metadata.hash not in found and (m := of_launch(launched, case)):
            found[launched.metadata.hash] = m
    return list(found.values())


# --- choosing launch parameters -----------------------------------------------------------------------------


def by_model(arch: int) -> Callable[..., tune.Measure]:
    """What `attnrec.kernels.tune` takes for a stopwatch: the geometric mean of the costs over CHOSEN_BY.

    The shapes of tcgen05's products are not in the instruction: sm_100 takes the H100's order.
    """
    arch = min(arch, 90)

    def measure_of(name: str, entry: dict[str, Any], head_dim: int) -> tune.Measure:
        case = next(iter(tune.cases_of(name, entry, head_dim)))
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


# --- the command --------------------------------------------------------------------------------------------


def collect(archs: list[int], ops: list[str], dtypes: list[str], head_dims: list[int], jobs: int):
    todo = [(arch, op, dtype, dim) for arch in archs for op in ops for dtype in dtypes for dim in head_dims]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(ours, todo):
            yield from found


def main(argv: list[str] | None = None) -> int:
    modelled_ops = [op for op in dict.fromkeys(tune.OP_OF.values()) if op in MODULES]
    parser = argparse.ArgumentParser("python -m benches.model", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=[80, 90, 100])
    parser.add_argument("--op", nargs="+", default=modelled_ops, choices=modelled_ops)
    parser.add_argument("--head-dim", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--explain", metavar="KERNEL", help="report this kernel pipe by pipe")
    parser.add_argument("--choose", metavar="NAME", help="decide this kernel's launch parameters")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args(argv)
    if arguments.choose:
        choose(arguments.choose, arguments.arch, arguments.head_dim)
        return 0
    dims = arguments.head_dim or list(launch.NATIVE_HEAD_DIMS)
    if arguments.explain:
        for arch in arguments.arch:
            for op in arguments.op:
                for launched in aot.launches(arch, op, plain_case(op, arguments.dtype[0], dims[0])):
                    if arguments.explain in aot.kernel_name(launched):
                        print(report(analysis_of(launched)))
        return 0
    rows = list(collect(arguments.arch, arguments.op, arguments.dtype, dims, arguments.jobs))
    for r in rows:
        costs = " ".join(f"{c:6.1f}" for c in r.costs.values())
        print(
            f"{r.kernel:36} sm_{r.arch} {r.dtype} D={r.head_dim:3} {r.launch!s:20} {r.registers:3} regs {r.blocks} blocks {r.pipe:6} {r.instructions:5.1f} instr/score {r.share_of_ceiling:4.0%} of {r.ceiling:6} | {costs}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
