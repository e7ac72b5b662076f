"""Loads, stores, atomics, address conversion."""

import numpy as np

from . import floats as fl
from .decode import WINDOWS, Mods, handles
from .errors import Fault, PtxError
from .isa_float import HALF, half_load, half_store
from .memory import HOST, LOCAL_WINDOW, SHARED_WINDOW, WINDOW_BYTES, host_index

U64 = np.uint64
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


def access(S, space, addr, m, word, k, kind):
    """Where the active lanes' accesses of k words begin, checked and counted: `(indices, the array of words,
    lanes of each buffer)`."""
    S.fault_mask = m
    a, n = pick(addr, m), word * k
    if space == "global":
        host, parts = S.memory.locate(a, n)
        count_global(S, addr, m, n, kind)
        return host_index(host, word), HOST[word], parts
    shared = space == "shared"
    memory, region = (S.shared, S.block) if shared else (S.local, S.home)
    index = memory.index(pick(region, m), a, n, word)
    if shared:
        count_shared(S, addr, m, n, kind)
    return index, memory.words[word], None


def read(S, space, addr, m, word, k, meant=False):
    """k words of `word` bytes at each active lane's address: a list of k arrays over all lanes."""
    index, data, parts = access(S, space, addr, m, word, k, "read")
    if space == "global" and S.global_races and not meant:
        S.global_races.read(parts, pick(addr, m), word, k, pick(S.block_tag, m))
    if space == "shared":
        words = index[:, None] + np.arange(k)
        S.shared.check_written(words, word)
        if S.races and not meant:
            S.races.read(words, word, pick(S.warp, m))
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
    index, data, parts = access(S, space, addr, m, word, len(values), "written")
    if space == "global" and S.global_races and not meant:
        S.global_races.write(parts, pick(addr, m), word, len(values), pick(S.block_tag, m))
    races = S.races if space == "shared" and not meant else None
    for i, v in enumerate(values):
        j = index + index.dtype.type(i) if i else index
        v = pick(v, m)
        if races:
            races.write(j[:, None], word, pick(S.warp, m), (data[j] != v)[:, None])
        if space == "shared":
            S.shared.mark(j, word)
        data[j] = v
        if races:
            races.check_written(j[:, None], word, pick(S.warp, m), (data[j] != v)[:, None])


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
            parts = [read_param(S, addr, m, word, k)]
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


def read_param(S, addr, m, word, k):
    # The address register of a lane that takes no part may hold anything.
    a = np.where(S.lanes(m), addr, 0).astype(np.int64)
    if a.min() < 0 or a.max() + word * k > S.launch.kernel.param_bytes:
        S.fault_mask = None
        raise Fault("out of bounds", 0, detail=f"parameter bytes {int(a.min())} to {int(a.max())}")
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
                index = S.shared.index(pick(S.block, sel), active, t.bytes, t.bytes)
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
