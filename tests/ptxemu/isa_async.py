"""cp.async: copies from global to shared memory that are there only after a wait."""

import numpy as np

from .decode import TYPES, Mods, handles
from .errors import Fault, PtxError
from .isa_memory import count_global
from .memory import HOST, host_index

U8, U32, U64 = np.uint8, np.uint32, np.uint64


class Copy:
    """An outstanding cp.async of some lanes: data already fetched, not yet visible."""

    def __init__(self, lanes, index, data, commit):
        self.lanes, self.index, self.data, self.commit = lanes, index, data, commit

    def deliver(self, S, which):
        index = self.index[which]
        S.shared.words[4][index] = self.data[which]
        S.shared.mark(index, 4)
        if S.races:
            S.races.write(index, 4, S.warp[self.lanes[which]], np.zeros(index.shape, bool))

    def keep(self, which):
        return Copy(self.lanes[which], self.index[which], self.data[which], self.commit[which])


def complete(S, m, allowed):
    """Make visible the copies of the active lanes except those of their last `allowed` commit
    groups (None: all, committed or not)."""
    here = S.lanes(m)
    left = []
    for c in S.copies:
        done = here[c.lanes]
        if allowed is not None:
            done = done & (c.commit < S.commits[c.lanes] - allowed)
        if done.all():
            c.deliver(S, slice(None))
        elif done.any():
            c.deliver(S, done)
            left.append(c.keep(~done))
        else:
            left.append(c)
    S.copies = left


@handles("cp")
def cp_async(D, ins):
    mods = Mods(ins)
    if not mods.flag("async") or mods.flag("bulk", "mbarrier"):
        raise PtxError("unknown instruction", detail="cp." + ".".join(ins.mods))
    if mods.flag("commit_group"):
        mods.done()

        def commit(S, m):
            S.commits = S.commits + S.lanes(m)

        return commit
    if mods.flag("wait_all"):
        mods.done()
        return lambda S, m: complete(S, m, None)
    if mods.flag("wait_group"):
        mods.done()
        allowed = int(ins.operands[0], 0)
        return lambda S, m: complete(S, m, allowed)
    cached = mods.one_of("ca", "cg")
    mods.drop(r"shared(::cta)?|global|L2::(64B|128B|256B)")
    hint = mods.flag("L2::cache_hint")
    mods.done()
    _, to = D.address(ins.operands[0])
    _, source = D.address(ins.operands[1])
    size = int(ins.operands[2], 0)
    if size not in (4, 8, 16) or (cached == "cg" and size != 16):
        raise PtxError("bad size of cp.async", detail=str(size))
    rest = ins.operands[3 : len(ins.operands) - hint]
    source_size = ignore = None
    if rest:
        is_predicate = rest[0].startswith("!") or (D.slot(rest[0]) or (0, TYPES["u32"]))[1].pred
        if is_predicate:
            ignore = D.predicate(rest[0])
        else:
            source_size = D.src(rest[0], "u32")
    words = size // 4

    def f(S, m):
        S.fault_mask = m
        lanes = np.flatnonzero(S.lanes(m))
        taddr, saddr = to(S), source(S)
        index = S.shared.index(S.block[lanes], taddr[lanes], size, 4)
        index = index[:, None] + np.arange(words)
        n = np.full(len(lanes), size, U32)
        if source_size is not None:
            n = S.full(source_size(S))[lanes]
            if (n > size).any():
                raise Fault("cp.async src-size larger than cp-size", int(np.argmax(n > size)))
        if ignore is not None:
            n = np.where(S.full(ignore(S))[lanes], U32(0), n)
        data = np.zeros((len(lanes), words), U32)
        some = n > 0
        if some.any():
            reading = lanes[some]
            S.fault_mask = np.zeros(S.L, bool)
            S.fault_mask[reading] = True
            a = saddr[reading]
            host, parts = translate_partial(S, a, n[some], size)
            if S.global_races and (n[some] == size).all():
                S.global_races.read(parts, a, 4, words, S.block_tag[reading])
            data[some] = (
                HOST[4][host_index(host, 4)[:, None] + np.arange(words, dtype=U64)]
                if (n[some] == size).all()
                else gather_bytes(host, n[some], size)
            )
            if S.stats is not None:
                S.stats["cp.async bytes"] += int(n.sum())
                count_global(S, saddr, S.fault_mask, size, "read by cp.async")
        if S.races:
            S.fault_mask = S.lanes(m)
            S.races.write(index, 4, S.warp[lanes])
        S.shared.mark(index, 4, written=False)  # until the wait, a reader finds nothing there
        S.copies.append(Copy(lanes, index, data, S.commits[lanes]))

    return f


def translate_partial(S, a, n, size):
    """As `GlobalMemory.locate`; the copy's full size must be aligned, only n bytes must exist."""
    wrong = a & U64(size - 1) != 0
    if wrong.any():
        lane = int(np.argmax(wrong))
        raise Fault("misaligned access", lane, detail=f"cp.async of {size} bytes", address=int(a[lane]))
    if (n == size).all():
        return S.memory.locate(a, size)
    S.memory.translate(a + n.astype(U64) - U64(1), 1)
    return S.memory.locate(a, 1)


def gather_bytes(host, n, size):
    byte = np.arange(size, dtype=U64)
    exists = byte < n[:, None]
    address = host[:, None] + np.where(exists, byte, U64(0))
    data = np.where(exists, HOST[1][host_index(address, 1)], U8(0))
    return np.ascontiguousarray(data).view(U32)
