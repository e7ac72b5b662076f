"""Running @triton.jit functions on the emulator.

`use_triton()` makes the emulator Triton's active driver: `fn[grid](x, y, n, BLOCK=64)`
then compiles for sm_80 with Triton's own specialisation and runs on CPU tensors.
`launch_triton` does the same for one call and returns its statistics.
"""

import contextlib

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import decompose_descriptor

from .memory import GlobalMemory
from .program import load

_settings = {}  # options of the emulator for the launches under way
last = {}  # "stats" of the last launch, its "ptx", shared bytes, registers


class _Utils:
    """What triton.compiler asks of a driver when it loads a kernel."""

    def get_device_properties(self, device):
        return {
            "max_shared_mem": 166912,
            "multiprocessor_count": 108,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1410000,
            "mem_clock_rate": 1215000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, name, kernel, shared, device):
        with open(self.files[f"{name}.ptx"]) as f:
            self.function = f.read(), name
        return object(), self.function, 0, 0, 1024

    def unload_module(self, module):
        pass


class _Launcher:
    """Called by JITFunction.run with the grid, the loaded function and the bound arguments."""

    def __init__(self, src, metadata):
        self.metadata = metadata
        self.signature = list(src.signature.values())

    def __call__(self, gx, gy, gz, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        ptx, name = function
        memory = GlobalMemory()
        values = []
        for kind, value in zip(self.signature, args, strict=True):
            flatten(kind, value, values)
        blocks, meta = gx * gy * gz, self.metadata
        for what in ("global", "profile"):  # hidden scratch pointers at the end
            size = getattr(meta, f"{what}_scratch_size", 0)
            values.append(memory.allocate(size * blocks, f"{what} scratch").base if size else 0)
        last.update(ptx=ptx, shared=meta.shared)
        last["stats"] = load(ptx).launch(
            name, (gx, gy, gz), 32 * meta.num_warps, values, meta.shared, memory=memory, **_settings
        )


def flatten(kind, value, out):
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            flatten(k, v, out)
    elif kind.startswith("tensordesc"):  # for sm_80: pointer, shape, strides and flags
        out.extend(decompose_descriptor(value))
    elif kind != "constexpr":
        out.append(
            getattr(value, "base", value)
            if hasattr(value, "data_ptr") and not torch.is_tensor(value)
            else value
        )


class EmulatorDriver:
    launcher_cls = _Launcher

    def __init__(self):
        self.utils = _Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=0):
        return 8, 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        """For @triton.autotune: runs each configuration once; its "time" is the number of instructions."""

        def bench(call, quantiles=None, **_):
            call()
            return [last["stats"].instructions] * len(quantiles or [0])

        return bench

    def map_python_to_cpp_type(self, ty):
        return ty


_driver = EmulatorDriver()


def use_triton(**options):
    """Make the emulator the active Triton driver; options as for launch_ptx."""
    _settings.clear()
    _settings.update(options)
    triton.runtime.driver.set_active(_driver)

    def remember_files(module, function, name, metadata_group, hash):
        _driver.utils.files = metadata_group

    knobs.runtime.kernel_load_start_hook = remember_files


@contextlib.contextmanager
def _options(options):
    before = dict(_settings)
    use_triton(**options)
    try:
        yield
    finally:
        _settings.clear()
        _settings.update(before)


def launch_triton(
    fn,
    grid,
    *args,
    schedule="lockstep",
    seed=0,
    memory_stats=True,
    max_steps=30_000_000,
    max_lanes=8192,
    races=True,
    **kwargs,
):
    """fn[grid](*args, **kwargs) on the emulator; returns the launch's Stats. kwargs: constexprs,
    num_warps, num_stages. A grid of size 0 launches nothing and returns None."""
    last.clear()
    with _options(
        {
            "schedule": schedule,
            "seed": seed,
            "memory_stats": memory_stats,
            "max_steps": max_steps,
            "max_lanes": max_lanes,
            "races": races,
        }
    ):
        fn[grid](*args, **kwargs)
    return last.get("stats")
