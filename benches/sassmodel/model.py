"""What bounds a kernel's loop, how long an iteration takes, and how long a whole block.

Three numbers for the loop, from the most to the least optimistic, all for one SM sub-partition:

  bound    the busiest pipe, or the issue slots: perfect overlap of everything
  model    a simulation of the resident warps
  serial   one warp alone: the same simulation with a single warp
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .chips import CHIPS, DEFAULT, Chip, Occupancy, mma_flops, occupancy, uses
from .sass import Instr, Kernel, Loop, loops
from .simulate import Run, simulate


def tensor_work(path: list[Instr]) -> int:
    """FLOP that a warp's tensor instructions do on a path; 1 for tcgen05, whose shape is not in the
    instruction."""
    return sum(
        mma_flops(i)[0] or (i.op.startswith("UTC") and i.op.endswith("MMA")) for i in path if not i.never
    )


def tensor_loops(kernel: Kernel) -> list[Loop]:
    """The innermost loops with tensor work, in the order of the code."""
    found = [l for l in loops(kernel.code) if len(l.path) > 1 and tensor_work(l.path)]
    inner = [l for l in found if not any(o is not l and o.body < l.body for o in found)]
    return sorted(inner, key=lambda l: l.header)


def hot_loop(kernel: Kernel) -> Loop:
    """The loop that runs most. Of those with the most tensor work the shortest: a masked twin is longer.
    Without tensor work the longest innermost loop."""
    if hot := tensor_loops(kernel):
        return max(hot, key=lambda l: (tensor_work(l.path), -len(l.path), -l.header))
    found = [l for l in loops(kernel.code) if len(l.path) > 1]
    inner = [l for l in found if not any(o is not l and o.body < l.body for o in found)]
    if not inner:
        raise ValueError(f"{kernel.name}: no loop found")
    return max(inner, key=lambda l: len(l.path))


def life(kernel: Kernel, loop: Loop, trips: int) -> list[Instr]:
    """The instructions of a warp from start to exit with `trips` iterations of `loop`.

    Guards fall through and other loops run once, so that a masked last tile is counted. Two exceptions behind
    the loop: a branch is taken to be taken that jumps over two loops with tensor work, as it guards a second
    run over everything, which is for rare input, or over a loop with exponentials and no tensor work, as that
    merges the softmaxes of a history of several chunks.
    """
    code, at = kernel.code, {i.addr: n for n, i in enumerate(kernel.code)}
    headers = [l.header for l in tensor_loops(kernel)]
    merges = [
        l.header
        for l in loops(code)
        if not tensor_work(l.path) and any(i.op == "MUFU" and "EX2" in i.mods for i in l.path)
    ]

    def rare(first: int, end: int) -> bool:
        return sum(first < h < end for h in headers) >= 2 or any(first < h < end for h in merges)

    path, n, seen = [], 0, set()
    while n < len(code) and n not in seen:
        seen.add(n)
        if n == loop.header:
            path += loop.path * trips
            n = loop.latch + 1
            continue
        i = code[n]
        path.append(i)
        if i.op == "EXIT" and not i.conditional and not i.never:
            break
        target = at.get(i.target, -1) if i.op == "BRA" and not i.never else -1
        taken = target > n and (not i.conditional or (n > loop.latch and rare(n, target)))
        n = target if taken else n + 1
    return path


@dataclass
class Analysis:
    """What the model says about one loop of a kernel on a chip."""

    kernel: Kernel
    chip: Chip
    loop: Loop
    occupancy: Occupancy
    warps: int  # a scheduler
    blocks: int  # that these warps belong to
    pipes: dict[str, float]  # cycles of a warp and iteration, the busiest first
    top: dict[str, int]  # the most frequent instructions of an iteration
    flops: int  # tensor FLOP of a warp and iteration
    run: Run
    alone: Run

    @property
    def bound_pipe(self) -> str:
        return next(iter(self.pipes))

    @property
    def bound(self) -> float:
        """Cycles of a warp and iteration with perfect overlap."""
        return self.pipes[self.bound_pipe]

    @property
    def cycles(self) -> float:
        """Cycles of the sub-partition for one warp's iteration."""
        return self.run.cycles / self.warps

    @property
    def warps_needed(self) -> float:
        """So many warps a scheduler would hide all latency."""
        return self.alone.cycles / self.bound

    @cached_property
    def order_range(self) -> tuple[float, float]:
        """`cycles` for other orders of the warps: differences inside it are noise."""
        if self.warps == 1:
            return self.cycles, self.cycles
        path = self.loop.path
        others = [
            simulate(path, self.chip, self.warps, self.blocks, skew=skew, oldest=False).cycles / self.warps
            for skew in (0, None)
        ]
        return min(self.cycles, *others), max(self.cycles, *others)

    @property
    def ceiling_pipe(self) -> str:
        """The pipe that must be busy whatever the code: the tensor core, or the special-function unit."""
        return "xu" if self.pipes.get("xu", 0) > self._tensor else "tensor"

    @property
    def share_of_ceiling(self) -> float:
        return max(self._tensor, self.pipes.get("xu", 0)) / self.cycles

    @property
    def share_of_peak(self) -> float:
        return self._tensor / self.cycles

    @property
    def tflops(self) -> float:
        """For comparing only: the model's absolute figures are 0-30 % too high."""
        return self.share_of_peak * self.chip.peak_tflops

    @property
    def _tensor(self) -> float:
        """Cycles of the tensor core at its peak (wgmma's on an H100)."""
        return self.flops / (self.chip.peak / 4)

    def block_cycles(self, trips: int) -> float:
        """Cycles in which an SM gets through one block with `trips` iterations, with its neighbours'
        latencies overlapped: a block's whole life, simulated with all resident ones."""
        path = life(self.kernel, self.loop, trips)
        run = simulate(path, self.chip, self.warps, self.blocks, iterations=4)
        return run.cycles / self.occupancy.blocks


