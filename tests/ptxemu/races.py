"""Races: two parties touch the same byte, at least one writes it, and nothing orders them.

In shared memory the parties are the warps of a block, and a barrier of the block orders them. In global
memory they are the blocks of a launch, and nothing orders them. Found in any schedule, from one run, because
what is compared is who touched a byte, not in which order. Atomics and volatile or relaxed accesses are
taken to be meant.
"""

import numpy as np

from .errors import Fault

SEVERAL = 255
TAGS = 254  # blocks are told apart by their number modulo this
_ONES = {1: np.uint8(1), 2: np.uint16(0x0101), 4: np.uint32(0x01010101), 8: np.uint64(0x0101010101010101)}


class RaceCheck:
    """Who touched each byte: tag 1 ... TAGS of a warp or block, 0 for no one, SEVERAL.

    `index` are word indices [lane, k], `tag` is uint8 [lane].
    """

    what = "shared memory that {} has {} since the last barrier"
    party = "warp"

    def __init__(self, size):
        # (np.zeros takes memory only where it is touched, np.zeros_like all of it)
        self.writer, self.reader = (np.zeros(max(size, 16), np.uint8) for _ in range(2))

    def read(self, index, word, tag):
        own = self._own(index, word, tag)
        self._check(self.writer, index, own, tag, None, "read", "written", allow_several=True)
        self._note(self.reader.view(own.dtype), index, own)

    def write(self, index, word, tag, matters=None):
        """`matters`: bool [lane, k], which of these can be a fault; the others are only noted."""
        own = self._own(index, word, tag)
        self._check(self.writer, index, own, tag, matters, "write", "written", allow_several=False)
        self._check(self.reader, index, own, tag, matters, "write", "read", allow_several=False)
        self._note(self.writer.view(own.dtype), index, own)

    def check_written(self, index, word, tag, matters=None):
        """After a write: others that did the same instruction at the same time."""
        own = self._own(index, word, tag)
        self._check(self.writer, index, own, tag, matters, "write", "written", allow_several=False)

    def _own(self, index, word, tag):
        return np.broadcast_to((tag.astype(f"u{word}") * _ONES[word])[:, None], index.shape)

    def _note(self, table, index, own):
        """Record that the parties `own` touched the words."""
        before = table[index]
        if (before == own).all():
            return
        table[index] = own
        several = (table[index] != own) | ((before != 0) & (before != own))
        if several.any():
            table[index[several]] = own.dtype.type(SEVERAL) * _ONES[own.dtype.itemsize]

    def _check(self, table, index, own, tag, matters, doing, done, allow_several):
        found = table.view(own.dtype)[index]
        bad = (found != 0) & (found != own)
        if matters is not None:
            bad &= matters
        if not bad.any():
            return
        lane, k = (x.ravel() for x in np.nonzero(bad))
        who = np.ascontiguousarray(found[bad]).view(np.uint8).reshape(len(lane), -1)  # byte by byte
        other = (who != 0) & (who != tag[lane][:, None])
        if allow_several:
            other &= who != SEVERAL
        if other.any():
            i, byte = (int(x[0]) for x in np.nonzero(other))
            name = f"several {self.party}s" if who[i, byte] == SEVERAL else f"{self.party} {who[i, byte] - 1}"
            detail = f"{doing} by {self.party} {tag[lane[i]] - 1} of {self.what.format(name, done)}"
            at = int(index[lane[i], k[i]]) * own.dtype.itemsize + byte
            raise Fault("race", int(lane[i]), detail=detail, **self.place(at))


class SharedRaces(RaceCheck):
    """Warps of the blocks that run together, each with a region of `stride` bytes."""

    def __init__(self, regions, stride):
        super().__init__(regions * stride)
        self.shape = regions, stride

    def barrier(self, regions):
        """The blocks selected by a boolean array have passed a barrier."""
        n, stride = self.shape
        for x in (self.writer, self.reader):
            x[: n * stride].reshape(n, stride)[regions] = 0

    def place(self, at):
        return {"address": at % self.shape[1]}


class _BufferRaces(RaceCheck):
    what = "global memory that {} has {} in the same launch"
    party = "block"

    def __init__(self, buffer):
        super().__init__(buffer.size + 32)
        self.buffer, self.base = buffer, buffer.base & ~15

    def place(self, at):
        return {
            "address": self.base + at,
            "buffer": str(self.buffer),
            "offset": self.base + at - self.buffer.base,
        }


class GlobalRaces:
    """Blocks of one launch in global memory. A byte that two blocks write is an error even if they store
    the same, and so is one that a block reads and another writes."""

    def __init__(self):
        self.buffers, self.written_to = {}, {}  # in the order of first use

    def read(self, parts, addr, word, k, tag):
        """`parts`: the lanes of each buffer, as `GlobalMemory.locate` gives them."""
        for check, index, own in self._of_buffers(parts, addr, word, k, tag):
            check.read(index, word, own)

    def write(self, parts, addr, word, k, tag):
        for check, index, own in self._of_buffers(parts, addr, word, k, tag):
            check.write(index, word, own)
            check.check_written(index, word, own)
            self.written_to[check.buffer] = True

    def written(self):
        """{buffer: bool per byte} of what the launch has written."""
        found = {}
        for buffer in self.written_to:
            check = self.buffers[buffer]
            first = buffer.base - check.base
            found[buffer] = check.writer[first : first + buffer.size] != 0
        return found

    def _of_buffers(self, parts, addr, word, k, tag):
        for buffer, lanes in parts:
            check = self.buffers.get(buffer)
            if check is None:
                check = self.buffers[buffer] = _BufferRaces(buffer)
            index = ((addr[lanes] - np.uint64(check.base)) // np.uint64(word)).astype(np.int64)
            yield check, index[:, None] + np.arange(k), tag[lanes]
