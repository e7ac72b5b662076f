"""The project's Triton kernels on the emulator, for the contract suite.

Every launch that the project's host code makes is executed as compiled for sm_80, with everything checked
(addresses, unwritten shared memory, races in a block and between blocks), and then again with the warps of
its blocks run apart in a random order: what was written must be the same bits.
"""

import contextlib
import itertools
import os

import numpy as np

from .errors import PtxError

# Warps run one at a time cost several times more than together. So of a launch that executes more than this
# many warp instructions only some blocks, drawn at random, are run again; 0: none ever.
MOST = int(os.environ.get("PTXEMU_RANDOM_INSTRUCTIONS", "20000"))

# Off where input that breaks the rules makes blocks meet: then nothing is compared either.
races = True

# Instructions that a block may execute, against endless loops.
max_steps = 30_000_000

# For tests of the tests (mutate.py): `edit(name, ptx)` gives the PTX to run in place of what was compiled,
# `observe(call, stats, before)` sees each launch, with a snapshot of its memory before it.
edit = None
observe = None
_seeds = itertools.count()


def execute(call):
    """Runs a launch in lockstep, then with its warps apart; Stats of the first."""
    before = call.memory.snapshot()
    stats = call.run(memory_stats=False, races=races, max_steps=max_steps)
    if observe is not None:
        observe(call, stats, before)
    if not (MOST and races and call.blocks):
        return stats
    seed = next(_seeds)
    share = min(1.0, MOST / max(stats.instructions / 32, 1))
    blocks = np.random.default_rng(seed).permutation(call.blocks)[: max(1, int(share * call.blocks))]
    results = call.memory.snapshot()
    call.memory.restore(before)
    again = call.run(schedule="random", seed=seed, blocks=blocks, memory_stats=False, max_steps=max_steps)
    for buffer, written in again.written.items():
        if buffer not in results:
            continue
        differs = written & (call.memory.bytes_of(buffer) != results[buffer])
        if differs.any():
            at = int(np.argmax(differs))
            raise PtxError(
                "depends on the order of warps",
                kernel=call.name,
                address=buffer.base + at,
                buffer=str(buffer),
                offset=at,
                detail=f"seed {seed}",
            )
    call.memory.restore(results)
    return stats


@contextlib.contextmanager
def session():
    """Everything the project launches with Triton runs on the emulator; CPU tensors are taken."""
    from .triton_front import emulated

    with emulated(execute, lambda name, ptx: edit(name, ptx) if edit else ptx):
        yield
