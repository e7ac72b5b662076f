"""Running .cu files: nvcc compiles host launchers and PTX, launches go to the emulator.

The shared library is linked against cudart_stub.cpp instead of libcudart, so that an
ordinary `kernel<<<grid, block, shared, stream>>>(args)` in it arrives here with its
true grid, block, shared bytes and argument values.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile

import numpy as np

from .errors import PtxError
from .memory import GlobalMemory
from .program import Call, Program

_HERE = os.path.dirname(os.path.abspath(__file__))
CUDA_HOME = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
if not os.path.isdir(CUDA_HOME) and shutil.which("nvcc"):
    CUDA_HOME = os.path.dirname(os.path.dirname(os.path.realpath(shutil.which("nvcc"))))
_I, _U, _Z, _P, _S = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p


class _Hooks(ctypes.Structure):
    _fields_ = [
        ("launch", ctypes.CFUNCTYPE(_I, _I, _S, _U, _U, _U, _U, _U, _U, _Z, _Z, ctypes.POINTER(_P))),
        ("symbol", ctypes.CFUNCTYPE(_P, _I, _S)),
    ]


def _cache_dir():
    path = os.environ.get("PTXEMU_CACHE") or os.path.join(tempfile.gettempdir(), f"ptxemu-{os.getuid()}")
    os.makedirs(path, exist_ok=True)
    return path


def _run(command):
    r = subprocess.run(command, capture_output=True, text=True)
    if r.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{r.stdout}{r.stderr}")
    return r.stdout + r.stderr


def _built(path, make):
    """Make a file once: `make(temporary path)` and rename. Who comes while it is made waits for it."""
    if not os.path.exists(path):
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(path):
                temporary = f"{path}.{os.getpid()}"
                make(temporary)
                os.replace(temporary, path)
    return path


class _Runtime:
    """The one stand-in runtime of this process and its device memory."""

    def __init__(self):
        source = os.path.join(_HERE, "cudart_stub.cpp")
        with open(source, "rb") as f:
            tag = hashlib.sha256(f.read()).hexdigest()[:16]
        so = _built(
            os.path.join(_cache_dir(), f"libcudart_stub_{tag}.so"),
            lambda out: _run(
                ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{CUDA_HOME}/include", source, "-o", out]
            ),
        )
        self.stub = ctypes.CDLL(so, mode=ctypes.RTLD_GLOBAL)
        self.memory = GlobalMemory(identity=True)
        self.libraries = []
        fields = dict(_Hooks._fields_)
        self.hooks = _Hooks(*(fields[name](getattr(self, "_" + name)) for name, _ in _Hooks._fields_))
        self.stub.ptxemu_set_hooks(ctypes.byref(self.hooks))

    def _launch(self, library, kernel, gx, gy, gz, bx, by, bz, shared, max_dynamic, args):
        try:
            lib = self.libraries[library]
            lib.launch(kernel.decode(), (gx, gy, gz), (bx, by, bz), shared, max_dynamic, args)
            return 0
        except BaseException as e:  # cannot cross the C frames: kept for the caller
            lib.error = lib.error or e
            return 719  # cudaErrorLaunchFailure

    def _symbol(self, library, name):
        return self.libraries[library].program.addresses.get(name.decode())


_runtime = None


def runtime():
    """The process's stand-in runtime, made when it is first asked for."""
    global _runtime
    _runtime = _runtime or _Runtime()
    return _runtime


class CudaLibrary:
    """A compiled .cu file. `call` runs one of its extern "C" host functions; `options` are those of
    launch_ptx (schedule, seed, ...); `stats` holds the Stats of the last call's launches. `execute(call)`
    runs a launch in place of `call.run(**options)` and returns Stats too."""

    def __init__(self, source, flags=(), execute=None, depends=(), visible=False, **options):
        """source: path of a .cu file, or its text; `depends`: paths of what it includes. visible: what is
        loaded later may call its functions."""
        runtime()
        if "\n" not in source:
            with open(source) as f:
                text, flags = f.read(), ["-I" + os.path.dirname(os.path.abspath(source)), *flags]
        else:
            text = source
        included = []
        for path in depends:
            with open(path) as f:
                included.append(f.read())
        tag = hashlib.sha256(repr((text, list(flags), *included)).encode()).hexdigest()[:16]
        folder = os.path.join(_cache_dir(), tag)
        os.makedirs(folder, exist_ok=True)
        cu = os.path.join(folder, "kernels.cu")
        # one run gives both: the library, and (kept) the PTX that it embeds
        command = [os.path.join(CUDA_HOME, "bin", "nvcc"), "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
        command += ["-cudart", "none", "-gencode", "arch=compute_80,code=compute_80"]
        command += ["--keep", "--keep-dir", folder, *flags, cu, "-o"]

        def compile(out):
            with open(cu, "w") as f:
                f.write(text)
            _run([*command, out])

        so = _built(os.path.join(folder, "kernels.so"), compile)
        with open(os.path.join(folder, "kernels.ptx")) as f:
            self.ptx = f.read()
        self.execute, self.options, self.stats, self.error = execute, options, [], None
        _runtime.libraries.append(self)
        _runtime.stub.ptxemu_begin_library(len(_runtime.libraries) - 1)
        self.lib = ctypes.CDLL(so, mode=ctypes.RTLD_GLOBAL if visible else ctypes.RTLD_LOCAL)

    @functools.cached_property
    def program(self):  # reading PTX takes seconds, and not every library is launched from
        return Program(self.ptx, identity=True)

    def program_of(self, kernel):
        """The program that a kernel is launched from."""
        return self.program

    def launch(self, name, grid, block, shared, max_dynamic, args):
        program = self.program_of(name)
        kernel = program.kernel(name)
        if shared > max_dynamic:
            raise PtxError(
                "bad launch",
                kernel=name,
                detail=f"{shared} bytes of dynamic shared memory; without "
                f"cudaFuncAttributeMaxDynamicSharedMemorySize it may have {max_dynamic}",
            )
        params = bytearray(kernel.param_bytes)
        for i, (offset, p) in enumerate(kernel.params.values()):
            params[offset : offset + p.size] = ctypes.string_at(args[i], p.size)
        call = Call(program, name, grid, block, bytes(params), shared, _runtime.memory)
        self.stats.append(self.execute(call) if self.execute else call.run(**self.options))

    def call(self, name, *args, **options):
        """Call a host function that returns int. Arrays and tensors are registered for this call and
        passed as pointers; int -> int, float -> float, None -> null; others as ctypes values."""
        before, self.options = self.options, {**self.options, **options}
        known = list(_runtime.memory.buffers)
        self.stats, self.error = [], None
        try:
            result = getattr(self.lib, name)(*[self._convert(x) for x in args])
        finally:
            self.options = before
            for b in list(_runtime.memory.buffers):
                if b not in known:
                    _runtime.memory.release(b.base)
        if self.error is not None:
            raise self.error
        return result

    def _convert(self, x):
        if x is None:
            return _P(0)
        if isinstance(x, np.ndarray) or hasattr(x, "data_ptr"):
            return _P(_runtime.memory.register(x))
        if isinstance(x, float):
            return ctypes.c_float(x)
        return ctypes.c_bool(x) if isinstance(x, bool) else ctypes.c_int(x) if isinstance(x, int) else x
