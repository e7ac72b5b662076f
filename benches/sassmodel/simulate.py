"""The resident warps of one SM sub-partition, instruction by instruction.

In-order issue, one instruction a clock, ptxas' stall counts and scoreboards, pipes, barriers, asynchronous
copies, groups of wgmma.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .chips import BARRIER, LATENCY, QUEUE, Chip, latency, uses
from .sass import Instr

_QUEUED = ("xu", "smem", "l2")
_NEVER = float("inf")


@dataclass
class Run:
    """`cycles` for one iteration of all warps, each pipe's `busy` share, and for how long a warp waited in an
    iteration, by reason."""

    cycles: float
    busy: dict[str, float]
    waits: dict[str, float]


class _Step:
    """An instruction prepared for the simulation."""

    def __init__(self, i: Instr, chip: Chip):
        self.stall, self.wbar, self.rbar = max(i.stall, 1), i.wbar, i.rbar
        self.waits = [b for b in range(6) if i.wait >> b & 1]
        self.uses = list(uses(i, chip).items())
        self.latency, self.read_latency = latency(i)
        self.copy = i.op == "LDGSTS"
        self.commit = i.op == "LDGDEPBAR"
        self.barrier = i.op == "BAR" and "ARV" not in i.mods
        self.gmma = i.op.endswith("GMMA")
        self.gmma_commit = self.gmma and "gsb0" in i.args
        self.copies_wait = self.gmma_wait = None
        if i.op == "DEPBAR" and "LE" in i.mods:
            scoreboard, n = i.args.replace("SB", "").split(",")[:2]
            self.copies_wait = (int(scoreboard), int(n, 16))
        if i.op == "WARPGROUP" and "DEPBAR" in i.mods:
            self.gmma_wait = int(i.args.split(",")[1], 16)


class _Warp:
    def __init__(self, age: int, block: int, start: float):
        self.age, self.block, self.ready, self.pc, self.done = age, block, start, 0, 0
        self.scoreboards: list[list[float]] = [[] for _ in range(6)]
        self.copies, self.gmma, self.groups, self.barriers, self.last = 0.0, 0.0, [], 0, -1.0
        self.arrived = self.resume = 0.0

    def earliest(self, s: _Step, free: Counter) -> tuple[float, str]:
        """When the warp can issue its next step, and what it waits for until then."""
        t, reason = self.ready, "stall"
        for b in s.waits:
            if self.scoreboards[b] and (m := max(self.scoreboards[b])) > t:
                t, reason = m, "scoreboard"
        if s.copies_wait and len(self.scoreboards[s.copies_wait[0]]) > s.copies_wait[1]:
            pending = sorted(self.scoreboards[s.copies_wait[0]])
            if (m := pending[len(pending) - 1 - s.copies_wait[1]]) > t:
                t, reason = m, "copies"
        if (
            s.gmma_wait is not None
            and len(self.groups) > s.gmma_wait
            and (m := self.groups[len(self.groups) - 1 - s.gmma_wait]) > t
        ):
            t, reason = m, "wgmma"
        for pipe, cost in s.uses:
            slack = QUEUE[pipe] * cost if pipe in _QUEUED else QUEUE["tensor_async"] * cost if s.gmma else 0
            if (m := free[pipe] - slack) > t:
                t, reason = m, "pipe " + pipe
        return t, reason

    def issue(self, s: _Step, now: float, free: Counter, busy: Counter) -> None:
        """Takes the step's pipes from `now` on and sets what later steps wait for."""
        start, end = now, now
        for pipe, cost in s.uses:
            begin = max(now, free[pipe])
            free[pipe] = begin + cost
            busy[pipe] += cost
            start, end = max(start, begin), max(end, begin + cost)
        self.last, self.ready = now, now + s.stall
        for b in range(6):
            if self.scoreboards[b]:
                self.scoreboards[b] = [x for x in self.scoreboards[b] if x > now]
        if s.copy:
            self.copies = max(self.copies, end + s.latency)
        if s.gmma:
            self.gmma = end + LATENCY["tensor"]
            if s.gmma_commit:
                self.groups = [g for g in self.groups if g > now] + [self.gmma]
        if s.wbar != 7:
            done = max(self.copies, now + 1) if s.commit else max(end, start + s.latency)
            self.scoreboards[s.wbar].append(done)
        if s.rbar != 7:
            self.scoreboards[s.rbar].append(start + s.read_latency)


def simulate(
    path: Sequence[Instr],
    chip: Chip,
    warps: int,
    blocks: int = 1,
    iterations: int = 12,
    skew: float | None = None,
    oldest: bool = True,
) -> Run:
    """`warps` warps of `blocks` blocks run `path` again and again.

    Of the warps that can issue first the oldest goes (so that the result does not depend on how the blocks
    start), or else the one that issued least recently. The blocks start `skew` cycles apart, by default
    spread over an iteration. The first third of the iterations is not counted.
    """
    steps = [_Step(i, chip) for i in path]
    per_block = max(1, warps // blocks)
    skew = sum(s.stall for s in steps) / blocks if skew is None else skew
    alive = [_Warp(n, n // per_block, n // per_block * skew) for n in range(warps)]
    size = Counter(w.block for w in alive)
    free, busy, waits, arrived = Counter(), Counter(), Counter(), Counter()
    clock, issued, started, done = 0.0, 0, None, 0
    while done < warps * iterations:
        if started is None and done >= warps * (iterations // 3):
            started, issued = clock, 0
            busy.clear()
            waits.clear()
        best = None
        for w in alive:
            if w.ready == _NEVER:
                continue
            t, reason = w.earliest(steps[w.pc], free)
            key = (max(t, clock), w.age if oldest else w.last)
            if best is None or key < best[0]:
                best = (key, w, t, reason)
        (now, _), w, t, reason = best
        s = steps[w.pc]
        if now > w.ready:
            waits[reason if t >= clock else "issue"] += now - w.ready
        clock = now + 1
        issued += 1
        w.issue(s, now, free, busy)
        if s.barrier:
            w.barriers += 1
            arrived[w.block, w.barriers] += 1
            w.arrived, w.resume, w.ready = now, w.ready, _NEVER
            if arrived[w.block, w.barriers] == size[w.block]:
                for o in alive:
                    if o.block == w.block:
                        o.ready = max(o.resume, now + BARRIER)
                        waits["barrier"] += o.ready - o.arrived - 1
        w.pc += 1
        if w.pc == len(steps):
            w.pc = 0
            w.done += 1
            done += 1
    rounds = issued / len(steps)  # iterations of a warp inside the window
    return Run(
        cycles=(clock - started) * warps / rounds,
        busy={p: b / (clock - started) for p, b in busy.items()},
        waits={reason: v / rounds for reason, v in waits.most_common() if v > 0},
    )
