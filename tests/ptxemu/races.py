"""Finding races in shared memory: two warps of a block touch the same byte, at least one
writes it, and no barrier of the block lies between. Found in any schedule, from one run,
because what is compared is who touched a byte since the last barrier, not in which order.

A store that does not change the value is no race (compilers let several warps store the
same thing). Atomics and volatile or relaxed accesses are taken to be meant.
"""

import numpy as np

from .errors import Fault

SEVERAL = 255
_ONES = {1: np.uint8(1), 2: np.uint16(0x0101), 4: np.uint32(0x01010101), 8: np.uint64(0x0101010101010101)}


class RaceCheck:
    def __init__(self, regions, stride):
        self.shape = regions, stride
        self.writer = np.zeros(max(regions * stride, 16), np.uint8)  # warp + 1, or 0, or SEVERAL
        self.reader = np.zeros_like(self.writer)

    def barrier(self, regions):
        """The blocks selected by a boolean array have passed a barrier."""
        n, stride = self.shape
        for x in (self.writer, self.reader):
            x[: n * stride].reshape(n, stride)[regions] = 0

    def _note(self, table, index, own):
        """Record that warps `own` touched the words."""
        before = table[index]
        table[index] = own
        several = (table[index] != own) | ((before != 0) & (before != own))
        if several.any():
            table[index[several]] = own.dtype.type(SEVERAL) * _ONES[own.dtype.itemsize]

    def read(self, index, word, warp):
        """index: word indices [lane, k]; warp: uint8 [lane], warp + 1."""
        own = np.broadcast_to((warp.astype(f"u{word}") * _ONES[word])[:, None], index.shape)
        self._check(
            self.writer, index, own, warp, np.ones(index.shape, bool), "read", "written", allow_several=True
        )
        self._note(self.reader.view(own.dtype), index, own)

    def write(self, index, word, warp, changes):
        own = np.broadcast_to((warp.astype(f"u{word}") * _ONES[word])[:, None], index.shape)
        self._check(self.writer, index, own, warp, changes, "write", "written", allow_several=False)
        self._check(self.reader, index, own, warp, changes, "write", "read", allow_several=False)
        self._note(self.writer.view(own.dtype), index, own)

    def stored(self, index, word, warp, lost):
        """lost: the lanes whose value is not the one that a store left (others stored there too)."""
        if lost.any():
            own = warp.astype(f"u{word}") * _ONES[word]
            self._check(
                self.writer,
                index[:, None],
                own[:, None],
                warp,
                lost[:, None],
                "write",
                "written",
                allow_several=False,
            )

    def _check(self, table, index, own, warp, matters, what, done, allow_several):
        found = table.view(own.dtype)[index]
        bad = matters & (found != 0) & (found != own)
        if not bad.any():
            return
        lane, k = (x.ravel() for x in np.nonzero(bad))
        who = np.ascontiguousarray(found[bad]).view(np.uint8).reshape(len(lane), -1)  # byte by byte
        other = (who != 0) & (who != warp[lane][:, None])
        if allow_several:
            other &= who != SEVERAL
        if other.any():
            i, byte = (int(x[0]) for x in np.nonzero(other))
            address = int(index[lane[i], k[i]]) * own.dtype.itemsize % self.shape[1]
            name = "several warps" if who[i, byte] == SEVERAL else f"warp {who[i, byte] - 1}"
            raise Fault(
                "race",
                int(lane[i]),
                address=address,
                detail=f"{what} by warp {warp[lane[i]] - 1} of shared memory "
                f"that {name} has {done} since the last barrier",
            )
