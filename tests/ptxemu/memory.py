"""Global, shared and local memory, with every access checked.

Global buffers are the caller's own arrays; the emulator reads and writes them in
place. The whole of this process is seen as one numpy array (`_HOST`), so that one
gather serves lanes that point into different buffers; nothing is read through it
before its address was found to lie in a registered buffer.
"""

import bisect
import ctypes

import numpy as np

from .errors import Fault

U64 = np.uint64
SHARED_WINDOW = 1 << 56  # generic addresses of shared and local memory
LOCAL_WINDOW = 2 << 56
WINDOW_BYTES = 1 << 32
_HOST_BASE = 4096
_HOST = np.frombuffer((ctypes.c_uint8 * ((1 << 47) - _HOST_BASE)).from_address(_HOST_BASE), dtype=np.uint8)


class HostWords:
    """All memory of this process, as an array of words. (Not the numpy array itself: a debugger that
    prints one would read where nothing is mapped.)"""

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)
        self._words = _HOST.view(dtype)

    def __getitem__(self, index):
        return self._words[index]

    def __setitem__(self, index, value):
        self._words[index] = value

    def view(self, dtype):
        return HostWords(dtype)


HOST = {n: HostWords(f"u{n}") for n in (1, 2, 4, 8)}
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
WRITTEN = {1: np.uint8(1), 2: np.uint16(0x0101), 4: np.uint32(0x01010101), 8: U64(0x0101010101010101)}


def host_pointer(x):
    """(address, bytes spanned, dtype name) of a numpy array or torch tensor on the CPU."""
    if isinstance(x, np.ndarray):
        shape, strides, item, address, kind = x.shape, x.strides, x.itemsize, x.ctypes.data, str(x.dtype)
    else:
        if x.device.type != "cpu":
            raise TypeError(f"a CPU tensor is needed, got one on {x.device}")
        item, address, shape, kind = x.element_size(), x.data_ptr(), tuple(x.shape), str(x.dtype)
        strides = tuple(s * item for s in x.stride())
    if 0 in shape:
        return address, 0, kind
    low = sum(s * (n - 1) for n, s in zip(shape, strides, strict=True) if s < 0)
    high = sum(s * (n - 1) for n, s in zip(shape, strides, strict=True) if s > 0)
    return address + low, high - low + item, kind


class Buffer:
    def __init__(self, name, base, size, host, owner, description=""):
        self.name, self.base, self.size, self.host, self.owner = name, base, size, host, owner
        self.description = description

    def __str__(self):
        d = f" ({self.description})" if self.description else ""
        return f"{self.name}{d} [0x{self.base:x}, 0x{self.base + self.size:x}), {self.size} bytes"


