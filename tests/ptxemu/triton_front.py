"""Running @triton.jit functions on the emulator.

While `emulated()` is active, `fn[grid](x, y, n, BLOCK=64)` compiles for sm_80 with Triton's own
specialisation and runs on CPU tensors. `launch_triton` does that for one call and returns its statistics.
The driver that Triton sees is the one of the ahead-of-time compiler, attnrec/kernels/standin.py.
"""

import contextlib

import torch
from attnrec.kernels.standin import stand_in
from triton.backends.driver import decompose_descriptor

from .memory import GlobalMemory
from .program import load

last = {}  # of the last launch: "ptx" and "shared" bytes of the kernel, "stats"


class Call:
    """A launch that is ready to run, as often as one likes."""

    def __init__(self, launched, edit=None):
        meta = launched.metadata
        self.name, self.compiled = launched.name, launched.file("ptx").read_text()
        self.ptx = edit(self.name, self.compiled) if edit else self.compiled
        self.grid, self.block, self.shared = launched.grid, 32 * meta.num_warps, meta.shared
        self.memory, values = GlobalMemory(), []
        for kind, value in zip(launched.source.signature.values(), launched.arguments, strict=True):
            flatten(kind, value, values)
        self.blocks = self.grid[0] * self.grid[1] * self.grid[2]
        for what in ("global", "profile"):  # hidden scratch pointers at the end
            size = getattr(meta, f"{what}_scratch_size", 0)
            values.append(self.memory.allocate(size * self.blocks, f"{what} scratch").base if size else 0)
        program = load(self.ptx)
        self.program, self.params = program, program.pack(program.kernel(self.name), values, self.memory)

    def run(self, **options):
        """The launch's Stats; options as for `launch_ptx`."""
        stats = self.program.launch(
            self.name, self.grid, self.block, self.params, self.shared, self.memory, **options
        )
        last.update(ptx=self.ptx, shared=self.shared, stats=stats)
        return stats


def flatten(kind, value, out):
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            flatten(k, v, out)
    elif kind.startswith("tensordesc"):  # for sm_80: pointer, shape, strides and flags
        out.extend(decompose_descriptor(value))
    elif kind != "constexpr":
        wrapped = hasattr(value, "data_ptr") and not torch.is_tensor(value)
        out.append(getattr(value, "base", value) if wrapped else value)


def _benchmarker():
    """For @triton.autotune: runs each configuration once; its "time" is the number of instructions."""

    def bench(call, quantiles=None, **_):
        call()
        return [last["stats"].instructions] * len(quantiles or [0])

    return bench


@contextlib.contextmanager
def emulated(execute=None, edit=None, **options):
    """Makes the emulator the active Triton driver; options as for `launch_ptx`.

    `execute(call)` is called in place of `call.run(**options)`; `edit(name, ptx)` gives the PTX to run in
    place of what was compiled.
    """

    def launch(launched):
        call = Call(launched, edit)
        execute(call) if execute else call.run(**options)

    with stand_in(80, launch) as driver:
        driver.get_benchmarker = _benchmarker
        yield


def launch_triton(fn, grid, *args, **kwargs):
    """fn[grid](*args, **kwargs) on the emulator; returns the launch's Stats. kwargs: constexprs, num_warps,
    num_stages, and options as for `launch_ptx`. A grid of size 0 launches nothing and returns None."""
    names = ("schedule", "seed", "memory_stats", "max_steps", "max_lanes", "races")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    last.clear()
    with emulated(**options):
        fn[grid](*args, **kwargs)
    return last.get("stats")
