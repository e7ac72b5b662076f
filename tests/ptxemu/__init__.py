"""ptxemu: executes compiled sm_80 PTX on a CPU. See README.md."""

from .errors import PtxError
from .machine import Stats
from .memory import GlobalMemory
from .program import Program, launch_ptx, load

__all__ = [
    "CudaLibrary",
    "GlobalMemory",
    "Program",
    "PtxError",
    "Stats",
    "emulated",
    "launch_ptx",
    "launch_triton",
    "load",
]


def __getattr__(name):  # Triton is imported only when asked for
    if name in ("launch_triton", "emulated"):
        from . import triton_front

        return getattr(triton_front, name)
    if name == "CudaLibrary":  # so is nvcc
        from .cuda_front import CudaLibrary

        return CudaLibrary
    raise AttributeError(name)
