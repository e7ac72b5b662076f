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
from .program import Call, load

last = {}  # of the last launch: "ptx" and "shared" bytes of the kernel, "stats"


def prepare(launched, edit=None):
    """The Call of a launch that the stand-in driver got."""
    meta, compiled = launched.metadata, launched.file("ptx").read_text()
    program = load(edit(launched.name, compiled) if edit else compiled)
    memory, values = GlobalMemory(), []
    for kind, value in zip(launched.source.signature.values(), launched.arguments, strict=True):
        flatten(kind, value, values)
    blocks = launched.grid[0] * launched.grid[1] * launched.grid[2]
    for what in ("global", "profile"):  # hidden scratch pointers at the end
        size = getattr(meta, f"{what}_scratch_size", 0)
        values.append(memory.allocate(size * blocks, f"{what} scratch").base if size else 0)
    params = program.pack(program.kernel(launched.name), values, memory)
    threads = 32 * meta.num_warps
    return Call(program, launched.name, launched.grid, threads, params, meta.shared, memory, compiled)


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

    `execute(call)` runs a launch in place of `call.run(**options)` and returns Stats too; `edit(name, ptx)`
    gives the PTX to run in place of what was compiled.
    """

    def launch(launched):
        call = prepare(launched, edit)
        stats = execute(call) if execute else call.run(**options)
        last.update(ptx=call.program.ptx, shared=call.shared, stats=stats)

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
