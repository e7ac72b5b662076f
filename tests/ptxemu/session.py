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
from .triton_front import emulated

# Warps run one at a time cost this many times more than together. So a launch that executes more than this
# many warp instructions has only some of its blocks run again, drawn at random.
MOST = int(os.environ.get("PTXEMU_RANDOM_INSTRUCTIONS", "20000"))


class Executor:
    """Runs each launch twice; `edit(name, ptx)` as for `emulated`."""

    def __init__(self, most=MOST):
        self.most = most
        self.seeds = itertools.count()

    def __call__(self, call):
        before = call.memory.snapshot()
        stats = call.run(memory_stats=False)
        if self.most and call.blocks:
            self._again(call, before, stats)

    def _again(self, call, before, stats):
        seed = next(self.seeds)
        warp_instructions = stats.instructions / 32
        n = max(1, int(call.blocks * min(1.0, self.most / max(warp_instructions, 1))))
        blocks = np.random.default_rng(seed).permutation(call.blocks)[:n]
        results = call.memory.snapshot()
        call.memory.restore(before)
        again = call.run(schedule="random", seed=seed, blocks=blocks, memory_stats=False)
        for buffer, written in again.written.items():
            differs = written & (call.memory.bytes_of(buffer) != results[buffer])
            if differs.any():
                at = int(np.argmax(differs))
                raise PtxError(
                    "depends on the order of warps",
                    kernel=call.name,
                    address=buffer.base + at,
                    buffer=str(buffer),
                    offset=at,
                    detail=f"byte {at}, seed {seed}",
                )
        call.memory.restore(results)


@contextlib.contextmanager
def session(edit=None):
    """Everything the project launches with Triton runs on the emulator; CPU tensors are taken."""
    with emulated(Executor(), edit):
        yield
