"""A loaded PTX module: its decoded kernels and the memory of its variables."""

import hashlib
import struct

import numpy as np

from . import (  # noqa: F401  (the isa modules register handlers)
    decode,
    device_runtime,
    isa_async,
    isa_control,
    isa_convert,
    isa_float,
    isa_integer,
    isa_memory,
    isa_warp,
)
from .errors import PtxError
from .machine import Launch
from .memory import GlobalMemory
from .parser import parse


class Program:
    _variables_at = 1 << 46  # addresses of the next program's variables

    def __init__(self, ptx, identity=False):
        self.ptx = ptx
        self.module = parse(ptx)
        self.kernels = {}
        self.variables = GlobalMemory(identity, Program._variables_at, gap=1 << 16)
        self.addresses = {}
        for v in self.module.scope.variables.values():
            if v.space in ("global", "const"):
                self.addresses[v.name] = self.variables.allocate(v.size, v.name).base
        Program._variables_at = self.variables.next
        for v in self.module.scope.variables.values():
            if v.init:
                self._initialise(v)

    def _initialise(self, v):
        width, items = v.init
        data = b"".join(self._initial(x, v, width) for x in items)
        b = self.variables.find(self.addresses[v.name])
        offset = b.host - b.owner.ctypes.data
        b.owner[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def _initial(self, text, v, width):
        name = text.removeprefix("generic(").rstrip(")").strip()
        if name in self.addresses:
            return struct.pack("<Q", self.addresses[name])[:width]
        if text[:2] in ("0f", "0F"):
            return int(text[2:], 16).to_bytes(4, "little")
        if text[:2] in ("0d", "0D"):
            return int(text[2:], 16).to_bytes(8, "little")
        if v.type in ("f32", "f64") and not text.lstrip("-").isdigit():
            return struct.pack("<f" if width == 4 else "<d", float(text))
        return (int(text.rstrip("U"), 0) & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    def address(self, variable):
        if variable.name not in self.addresses:
            raise PtxError("variable without memory", detail=variable.name)
        return self.addresses[variable.name]

    def kernel(self, name):
        if name not in self.kernels:
            function = self.module.functions.get(name)
            if function is None or not function.is_entry:
                raise PtxError("no such kernel", detail=f"{name}; there are {self.module.kernels}")
            self.kernels[name] = decode.Kernel(self, function)
        return self.kernels[name]

    def launch(self, kernel, grid, block, args, shared_bytes=0, memory=None, **options):
        """args: one value per parameter (int, float, bytes of a struct, numpy array or torch tensor),
        or the whole parameter block as bytes. Arrays and tensors are registered in `memory`."""
        k = self.kernel(kernel)
        memory = memory if memory is not None else GlobalMemory()
        params = args if isinstance(args, bytes) else self.pack(k, args, memory)
        for b in self.variables.buffers:
            if b not in memory.buffers:
                memory.adopt(b)
        return Launch(k, memory, grid, block, params, shared_bytes, **options).run()

    def pack(self, kernel, args, memory):
        args = list(args)
        if len(args) != len(kernel.params):
            raise PtxError(
                "wrong number of arguments",
                kernel=kernel.name,
                detail=f"{len(args)} given, the kernel has {len(kernel.params)}",
            )
        out = bytearray(kernel.param_bytes)
        for (_name, (offset, p)), x in zip(kernel.params.items(), args, strict=True):
            out[offset : offset + p.size] = pack_one(x, p, memory)
        return bytes(out)


def pack_one(x, p, memory):
    if isinstance(x, (bytes, bytearray)):
        if len(x) != p.size:
            raise PtxError("argument of the wrong size", detail=f"{p.name}: {len(x)} bytes, not {p.size}")
        return bytes(x)
    if x is None:
        return bytes(p.size)
    if hasattr(x, "data_ptr") or isinstance(x, np.ndarray):
        return struct.pack("<Q", memory.register(x, p.name))
    if p.type in ("f16", "f32", "f64"):
        return struct.pack({"f16": "<e", "f32": "<f", "f64": "<d"}[p.type], float(x))
    if isinstance(x, (float, np.floating)):
        raise PtxError("float for an integer parameter", detail=p.name)
    return (int(x) & ((1 << 8 * p.size) - 1)).to_bytes(p.size, "little")


class Call:
    """A launch that is ready to run, as often as one likes. `compiled` is the PTX as the compiler gave it;
    `program` may be of an edited copy."""

    def __init__(self, program, kernel, grid, block, params, shared, memory, compiled=None):
        self.program, self.name, self.params, self.memory = program, kernel, params, memory
        self.grid, self.threads, self.shared = grid, block, shared
        self.blocks = grid[0] * grid[1] * grid[2]
        self.compiled = compiled or program.ptx

    def run(self, **options):
        """The launch's Stats; options as for `launch_ptx`."""
        return self.program.launch(
            self.name, self.grid, self.threads, self.params, self.shared, self.memory, **options
        )


_programs = {}


def load(ptx):
    """The Program of a PTX text, decoded once."""
    key = hashlib.sha256(ptx.encode()).digest()
    if key not in _programs:
        _programs[key] = Program(ptx)
    return _programs[key]


def launch_ptx(ptx, kernel, grid, block, args, shared_bytes=0, **options):
    """Run one kernel of a PTX text; returns its Stats. options: schedule="lockstep" | "random",
    seed, memory (a GlobalMemory), max_lanes, max_steps, memory_stats."""
    return load(ptx).launch(kernel, grid, block, args, shared_bytes, **options)