class GlobalMemory:
    """Registered buffers. By default a buffer gets a virtual address of its own, 4 GiB away from
    every other; with identity=True its host address is its device address."""

    def __init__(self, identity=False, start=1 << 44, gap=1 << 32):
        self.identity, self.next, self.gap = identity, start, gap
        self.buffers = []  # sorted by base
        self._bases = []

    def register(self, x, name=None):
        """Make an array or tensor accessible; returns the device address of its first element.
        Views that overlap in memory share one buffer."""
        pointer = x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr()
        low, size, kind = host_pointer(x)
        for b in self.buffers:
            if b.host < low + size and low < b.host + b.size:  # overlaps a known one: join
                if not (b.host <= low and low + size <= b.host + b.size):
                    self._grow(b, low, low + size, x)
                return b.base + pointer - b.host
        buffer = self._add(name or f"buffer{len(self.buffers)}", low, size, x, f"{kind} {list(x.shape)}")
        return buffer.base + pointer - low

    def _add(self, name, host, size, owner, description=""):
        if self.identity:
            base = host
        else:
            base = self.next + (host & 0xFFF)  # keeps the host's alignment
            self.next = (base + size + self.gap) & ~0xFFF
        return self.adopt(Buffer(name, base, size, host, owner, description))

    def adopt(self, buffer):
        i = bisect.bisect(self._bases, buffer.base)
        self._bases.insert(i, buffer.base)
        self.buffers.insert(i, buffer)
        return buffer

    def _grow(self, b, low, high, x):
        low, high = min(low, b.host), max(high, b.host + b.size)
        b.base -= b.host - low
        b.host, b.size, b.owner = low, high - low, (b.owner, x)
        self._bases = [y.base for y in self.buffers]

    def allocate(self, size, name):
        """A zeroed buffer owned by this memory."""
        array = np.zeros(max(size, 1) + 512, np.uint8)
        offset = -array.ctypes.data % 256
        return self._add(name, array.ctypes.data + offset, size, array)

    def release(self, address):
        i = self._bases.index(address)
        del self._bases[i], self.buffers[i]

    def snapshot(self, most=1 << 28):
        """{buffer: its bytes} of the buffers of at most `most` bytes."""
        return {b: self.bytes_of(b).copy() for b in self.buffers if 0 < b.size <= most}

    def restore(self, snapshot):
        for b, data in snapshot.items():
            self.bytes_of(b)[:] = data

    @staticmethod
    def bytes_of(b):
        return _HOST[b.host - _HOST_BASE : b.host - _HOST_BASE + b.size]

    def find(self, address):
        i = bisect.bisect(self._bases, address) - 1
        return self.buffers[i] if i >= 0 else None

    def translate(self, addr, n):
        """Host addresses of device addresses (uint64 array); each must hold n bytes of a buffer."""
        return self.locate(addr, n)[0]

    def locate(self, addr, n):
        """(host addresses, [(buffer, its lanes), ...]) of device addresses, as `translate`."""
        low, high = int(addr.min()), int(addr.max())
        b = self.find(low)
        if b is not None and high + n <= b.base + b.size:
            if low % n or (addr & U64(n - 1)).any():
                self._misaligned(addr, n)
            return addr + U64((b.host - b.base) & 0xFFFFFFFFFFFFFFFF), [(b, slice(None))]
        if (addr & U64(n - 1)).any():
            self._misaligned(addr, n)
        if not self.buffers:
            raise Fault("out of bounds", 0, address=low, detail="no buffer is registered")
        bases = np.array(self._bases, U64)
        sizes = np.array([x.size for x in self.buffers], U64)
        i = np.searchsorted(bases, addr, side="right") - 1
        inside = addr - bases[i]  # huge where i is -1
        bad = (i < 0) | (inside + U64(n) > sizes[i])
        if bad.any():
            lane = int(np.argmax(bad))
            self._outside(int(addr[lane]), n, lane)
        hosts = np.array([x.host for x in self.buffers], U64)
        return hosts[i] + inside, [(self.buffers[j], np.flatnonzero(i == j)) for j in np.unique(i)]

    def _misaligned(self, addr, n):
        lane = int(np.argmax(addr & U64(n - 1) != 0))
        a = int(addr[lane])
        b = self.find(a)
        raise Fault(
            "misaligned access",
            lane,
            address=a,
            buffer=b and str(b),
            detail=f"{n} bytes at an address that is not a multiple of {n}",
        )

    def _outside(self, a, n, lane):
        def distance(b):
            return max(b.base - a, a + n - (b.base + b.size))

        b = min(self.buffers, key=distance)
        past = a + n - (b.base + b.size)
        where = f"reaches {past} bytes past its end" if past > 0 else f"starts {b.base - a} bytes before it"
        raise Fault(
            "out of bounds",
            lane,
            address=a,
            buffer=str(b),
            offset=a - (b.base + b.size),
            detail=f"{n}-byte access {where}",
        )


def host_index(address, word):
    """Indices into HOST[word] of host addresses."""
    return (address - U64(_HOST_BASE)) >> _SHIFT[word]


class BlockMemory:
    """Memory of `count` equal regions of `size` bytes: shared memory per block, local per thread."""

    def __init__(self, space, count, size, track):
        self.space, self.size = space, size
        self.stride = (size + 15) // 16 * 16
        data = np.full(max(count * self.stride, 16), 0xCD, np.uint8)
        self.words = {n: data.view(f"u{n}") for n in (1, 2, 4, 8)}
        flags = np.zeros_like(data) if track else None
        self.flags = {n: flags.view(f"u{n}") for n in (1, 2, 4, 8)} if track else None

    def index(self, region, addr, n, word):
        """Index into words[word] of each access of n bytes at addr in its region, checked."""
        if n > 1 and (addr & U64(n - 1)).any():
            lane = int(np.argmax(addr & U64(n - 1) != 0))
            raise Fault(
                "misaligned access",
                lane,
                address=int(addr[lane]),
                detail=f"{n} bytes of {self.space} memory at an address that is not a multiple of {n}",
            )
        bad = (addr >= U64(self.size)) | (addr + U64(n) > U64(self.size))
        if bad.any():
            lane = int(np.argmax(bad))
            a = int(addr[lane])
            raise Fault(
                "out of bounds",
                lane,
                address=a,
                offset=a - self.size,
                detail=f"{n}-byte access in {self.space} memory of {self.size} bytes, "
                f"{a + n - self.size} bytes past its end",
            )
        return region * self.stride + addr.astype(np.int64) >> _SHIFT[word]

    def check_written(self, index, word):
        """index: word indices, first axis = lanes."""
        if self.flags is None:
            return
        bad = self.flags[word][index] != WRITTEN[word]
        if bad.any():
            lane = int(np.argmax(bad.reshape(len(index), -1).any(1)))
            first = int(np.argmax(bad.reshape(len(index), -1)[lane]))
            byte = int(np.asarray(index).reshape(len(index), -1)[lane, first]) * word
            raise Fault(
                "never written",
                lane,
                address=byte % self.stride,
                detail=f"{self.space} memory that no one has written, or whose cp.async was not waited for",
            )

    def mark(self, index, word, written=True):
        if self.flags is not None:
            self.flags[word][index] = WRITTEN[word] if written else 0
