"""A stand-in for Triton's CUDA driver, for machines without a GPU.

While one is active, `kernel[grid](...)` on CPU tensors is specialised and compiled for the driver's
architecture exactly as on a GPU, and the launch is handed to a Python function: the ahead-of-time compiler
(`aot.py`) looks at what was compiled, the tests' emulator executes its PTX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import launch

# The most shared memory that a block may have, in bytes (CUDA programming guide, technical specifications).
MAX_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass
class Launched:
    """One launch: what was compiled, and with what it was called."""

    name: str
    source: Any  # triton.compiler.ASTSource: the function, its signature and constants
    metadata: Any  # num_warps, num_stages, shared (bytes), hash ...
    files: dict[str, str]  # what was compiled, by file name: name.ptx, name.cubin, name.json ...
    grid: tuple[int, int, int]
    arguments: tuple

    def file(self, suffix: str) -> Path:
        """The compiled kernel in one of its forms: "ptx", "cubin", "ttgir" ..."""
        return Path(self.files[f"{self.name}.{suffix}"])


class StandInDriver:
    """Answers what Triton asks of a driver; `launch` gets each launch."""

    def __init__(self, arch: int, launch: Callable[[Launched], None]):
        self.arch, self.launch = arch, launch
        self.utils = self
        self._files: dict[str, str] = {}

    # What Triton calls `utils`: the loading of a compiled kernel.

    def get_device_properties(self, device: int) -> dict[str, int]:
        # Kernels that need more shared memory than the chip has are for the caller to find, not an exception.
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 108, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), (name, self._files), 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: object) -> None:
        pass

    # The driver itself.

    def launcher_cls(self, source: Any, metadata: Any) -> Callable:
        def call(x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
            name, files = function
            # Triton keeps this function with the compiled kernel, also for later drivers of the architecture.
            driver.active.launch(Launched(name, source, metadata, files, (x, y, z), arguments))

        return call

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return (
            self.arch
        )  # Triton keeps compiled kernels by device: so drivers of two architectures can alternate

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def remember_files(self, module, function, name, files, hash) -> None:
        self._files = files


@contextmanager
def stand_in(arch: int, launch_: Callable[[Launched], None]) -> Iterator[StandInDriver]:
    """Makes a stand-in for `arch` the active driver, under which the kernels' host code takes CPU tensors."""
    before, hook, allowed = driver._active, knobs.runtime.kernel_load_start_hook, launch.cpu_tensors_allowed
    stand_in_driver = StandInDriver(arch, launch_)
    driver.set_active(stand_in_driver)
    knobs.runtime.kernel_load_start_hook = stand_in_driver.remember_files
    launch.cpu_tensors_allowed = True
    try:
        yield stand_in_driver
    finally:
        driver.set_active(before)  # `reset_active` would look for a GPU
        knobs.runtime.kernel_load_start_hook, launch.cpu_tensors_allowed = hook, allowed
