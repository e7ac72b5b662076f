"""Loads, stores, atomics, asynchronous copies, address conversion, device runtime calls."""

import re

import numpy as np

from . import floats as fl
from .decode import EXTERNAL, TYPES, WINDOWS, Mods, handles
from .errors import Fault, PtxError
from .isa_arith import HALF, half_load, half_store
from .memory import HOST, LOCAL_WINDOW, SHARED_WINDOW, WINDOW_BYTES, host_index

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
MEANT = {"volatile", "relaxed", "acquire", "release", "mmio"}  # accesses meant to meet those of other warps
SPACES = ("global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func")
_NONE = U64(0xFFFFFFFFFFFFFFFF)


def drop_hints(mods):
    """Modifiers that change timing or visibility between blocks only."""
    mods.drop(
        r"volatile|relaxed|acquire|release|acq_rel|weak|mmio|cta|gpu|sys|cluster|nc|ca|cg|cs|lu|cv|wb|wt|"
        r"L1::\w+|L2::(evict\w+|cache_hint|64B|128B|256B)|unified|noftz"
    )


def space_of(mods):
    return (mods.one_of(*SPACES) or "generic").split("::")[0]


def pick(x, m):
    """The active lanes of x (an immediate of length 1 stays so)."""
    return x if m is None or x.shape[0] == 1 else x[m]


# ---------------------------------------------------------------- statistics


def count_global(S, addr, m, n, kind):
    if S.stats is None:
        return
    lanes = S.count if m is None else int(np.count_nonzero(m))
    S.stats[f"global bytes {kind}"] += n * lanes
    sectors = addr >> U64(5)
    if m is not None:
        sectors = np.where(m, sectors, _NONE)
    sectors = np.sort(sectors.reshape(-1, 32), axis=1)
    distinct = len(sectors) + np.count_nonzero(sectors[:, 1:] != sectors[:, :-1])
    distinct -= np.count_nonzero(sectors[:, -1] == _NONE)  # what stands for inactive lanes
    S.stats[f"global sectors {kind}"] += int(distinct)


