"""Running decoded kernels: blocks, groups of lanes, divergence, barriers, schedules.

A Group is a set of warps that execute together: all warps of one or many blocks
(schedule "lockstep"), or one warp (schedule "random"). Its registers are numpy
arrays over lanes that are never changed in place: an instruction makes a new array.
A program counter is kept per lane; the group always runs the lanes with the lowest
one (after those about to exit), so that lanes that parted meet again. `mask` (None = every lane) says which
lanes execute.
"""

import itertools
from collections import Counter

import numpy as np

from .errors import Fault, PtxError
from .memory import BlockMemory
from .races import TAGS, GlobalRaces, SharedRaces

RESELECT = object()  # returned by an instruction that has set the lanes' pcs itself
FAR = 1 << 40
POISON = {
    np.dtype(bool): False,
    np.dtype(np.uint16): 0xFFBD,
    np.dtype(np.uint32): 0xFFFFBAAD,
    np.dtype(np.uint64): 0xFFFFFFFFFFFFBAAD,
}


class BlockSet:
    """The blocks that run at the same time, their shared memory and their barriers."""

    def __init__(self, launch, block_ids):
        self.launch = launch
        self.block_ids = block_ids  # linear block numbers
        n = len(block_ids)
        self.shared = BlockMemory("shared", n, launch.shared_bytes, track=True)
        self.races = SharedRaces(n, self.shared.stride) if launch.races and launch.threads > 32 else None
        self.groups = []
        self.live = np.zeros(n, np.int64)  # threads that have not exited, per block
        self.arrived = {}  # barrier -> threads waiting, per block
        self.expected = {}  # barrier -> explicit count (0: all live threads)
        self.ones = {}  # barrier -> true predicates of bar.red so far
        self.result = {}  # barrier -> (threads, true predicates) of the last one

    def arrive(self, barrier, blocks, count, predicate=None):
        n = len(self.live)
        if barrier not in self.arrived:
            for table in (self.arrived, self.expected, self.ones):
                table[barrier] = np.zeros(n, np.int64)
            self.result[barrier] = (np.zeros(n, np.int64), np.zeros(n, np.int64))
        self.arrived[barrier] += np.bincount(blocks, minlength=n)
        self.expected[barrier][blocks] = count
        if predicate is not None:
            self.ones[barrier] += np.bincount(blocks[predicate], minlength=n)
        self.try_release(barrier)

    def try_release(self, barrier):
        arrived, expected = self.arrived[barrier], self.expected[barrier]
        done = (arrived > 0) & (arrived >= np.where(expected > 0, expected, self.live))
        if not done.any():
            return
        threads, ones = self.result[barrier]
        threads[done], ones[done] = arrived[done], self.ones[barrier][done]
        arrived[done] = self.ones[barrier][done] = self.expected[barrier][done] = 0
        if self.races:
            self.races.barrier(done)
        for g in self.groups:
            g.release(barrier, done)

    def exited(self, blocks):
        self.live -= np.bincount(blocks, minlength=len(self.live))
        for barrier in self.arrived:
            self.try_release(barrier)


