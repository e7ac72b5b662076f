"""The project's CUDA C++ backend on the emulator, for the contract suite.

Its own kernels, launchers and binding, as they are: each csrc/cuda/*.cu becomes a library that launches into
the emulator (cuda_front.py), the binding is compiled against the torch at hand and registers the ops' CUDA
kernels with its dispatcher, as in a CUDA build. They are then called with CPU tensors. What a CUDA build of
torch has beside, torch_stub.cpp stands in for.
"""

import contextlib
import functools
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths

from . import session
from .cuda_front import CUDA_HOME, CudaLibrary, _built, _cache_dir, _run, runtime
from .program import Program

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = sorted(CSRC.glob("cuda/*.cu"))
BINDING = [*sorted(CSRC.glob("cuda/*.cpp")), CSRC / "checks.cpp", Path(__file__).with_name("torch_stub.cpp")]
CXX = [
    "g++",
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


def why_not():
    """Why there can be no such library here, in words, or None."""
    if not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")):
        return f"there is no nvcc in {CUDA_HOME}"
    return None


@cache
def headers():
    return sorted(str(path) for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh") for path in CSRC.glob(pattern))


def _object(source):
    """A file of the binding, compiled."""
    folders = [str(CSRC), f"{CUDA_HOME}/include"]
    command = [*CXX, *(f"-I{x}" for x in folders), *(f"-isystem{x}" for x in include_paths())]
    texts = [Path(x).read_bytes() for x in (source, *headers())]
    tag = hashlib.sha256(repr((command, torch.__version__, texts)).encode()).hexdigest()[:16]
    return _built(
        os.path.join(_cache_dir(), f"{source.stem}_{tag}.o"),
        lambda out: _run([*command, "-c", str(source), "-o", out]),
    )


_program = cache(functools.partial(Program, identity=True))


@cache
def alone(ptx, kernel):
    """The PTX with this kernel and no other, every line in its place."""
    kept, other = [], False
    for line in ptx.split("\n"):
        entry = re.search(r"\.entry\s+(\w+)", line) if ".entry" in line else None
        other = other or (entry is not None and entry[1] != kernel)
        kept.append("" if other else line)
        other = other and line != "}"
    return "\n".join(kept)


class Library(CudaLibrary):
    """Of its kernels each is read when it is launched: all of them take up to a quarter of a minute."""

    def program_of(self, kernel):
        return _program(alone(self.ptx, kernel))


def _execute(call):
    """As session.execute, with the faults that a test plants."""
    if session.edit is not None:
        edited = session.edit(call.name, call.compiled)
        if edited != call.compiled:
            call.program = _program(edited)
    return session.execute(call)


@cache
def libraries():
    """The kernels' libraries; loads them and the binding, compiled where they are not yet."""

    def library(source):
        return Library(str(source), [f"-I{CSRC}"], _execute, depends=headers(), visible=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [pool.submit(_object, source) for source in BINDING]
        loaded = [library(source) for source in KERNELS]
        objects = [x.result() for x in objects]
    tag = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    lib = Path(torch.__file__).parent / "lib"
    binding = _built(
        os.path.join(_cache_dir(), f"libattnrec_cuda_{tag}.so"),
        lambda out: _run(
            ["g++", "-shared", *objects, f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", out]
        ),
    )
    torch.ops.load_library(binding)
    return loaded


@cache
def kernels():
    """The ops' kernels of the dispatcher, by name."""
    from attnrec.ops import OPS

    libraries()
    there = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: Kernel(name) for name in OPS if there(f"attnrec::{name}", "CUDA")}


class _Known(TorchDispatchMode):
    """Makes what an op allocates known to the emulator; nothing else may be touched by a kernel."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor):
                runtime().memory.register(x, str(function))
        return result


class Kernel:
    """An op's CUDA kernel as the dispatcher has it, for CPU tensors."""

    def __init__(self, name):
        self.kernel = torch.library.get_kernel(f"attnrec::{name}", "CUDA")

    def call_boxed(self, keys, *args, **kwargs):
        memory = runtime().memory
        before = list(memory.buffers)
        try:
            for name, x in [*enumerate(args), *kwargs.items()]:
                if isinstance(x, torch.Tensor):
                    memory.register(x, f"argument {name}")
            with _Known():
                return self.kernel.call_boxed(keys, *args, **kwargs)
        except RuntimeError:
            for library in libraries():
                error, library.error = library.error, None
                if error is not None:
                    raise error from None
            raise
        finally:
            for buffer in list(memory.buffers):
                if buffer not in before:
                    memory.release(buffer.base)


@contextlib.contextmanager
def served():
    """The backend `cuda` serves CPU tensors, with these kernels."""
    from attnrec.ops import backends

    with (
        mock.patch.object(backends.CUDA, "kernels", kernels()),
        mock.patch.object(backends.CUDA, "device", "cpu"),
    ):
        yield