def count_shared(S, addr, m, n, kind):
    """Bytes, and how many extra passes bank conflicts cost. A 64- (128-) bit access of a warp
    takes two (four) passes of 16 (8) lanes at best."""
    if S.stats is None:
        return
    lanes = addr.shape[0] if m is None else int(np.count_nonzero(m))
    S.stats[f"shared bytes {kind}"] += n * lanes
    k = max(1, n // 4)
    word = (addr >> U64(2)).astype(np.int64)
    if m is not None:
        word = np.where(m, word, -1 << 40)
    word = (word[:, None] + np.arange(k)).reshape(-1, 32)
    word.sort(axis=1)
    first = np.ones(word.shape, bool)
    first[:, 1:] = word[:, 1:] != word[:, :-1]
    first &= word >= 0
    bank = (word & 31) + np.arange(len(word))[:, None] * 32
    passes = np.bincount(bank[first], minlength=32 * len(word)).reshape(-1, 32).max(1)
    S.stats["shared bank conflicts"] += int((passes - 1)[passes > 0].sum())


# ---------------------------------------------------------------- typed access to one space


def read(S, space, addr, m, word, k, meant=False):
    """k words of `word` bytes at each active lane's address: a list of k arrays over all lanes."""
    n = word * k
    S.fault_mask = m
    a = pick(addr, m)
    if space == "global":
        host, parts = S.memory.locate(a, n)
        index, data = host_index(host, word), HOST[word]
        if S.global_races and not meant:
            S.global_races.read(parts, a, word, k, pick(S.block_tag, m))
        count_global(S, addr, m, n, "read")
    else:
        memory = S.shared if space == "shared" else S.local
        region = pick(S.block if space == "shared" else S.home, m)
        index = memory.index(region, a, n) >> _SHIFT[word]
        data = memory.words[word]
        if space == "shared":
            words = index[:, None] + np.arange(k)
            memory.check_written(words, word)
            if S.races and not meant:
                S.races.read(words, word, pick(S.warp, m))
            count_shared(S, addr, m, n, "read")
    out = []
    for i in range(k):
        v = data[index + index.dtype.type(i)] if i else data[index]
        if m is not None:
            wide = np.zeros(S.L, v.dtype)
            wide[m] = v
            v = wide
        out.append(v)
    return out


def write(S, space, addr, m, word, values, meant=False):
    k = len(values)
    n = word * k
    S.fault_mask = m
    a = pick(addr, m)
    if space == "global":
        host, parts = S.memory.locate(a, n)
        index, data = host_index(host, word), HOST[word]
        if S.global_races and not meant:
            S.global_races.write(parts, a, word, k, pick(S.block_tag, m))
        count_global(S, addr, m, n, "written")
    else:
        memory = S.shared if space == "shared" else S.local
        region = pick(S.block if space == "shared" else S.home, m)
        index = memory.index(region, a, n) >> _SHIFT[word]
        data = memory.words[word]
        if space == "shared":
            count_shared(S, addr, m, n, "written")
    for i, v in enumerate(values):
        j = index + index.dtype.type(i) if i else index
        v = pick(v, m)
        if space == "shared":
            if S.races and not meant:
                S.races.write(j[:, None], word, pick(S.warp, m), (data[j] != v)[:, None])
            memory.mark(j, word)
        data[j] = v
        if space == "shared" and S.races and not meant:
            S.races.check_written(j[:, None], word, pick(S.warp, m), (data[j] != v)[:, None])


def by_window(S, addr, m):
    """Split generic addresses: [(space, address in that space, mask)]."""
    here = S.lanes(m)
    if (addr[here] < U64(SHARED_WINDOW)).all():
        return [("global", addr, m)]
    parts = []
    shared = here & (addr >= U64(SHARED_WINDOW)) & (addr < U64(SHARED_WINDOW + WINDOW_BYTES))
    local = here & (addr >= U64(LOCAL_WINDOW)) & (addr < U64(LOCAL_WINDOW + WINDOW_BYTES))
    for space, base, sel in (
        ("shared", SHARED_WINDOW, shared),
        ("local", LOCAL_WINDOW, local),
        ("global", 0, here & ~shared & ~local),
    ):
        if sel.any():
            parts.append((space, np.where(sel, addr - U64(base), U64(0)), None if sel.all() else sel))
    return parts


def resolve(D, mods, text):
    """(space, get address) of a memory operand."""
    space = space_of(mods)
    place, get = D.address(text)
    if space == "const":
        return "global", get
    if space == "param":
        if place == "local":  # a parameter of a call
            return "local", get
        return "param", get
    if space == "generic" and place is not None:
        return ("global" if place == "const" else place), get
    return space, get


def parse_vector(mods):
    v = mods.one_of("v2", "v4", "v8")
    return int(v[1]) if v else 1


@handles("ld")
def load(D, ins):
    mods = Mods(ins)
    t, k = mods.type(), parse_vector(mods)
    meant = not MEANT.isdisjoint(mods.left)
    drop_hints(mods)
    space, address = resolve(D, mods, ins.operands[1])
    mods.done()
    targets = D.vector(ins.operands[0])
    if len(targets) != k:
        raise PtxError("vector length does not match", detail=f"{len(targets)} registers for .v{k}")
    puts, word, view = [D.dst(x, t, wide=True) for x in targets], t.bytes, t.view if not t.float else t.raw

    def f(S, m):
        addr = address(S)
        if space == "param":
            parts = [read_param(S, addr, word, k)]
        elif space == "generic":
            parts = [None]
            for where, a, sel in by_window(S, addr, m):
                values = read(S, where, a, sel, word, k, meant)
                parts = [
                    values
                    if parts[0] is None
                    else [np.where(sel, v, p) for v, p in zip(values, parts[0], strict=True)]
                ]
        else:
            parts = [read(S, space, addr, m, word, k, meant)]
        for put, v in zip(puts, parts[0], strict=True):
            put(S, v.view(view), m)

    return f


def read_param(S, addr, word, k):
    a = addr.astype(np.int64)
    if a.max() + word * k > S.launch.kernel.param_bytes:
        S.fault_mask = None
        raise Fault("out of bounds", 0, detail=f"parameter byte {int(a.max())}")
    index = a[:, None, None] + (np.arange(k) * word)[None, :, None] + np.arange(word)
    data = S.launch.params[index].reshape(S.L, -1).view(f"u{word}")
    return [np.ascontiguousarray(data[:, i]) for i in range(k)]


@handles("st")
def store(D, ins):
    mods = Mods(ins)
    t, k = mods.type(), parse_vector(mods)
    meant = not MEANT.isdisjoint(mods.left)
    drop_hints(mods)
    space, address = resolve(D, mods, ins.operands[0])
    mods.done()
    sources = D.vector(ins.operands[1])
    if len(sources) != k:
        raise PtxError("vector length does not match", detail=f"{len(sources)} registers for .v{k}")
    if space == "param":
        raise PtxError("store to a kernel parameter")
    gets = [D.src(x, t, wide=True) for x in sources]

    def f(S, m):
        addr = address(S)
        values = [g(S).view(t.raw) for g in gets]
        parts = by_window(S, addr, m) if space == "generic" else [(space, addr, m)]
        for where, a, sel in parts:
            write(S, where, a, sel, t.bytes, values, meant)

    return f


@handles("cvta")
def cvta(D, ins):
    mods = Mods(ins)
    to, t, space = mods.flag("to"), mods.type(), space_of(mods)
    mods.done()
    if space == "param":
        raise PtxError("unknown modifier", detail=".param")
    put, a = D.dst(ins.operands[0], t), D.src(ins.operands[1], t)
    base = U64(WINDOWS.get(space, 0))
    if base and t.bits != 64:
        raise PtxError("unknown modifier", detail=f"cvta.{space}.{t}")
    return (lambda S, m: put(S, a(S) - base, m)) if to else (lambda S, m: put(S, a(S) + base, m))


@handles("isspacep")
def isspacep(D, ins):
    mods = Mods(ins)
    space = space_of(mods)
    mods.done()
    put, a = D.dst(ins.operands[0], "pred"), D.src(ins.operands[1], "u64")
    base = WINDOWS.get(space)

    def f(S, m):
        x = a(S)
        inside = x < U64(SHARED_WINDOW) if base is None else (x >= U64(base)) & (x < U64(base + WINDOW_BYTES))
        put(S, inside, m)

    return f


@handles("prefetch", "prefetchu")
def prefetch(D, ins):
    mods = Mods(ins)
    mods.drop("L1|L2|L2::evict_\\w+|tensormap")
    space = space_of(mods)
    mods.done()
    _, address = D.address(ins.operands[0])

    def f(S, m):
        S.fault_mask = m
        if space in ("global", "generic"):
            S.memory.translate(pick(address(S), m), 1)

    return f


@handles("createpolicy")
def createpolicy(D, ins):
    put = D.dst(ins.operands[0], "b64")
    return lambda S, m: put(S, np.zeros(1, U64), m)


@handles("membar", "fence", "nanosleep", "griddepcontrol")
def no_effect(D, ins):
    allowed = (
        r"cta|gl|gpu|sys|sc|acq_rel|cluster|acquire|release|proxy|alias|async|u32|wait|launch_dependents"
    )
    mods = Mods(ins)
    mods.drop(allowed)
    mods.done()
    return lambda S, m: None


# ---------------------------------------------------------------- atomics


def atomic_op(name, t):
    """fn(old, operands...) -> new, over arrays of t.view (of t.raw for f16, bf16 and packed types)."""
    if t.name in HALF:
        if name != "add":
            raise PtxError("unknown modifier", detail=f".{name}.{t}")
        load_, store_ = half_load(t), half_store(t)
        return lambda old, b: store_(fl.add_odd(load_(old), load_(b)))
    if name == "inc":
        return lambda old, b: np.where(old >= b, 0, old + 1).astype(old.dtype)
    if name == "dec":
        return lambda old, b: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype)
    return {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": np.minimum,
        "max": np.maximum,
        "exch": lambda old, b: b,
        "cas": lambda old, compare, b: np.where(old == compare, b, old),
    }[name]