class Group:
    def __init__(self, blockset, block, thread):
        """block: index in the block set, thread: linear thread number; one entry per lane."""
        launch = blockset.launch
        self.set, self.launch, self.memory = blockset, launch, launch.memory
        self.shared, self.races = blockset.shared, blockset.races
        self.global_races = launch.global_races
        self.stats, self.counts = launch.stats, launch.counts
        self.block, self.thread = block, thread
        self.home = np.arange(len(block))  # region of each lane in local memory
        self.local = BlockMemory("local", len(block), launch.kernel.local_bytes, track=False)
        self.alive = thread < launch.threads
        blockset.live += np.bincount(block[self.alive], minlength=len(blockset.live))
        self._resize()
        poison = {t: np.full(self.L, v, t) for t, v in POISON.items()}
        self.r = [poison[t] for t in launch.kernel.register_types]
        self.pc = np.zeros(self.L, np.int64)
        self.bar = np.full(self.L, -1)  # barrier a lane waits at
        self.held = np.zeros(self.L, bool)  # waits for its warp at a warp-wide instruction
        self.retry = False
        self.mask, self.count, self.at, self.ticks = None, self.L, 0, 0
        self.copies = []  # outstanding cp.async (see isa_memory)
        self.commits = np.zeros(self.L, np.int64)
        self.fault_mask = None
        blockset.groups.append(self)

    def _resize(self):
        self.L, self.W = len(self.block), len(self.block) // 32
        self.warp = (self.thread // 32 + 1).astype(np.uint8)  # tags for the race checks
        self.block_tag = (self.set.block_ids[self.block] % TAGS + 1).astype(np.uint8)
        self.cache = {}  # special registers, constant arrays

    # ------------------------------------------------------------ used by instructions

    def full(self, x):
        """x over all lanes (an immediate is an array of length 1)."""
        return x if x.shape[0] == self.L else np.repeat(x, self.L)

    def lanes(self, m):
        """Boolean array of the lanes selected by a mask."""
        if m is not None:
            return m
        if "all" not in self.cache:
            self.cache["all"] = np.ones(self.L, bool)
        return self.cache["all"]

    def set_pc(self, pc):
        """Give every lane that is executing this pc."""
        if self.mask is None:
            self.pc[:] = pc
        else:
            self.pc[self.mask] = pc

    def converge(self, m, member=None):
        """For a warp-wide instruction: the lanes that may execute it now. A warp whose members
        (bits of `member`, or all 32) are not all here is held back until they come."""
        if m is None and (member is None or (member == 0xFFFFFFFF).all()):
            return None
        here = self.lanes(m).reshape(-1, 32)
        need = self.alive.reshape(-1, 32)
        if member is not None:
            bits = self.member_bits(member)  # [warp, lane, other]
            if (here & ~bits[:, np.arange(32), np.arange(32)]).any():
                lane = int(np.argmax(here & ~bits[:, np.arange(32), np.arange(32)]))
                raise Fault("lane not in its own membermask", lane)
            need = need & (bits & here[:, :, None]).any(1)
        waits = here & (need & ~here).any(1)[:, None]
        if not waits.any():
            return m
        self.held |= waits.ravel()
        return (here & ~waits).ravel()

    def member_bits(self, member):
        return (
            (self.full(member).reshape(-1, 32, 1) >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
        ).astype(bool)

    def release(self, barrier, done):
        free = (self.bar == barrier) & done[self.block]
        self.bar[free] = -1
        self.retry = True

    def exit(self, m):
        gone = self.lanes(m) & self.alive
        self.alive = self.alive & ~gone
        self.retry = True
        self.set.exited(self.block[gone])

    # ------------------------------------------------------------ the run loop

    def runnable(self):
        return bool((self.alive & (self.bar < 0)).any())

    def _compact(self):
        """Drop the lanes of blocks that have ended, when they are half of the group."""
        alive_blocks = np.zeros(len(self.set.live), bool)
        alive_blocks[self.block[self.alive]] = True
        keep = alive_blocks[self.block]
        if 2 * int(keep.sum()) > self.L:
            return
        where = np.flatnonzero(keep)
        for name in ("block", "thread", "home", "alive", "pc", "bar", "held", "commits"):
            setattr(self, name, getattr(self, name)[where])
        new, position = {}, np.cumsum(keep) - 1
        for i, x in enumerate(self.r):  # registers may share one array
            if id(x) not in new:
                new[id(x)] = (x, x[where])
            self.r[i] = new[id(x)][1]
        self.copies = [c.keep(keep[c.lanes]) for c in self.copies]
        for c in self.copies:
            c.lanes = position[c.lanes]
        self._resize()

    def _select(self):
        """Choose the lanes to run; returns their pc, or None when none can run."""
        if self.L > 128 and not self.alive.all() and self.alive.any():
            self._compact()
        live = self.alive & (self.bar < 0)
        ready = live & ~self.held
        if not ready.any():
            if not (live.any() and self.retry):
                return None
            self.held[:] = False  # lanes exited or were released: try again
            ready = live
        self.retry = False
        ending = ready & self.launch.kernel.is_exit[self.pc]
        if ending.any():  # let those go first: their blocks may be done
            ready = ending
        pc = int(self.pc[ready].min())
        mask = live & (self.pc == pc)
        others = self.pc[live & ~mask]
        above = others[others > pc]
        self.limit = int(above.min()) if above.size else FAR
        self.alone = others.size == 0
        self.held &= ~mask
        self.count = int(mask.sum())
        self.mask = None if self.count == self.L else mask
        return pc

    def run(self):
        """Run until no lane can."""
        code, counts = self.launch.kernel.code, self.counts
        try:
            while (pc := self._select()) is not None:
                self.launch.step(self.ticks)
                mask, count, limit, alone = self.mask, self.count, self.limit, self.alone
                while True:
                    self.at = pc
                    counts[pc] += count
                    self.ticks += 1
                    goto = code[pc](self, mask)
                    if goto is None:
                        pc += 1
                        if pc == limit:
                            self.set_pc(pc)
                            break
                    elif goto is RESELECT:
                        break
                    else:
                        pc = goto
                        self.launch.step(self.ticks)
                        if not alone:
                            self.set_pc(pc)
                            break
        except Fault as fault:
            raise self._located(fault) from fault

    def _located(self, fault):
        where = dict(fault.where)
        if fault.lane is not None:
            lane = fault.lane if self.fault_mask is None else int(np.flatnonzero(self.fault_mask)[fault.lane])
            where.update(self.position(lane))
        ins = self.launch.kernel.source[self.at]
        return PtxError(fault.kind, kernel=self.launch.kernel.name, line=ins.line, text=ins.text, **where)

    def position(self, lane):
        launch = self.launch
        bx, by, _ = launch.block
        t, b = int(self.thread[lane]), int(self.set.block_ids[self.block[lane]])
        gx, gy, _ = launch.grid
        return {
            "block": (b % gx, b // gx % gy, b // gx // gy),
            "thread": (t % bx, t // bx % by, t // bx // by),
        }


class Launch:
    """One kernel launch."""

    def __init__(
        self,
        kernel,
        memory,
        grid,
        block,
        params,
        dynamic_shared=0,
        schedule="lockstep",
        seed=0,
        max_lanes=8192,
        max_steps=30_000_000,
        memory_stats=True,
        races=True,
        blocks=None,
    ):
        self.kernel, self.memory = kernel, memory
        self.grid, self.block = three(grid), three(block)
        self.threads = int(np.prod(self.block))
        self.params = np.frombuffer(bytes(params) + b"\0" * 16, np.uint8)
        self.shared_bytes = kernel.shared_bytes + dynamic_shared
        self.schedule, self.seed, self.max_steps = schedule, seed, max_steps
        self.max_lanes, self.races = max_lanes, races
        self.global_races = GlobalRaces() if races else None
        self.blocks = np.arange(np.prod(self.grid)) if blocks is None else blocks
        self.stats = Counter() if memory_stats else None
        self.counts = [0] * len(kernel.code)
        if not 0 < self.threads <= 1024 or min(self.grid) < 0:
            raise PtxError("bad launch", kernel=kernel.name, detail=f"grid {self.grid}, block {self.block}")
        if self.shared_bytes > 163 * 1024:
            raise PtxError(
                "bad launch",
                kernel=kernel.name,
                detail=f"{self.shared_bytes} bytes of shared memory (sm_80 has at most 166912 for a block)",
            )
        kernel.check_block(self.block)

    def step(self, ticks):
        if ticks > self.max_steps:
            raise Fault(
                "step limit", detail=f"{ticks} instructions executed: an endless loop, or raise max_steps"
            )

    def run(self):
        blocks = self.blocks
        rng = np.random.default_rng(self.seed)
        lanes = (self.threads + 31) // 32 * 32  # lanes per block
        with np.errstate(all="ignore"):
            if self.schedule == "random":
                for b in rng.permutation(blocks):
                    self._run_random(np.array([b]), lanes, rng)
            elif self.schedule == "lockstep":
                per = max(1, self.max_lanes // lanes)
                for i in range(0, len(blocks), per):
                    self._run_lockstep(blocks[i : i + per], lanes)
            else:
                raise ValueError(f"schedule is 'lockstep' or 'random', not {self.schedule!r}")
        return Stats(self)

    def _run_lockstep(self, blocks, lanes):
        s = BlockSet(self, blocks)
        g = Group(s, np.repeat(np.arange(len(blocks)), lanes), np.tile(np.arange(lanes), len(blocks)))
        g.run()
        if g.alive.any():
            raise self._deadlock(s)

    def _run_random(self, blocks, lanes, rng):
        s = BlockSet(self, blocks)
        for w in range(0, lanes, 32):
            Group(s, np.zeros(32, np.int64), np.arange(w, w + 32))
        groups, stuck = s.groups, set()  # stuck: got nowhere since another group last moved
        while groups:
            ready = [g for g in groups if g.runnable() and g not in stuck]
            if not ready:
                raise self._deadlock(s)
            g = ready[rng.integers(len(ready))]
            before = g.ticks
            g.run()
            if g.ticks > before:
                stuck.clear()
            else:
                stuck.add(g)
            groups = [g for g in groups if g.alive.any()]

    def _deadlock(self, s):
        waiting = []
        for g in s.groups:
            for lane in np.flatnonzero(g.alive):
                what = f"barrier {g.bar[lane]}" if g.bar[lane] >= 0 else "the other lanes of its warp"
                at = int(g.pc[lane]) - (g.bar[lane] >= 0)
                waiting.append((what, at, g.position(lane)))
        what, at, where = waiting[0]
        ins = self.kernel.source[at]
        summary = Counter((w, self.kernel.source[a].line) for w, a, _ in waiting)
        detail = "; ".join(f"{n} threads wait for {w} at line {line}" for (w, line), n in summary.items())
        return PtxError(
            "deadlock", kernel=self.kernel.name, line=ins.line, text=ins.text, detail=detail, **where
        )


class Stats:
    """What a launch did. `opcodes`: thread-instructions by full opcode; `classes`: counts of mma by shape,
    a warp each, and of barriers, ex2, fma ..., a thread each; `memory`: bytes, 32-byte sectors, bank
    conflicts; `lines`: of the PTX, those that ran; `written`: {buffer: bool per byte}."""

    def __init__(self, launch):
        self.opcodes = Counter()
        for ins, n in zip(launch.kernel.source, launch.counts, strict=True):
            if n:
                self.opcodes[".".join([ins.op, *ins.mods])] += n
        self.memory = Counter(launch.stats or {})
        self.classes = Counter()
        for name, n in self.opcodes.items():
            parts = name.split(".")
            if parts[0] == "mma":
                shape = next(p for p in parts if p.startswith("m") and "n" in p and "k" in p)
                self.classes[f"mma {shape} {parts[-3]}"] += n // 32
            elif parts[0] in ("bar", "barrier") and "warp" not in parts:
                self.classes["barrier (threads)"] += n
            elif parts[0] in ("ex2", "fma", "shfl", "ldmatrix", "div", "rcp", "lg2"):
                self.classes[parts[0]] += n
        self.instructions = sum(self.opcodes.values())
        self.lines = {ins.line for ins, n in zip(launch.kernel.source, launch.counts, strict=True) if n}
        self.written = launch.global_races.written() if launch.global_races else {}

    def __getitem__(self, name):
        return self.classes.get(name, self.memory.get(name, 0))

    def __str__(self):
        rows = itertools.chain(
            [("thread instructions", self.instructions)],
            sorted(self.classes.items()),
            sorted(self.memory.items()),
        )
        return "\n".join(f"{n:>14,}  {name}" for name, n in rows)


def three(x):
    x = (x,) if isinstance(x, (int, np.integer)) else tuple(x)
    return tuple(int(v) for v in x) + (1,) * (3 - len(x))