def analyse(kernel: Kernel, chip: str | None = None, loop: Loop | None = None) -> Analysis:
    """Counts and simulates a kernel's hot loop, or `loop`; `chip` is its architecture's unless named.

    ValueError where there is no loop, or a block does not fit on the chip.
    """
    on = CHIPS[chip or DEFAULT[kernel.sm]]
    loop = loop or hot_loop(kernel)
    resident = occupancy(on, kernel.threads, kernel.regs, kernel.smem)
    if not resident.blocks:
        raise ValueError(f"{kernel.name}: a block does not fit on {on.name} ({kernel.smem} bytes shared)")
    warps = max(1, -(-resident.warps // 4))
    blocks = max(1, min(resident.blocks, warps))
    pipes, names = Counter(issue=len(loop.path)), Counter()
    for i in loop.path:
        pipes.update(uses(i, on))
        names[i.name if i.op in ("MUFU", "HMMA", "HGMMA") else i.op] += 1
    return Analysis(
        kernel=kernel,
        chip=on,
        loop=loop,
        occupancy=resident,
        warps=warps,
        blocks=blocks,
        pipes=dict(pipes.most_common()),
        top=dict(names.most_common(12)),
        flops=tensor_work(loop.path),
        run=simulate(loop.path, on, warps, blocks),
        alone=simulate(loop.path, on, 1, iterations=6),
    )


def notes(a: Analysis) -> list[str]:
    """What makes the figures of an analysis doubtful."""
    found, live = [], [i for i in a.loop.path if not i.never]
    if spills := sum(i.op in ("LDL", "STL") for i in live):
        found.append(f"{spills} spill loads or stores in the loop")
    if len(a.loop.path) > 768:
        found.append(f"{len(a.loop.path) / 64:.0f} KB of code in the loop: fetching it is not modelled")
    if any(i.op.startswith(("UTC", "UTMA")) for i in live):
        found.append("TMA or tcgen05: bytes and FLOP are not in the instruction, and are left out")
    if any(i.op == "SYNCS" for i in live):
        found.append("mbarriers: every warp is taken to run this loop")
    if unknown := {i.op for i in live if "unknown" in uses(i, a.chip)}:
        found.append("unknown opcodes: " + ", ".join(sorted(unknown)))
    return found


def report(a: Analysis) -> str:
    """An analysis as text."""
    k, o, path = a.kernel, a.occupancy, a.loop.path
    low, high = a.order_range
    lines = [
        f"{k.source} on {a.chip.name}: {k.threads} threads, {k.regs} registers, {k.smem} bytes shared",
        f"  resident   {o.blocks} blocks = {o.warps} warps an SM ({a.warps} a scheduler), by {o.limit}",
        f"  loop       {path[0].addr:#x}..{path[-1].addr:#x}, {len(path)} instructions",
        "  pipe        cycles   of bound   busy in the model",
        *(
            f"    {p:9} {c:7.1f} {c / a.bound:9.0%} {c / a.cycles:11.0%}"
            for p, c in list(a.pipes.items())[:8]
        ),
        f"  bound      {a.bound_pipe}, {a.bound:.0f} cycles a warp and iteration",
        f"  model      {a.cycles:.0f} cycles ({low:.0f} to {high:.0f} by the warps' order); a warp waits for "
        + ", ".join(f"{r} {v:.0f}" for r, v in list(a.run.waits.items())[:5]),
        f"  serial     {a.alone.cycles:.0f} cycles; {a.warps_needed:.1f} warps a scheduler would hide it",
        "  most often " + ", ".join(f"{op} {n}" for op, n in a.top.items()),
    ]
    if a.flops:
        lines.append(
            f"  share      {a.share_of_peak:.0%} of the tensor peak, {a.share_of_ceiling:.0%} of the "
            f"{a.ceiling_pipe} ceiling"
        )
    return "\n".join([*lines, *(f"  note       {note}" for note in notes(a))])