@handles("atom", "red")
def atomic(D, ins):
    mods = Mods(ins)
    t = mods.type()
    drop_hints(mods)
    name = mods.one_of("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    operands = list(ins.operands)
    put = D.dst(operands.pop(0), t, wide=True) if ins.op == "atom" else None
    space, address = resolve(D, mods, operands[0])
    mods.done()
    view = t.raw if t.name in HALF else t.view
    op, gets = atomic_op(name, t), [D.src(x, t, wide=True) for x in operands[1 : 3 if name == "cas" else 2]]

    def f(S, m):
        addr = address(S)
        values = [S.full(g(S)) for g in gets]
        old = np.zeros(S.L, view)
        parts = by_window(S, addr, m) if space == "generic" else [(space, addr, m)]
        for where, a, sel in parts:
            S.fault_mask = sel
            active = pick(a, sel)
            if where == "global":
                index, data = (
                    host_index(S.memory.translate(active, t.bytes), t.bytes),
                    HOST[t.bytes].view(view),
                )
                if S.stats is not None:
                    S.stats["global atomics"] += len(active)
            elif where == "shared":
                index = S.shared.index(pick(S.block, sel), active, t.bytes) >> _SHIFT[t.bytes]
                S.shared.check_written(index, t.bytes)
                data = S.shared.words[t.bytes].view(view)
            else:
                raise Fault("atomic on local memory", 0)
            ordered_update(data, index, [pick(v, sel) for v in values], op, old, S.lanes(sel))
        if put:
            put(S, old, m)

    return f


def ordered_update(data, index, values, op, old, lanes):
    """data[index] = op(data[index], values), lane after lane where several hit one address."""
    order = np.argsort(index, kind="stable")
    same = index[order]
    start = np.ones(len(same), bool)
    start[1:] = same[1:] != same[:-1]
    first = np.maximum.accumulate(np.where(start, np.arange(len(same)), 0))
    rank = np.arange(len(same)) - first
    result = np.empty(len(same), data.dtype)
    for r in range(int(rank.max()) + 1):
        who = order[rank == r]
        i = index[who]
        result[who] = data[i]
        data[i] = op(result[who], *[v[who] for v in values])
    old[lanes] = result


# ---------------------------------------------------------------- cp.async


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
    if not mods.flag("async"):
        raise PtxError("unknown instruction", detail="cp." + ".".join(ins.mods))
    if mods.flag("bulk", "mbarrier"):
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
        index = S.shared.index(S.block[lanes], taddr[lanes], size) >> 2
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
    if (a & U64(size - 1)).any():
        raise Fault(
            "misaligned access",
            int(np.argmax(a & U64(size - 1) != 0)),
            detail=f"cp.async of {size} bytes",
            address=int(a[np.argmax(a & U64(size - 1) != 0)]),
        )
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


# ---------------------------------------------------------------- device runtime functions


def _c_string(S, address):
    out = bytearray()
    while c := int(HOST[1][host_index(S.memory.translate(np.array([address + len(out)], U64), 1), 1)][0]):
        out.append(c)
    return out.decode(errors="replace")


def _vprintf(D, params, returns):
    """printf: formats each active lane's arguments and prints them."""

    def f(S, m):
        formats = read(S, "local", np.full(S.L, params[0], U64), m, 8, 1)[0]
        arguments = read(S, "local", np.full(S.L, params[1], U64), m, 8, 1)[0]
        for lane in np.flatnonzero(S.lanes(m)):
            only = np.arange(S.L) == lane
            text, at, values = _c_string(S, int(formats[lane])), int(arguments[lane]), []
            for spec in re.findall(r"%[-+ #0-9.*]*(?:hh|h|ll|l|z)?([diouxXeEfFgGcsp%])|(?<=%)(l)", text):
                kind = spec[0]
                if kind == "%":
                    continue
                long = kind in "eEfFgGsp" or f"l{kind}" in text
                word = 8 if long else 4
                at = -(-at // word) * word
                ((where, a, sel),) = by_window(S, np.full(S.L, at, U64), only)
                v = read(S, where, a, sel, word, 1)[0][lane : lane + 1]
                at += word
                values.append(
                    v.view(np.float64)[0]
                    if kind in "eEfFgG"
                    else _c_string(S, int(v[0]))
                    if kind == "s"
                    else int(v.view(f"i{word}" if kind in "di" else v.dtype)[0])
                )
            print(
                re.sub(r"(hh|h|ll|l|z)(?=[diouxX])", "", text).replace("%p", "0x%x") % tuple(values), end=""
            )

    return f


def _assertfail(D, params, returns):
    def f(S, m):
        S.fault_mask = None
        lane = int(np.argmax(S.lanes(m)))
        message = read(S, "local", np.full(S.L, params[0], U64), m, 8, 1)[0][lane]
        S.fault_mask = None
        raise Fault("device assertion failed", lane, detail=_c_string(S, int(message)))

    return f


EXTERNAL |= {"vprintf": _vprintf, "__assertfail": _assertfail}
