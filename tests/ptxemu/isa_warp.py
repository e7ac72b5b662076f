"""Instructions in which the lanes of a warp, or the threads of a block, work together."""

import numpy as np

from . import floats as fl
from .decode import TYPES, Mods, handles
from .errors import Fault, PtxError
from .isa_memory import count_shared
from .machine import RESELECT

U16, U32, U64, F32, F64 = np.uint16, np.uint32, np.uint64, np.float32, np.float64
UNDEFINED = U32(0x7FFFDEAD)  # what shfl reads from a lane that is not a member: a NaN, an odd integer
LANES = np.arange(32)


def warp_wide(body, member=None):
    """Run body(group, mask) for the warps whose members are all here; hold the others back."""

    def f(S, m):
        S.fault_mask = None
        ok = S.converge(m, None if member is None else member(S))
        if ok is m:
            return body(S, m)
        if ok.any():
            body(S, ok)
        S.set_pc(S.at + 1)
        S.pc[S.lanes(m) & ~ok] = S.at  # the lanes that converge() holds back
        return RESELECT

    return f


def warps(x, S):
    return S.full(x).reshape(-1, 32)


def members(S, m, member):
    """[warp, lane, other]: is `other` an active member for the instruction of `lane`?"""
    bits = S.member_bits(member(S))
    return bits if m is None else bits & m.reshape(-1, 1, 32)


# ---------------------------------------------------------------- shuffle, vote, match, reduce


@handles("shfl")
def shfl(D, ins):
    mods = Mods(ins)
    mods.flag("sync")
    mode = mods.one_of("up", "down", "bfly", "idx")
    mods.type()
    mods.done()
    outs = [x.strip() for x in ins.operands[0].split("|")]
    put = D.dst(outs[0], "b32")
    put_p = D.dst(outs[1], "pred") if len(outs) > 1 else None
    a, b, c, member = (D.src(x, "b32") for x in ins.operands[1:5])
    constant_c = D.number(ins.operands[3], TYPES["b32"])
    constant_b = D.number(ins.operands[2], TYPES["b32"])

    def source_lanes(b, c):
        b, c = b.astype(np.int64) & 31, c.astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        last = (LANES & segment) | (clamp & ~segment & 31)
        first = LANES & segment
        if mode == "up":
            j = LANES - b
            p = j >= last
        elif mode == "idx":
            j = first | (b & ~segment & 31)
            p = j <= last
        else:
            j = LANES + b if mode == "down" else LANES ^ b
            p = j <= last
        return np.where(p, j, LANES), p

    fixed = (
        source_lanes(constant_b, constant_c) if constant_b is not None and constant_c is not None else None
    )

    def body(S, m):
        j, p = fixed or source_lanes(warps(b(S), S), warps(c(S), S))
        x = warps(a(S), S)
        r = x[:, j] if j.ndim == 1 else np.take_along_axis(x, j, 1)
        bits = member(S)
        if m is not None or (bits != U32(0xFFFFFFFF)).any():
            reach = members(S, m, member)
            j2 = np.broadcast_to(j, r.shape)
            ok = np.take_along_axis(reach, j2[:, :, None], 2)[:, :, 0]
            r = np.where(ok, r, UNDEFINED)
        put(S, np.ascontiguousarray(r).reshape(-1), m)
        if put_p:
            put_p(S, np.ascontiguousarray(np.broadcast_to(p, r.shape)).reshape(-1), m)

    return warp_wide(body, member)


@handles("vote")
def vote(D, ins):
    mods = Mods(ins)
    if not mods.flag("sync"):
        raise PtxError("unknown modifier", detail="vote without .sync")
    mode = mods.one_of("all", "any", "uni", "ballot")
    mods.type()
    mods.done()
    put = D.dst(ins.operands[0], "b32" if mode == "ballot" else "pred")
    p, member = D.predicate(ins.operands[1]), D.src(ins.operands[2], "b32")

    def body(S, m):
        reach = members(S, m, member)
        value = warps(p(S), S)[:, None, :]
        yes, no = reach & value, reach & ~value
        if mode == "ballot":
            r = (yes.astype(U64) << LANES.astype(U64)).sum(2).astype(U32)
        else:
            r = {"any": yes.any(2), "all": ~no.any(2), "uni": ~(yes.any(2) & no.any(2))}[mode]
        put(S, r.reshape(-1), m)

    return warp_wide(body, member)


@handles("activemask")
def activemask(D, ins):
    put = D.dst(ins.operands[0], "b32")

    def f(S, m):
        bits = S.lanes(m).reshape(-1, 32).astype(U64) << LANES.astype(U64)
        put(S, np.repeat(bits.sum(1).astype(U32), 32), m)

    return f


@handles("match")
def match(D, ins):
    mods = Mods(ins)
    mode = mods.one_of("any", "all")
    mods.flag("sync")
    t = mods.type()
    mods.done()
    outs = [x.strip() for x in ins.operands[0].split("|")]
    put = D.dst(outs[0], "b32")
    put_p = D.dst(outs[1], "pred") if len(outs) > 1 else None
    a, member = D.src(ins.operands[1], t), D.src(ins.operands[2], "b32")

    def body(S, m):
        x = warps(a(S), S)
        reach = members(S, m, member)
        same = x[:, :, None] == x[:, None, :]
        if mode == "all":
            all_same = ~(reach & ~same).any(2)
            bits = reach & all_same[:, :, None]
        else:
            bits = reach & same
        put(S, (bits.astype(U64) << LANES.astype(U64)).sum(2).astype(U32).reshape(-1), m)
        if put_p:
            put_p(S, all_same.reshape(-1), m)

    return warp_wide(body, member)


@handles("redux")
def redux(D, ins):
    mods = Mods(ins)
    mods.flag("sync")
    t = mods.type()
    op = mods.one_of("add", "min", "max", "and", "or", "xor")
    mods.done()
    put, a, member = D.dst(ins.operands[0], t), D.src(ins.operands[1], t), D.src(ins.operands[2], "b32")
    f, info = {
        "add": (np.add, 0),
        "min": (np.minimum, None),
        "max": (np.maximum, None),
        "and": (np.bitwise_and, -1),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[op]
    limits = np.iinfo(t.view)
    neutral = {"min": limits.max, "max": limits.min}.get(op, info)
    neutral = np.array([neutral & 0xFFFFFFFF], U64).astype(U32).view(t.view)[0]

    def body(S, m):
        x = np.where(members(S, m, member), warps(a(S), S)[:, None, :], neutral)
        put(S, f.reduce(x, axis=2, dtype=t.view).reshape(-1), m)

    return warp_wide(body, member)


# ---------------------------------------------------------------- barriers


@handles("bar", "barrier")
def barrier(D, ins):
    mods = Mods(ins)
    mods.drop("aligned|cta")
    if mods.flag("warp"):
        mods.flag("sync")
        mods.done()
        return warp_wide(lambda S, m: None, D.src(ins.operands[0], "b32"))
    kind = mods.one_of("sync", "arrive", "red", default="sync")
    reduce_op = mods.one_of("popc", "and", "or")
    if reduce_op:
        mods.type()
    mods.done()
    operands = list(ins.operands)
    target = operands.pop(0) if kind == "red" else None
    predicate = D.predicate(operands.pop()) if kind == "red" else None
    number = D.src(operands[0], "u32")
    count = D.src(operands[1], "u32") if len(operands) > 1 else None

    def arrive(S, m):
        here = S.lanes(m)
        ids, counts = S.full(number(S))[here], S.full(count(S))[here] if count else None
        barrier_id = int(ids[0])
        if (ids != barrier_id).any():
            raise PtxError("barrier number that differs between threads is not supported")
        if counts is not None and (counts % 32).any():
            raise Fault("barrier count is not a multiple of the warp size", None)
        if kind == "sync" and count is None and len(S.set.groups) == 1 and not (S.alive & ~here).any():
            if S.races:  # every thread of every block is here
                S.races.barrier(slice(None))
            return None
        S.set_pc(S.at + 1)
        if kind != "arrive":
            S.bar[here] = barrier_id
        p = None if predicate is None else S.full(predicate(S))[here]
        S.set.arrive(barrier_id, S.block[here], 0 if counts is None else counts.astype(np.int64), p)
        return RESELECT

    if kind != "red":
        return arrive
    put = D.dst(target, "u32" if reduce_op == "popc" else "pred")

    def result(S, m):
        threads, ones = (x[S.block] for x in S.set.result[int(number(S)[0])])
        put(S, {"popc": ones.astype(U32), "and": ones == threads, "or": ones > 0}[reduce_op], m)

    return [arrive, result]


# ---------------------------------------------------------------- matrices


@handles("ldmatrix")
def ldmatrix(D, ins):
    mods = Mods(ins)
    for part in ("sync", "aligned", "m8n8", "b16"):
        if not mods.flag(part):
            raise PtxError("unknown modifier", detail=f"ldmatrix without .{part}")
    n = int(mods.one_of("x1", "x2", "x4")[1])
    trans = mods.flag("trans")
    mods.drop("shared(::cta)?")
    mods.done()
    puts = [D.dst(x, "b32") for x in D.vector(ins.operands[0])]
    if len(puts) != n:
        raise PtxError("vector length does not match")
    _, address = D.address(ins.operands[1])

    def body(S, m):
        addr = address(S)
        uses = np.tile(8 * n > LANES, S.W)  # the lanes that give row addresses
        used = uses if m is None else uses & m
        S.fault_mask = used
        index = S.shared.index(S.block[used], addr[used], 16, 4)
        index = index[:, None] + np.arange(4)
        S.shared.check_written(index, 4)
        if S.races:
            S.races.read(index, 4, S.warp[used])
        count_shared(S, addr, None if used.all() else used, 16, "read")
        words = S.shared.words[4][index]  # [row, 4]
        if m is not None:
            words = _spread(words, used, uses)
        tiles = words.reshape(S.W, n, 8, 4)
        if trans:
            tiles = np.ascontiguousarray(tiles.view(U16).swapaxes(2, 3)).view(U32)
        for i, put in enumerate(puts):
            put(S, np.ascontiguousarray(tiles[:, i]).reshape(-1), m)

    return warp_wide(body)


def _spread(words, used, uses):
    out = np.zeros((len(uses), words.shape[1]), words.dtype)
    out[used] = words
    return out[uses]


def _elements(type_):
    """fn(u32 array) -> float64 elements, last axis = those of one register."""
    if type_ == "f16":
        return lambda x: x.view(np.float16).astype(F64)
    if type_ == "bf16":
        return lambda x: fl.bf16_bits_to_f32(x.view(U16)).astype(F64)
    return lambda x: (x & U32(0xFFFFE000)).view(F32).astype(F64)  # tf32: the low 13 bits are ignored


_MMA = {
    ("f16", "m16n8k16"),
    ("f16", "m16n8k8"),
    ("bf16", "m16n8k16"),
    ("bf16", "m16n8k8"),
    ("tf32", "m16n8k8"),
}


@handles("mma")
def mma(D, ins):
    """D = A B + C in fp32. The products and their sum with C are formed in float64 (products are exact there)
    and rounded once."""
    mods = Mods(ins)
    for part in ("sync", "aligned", "row", "col"):
        if not mods.flag(part):
            raise PtxError("unknown modifier", detail=f"mma without .{part}")
    shape, d_type, a_type, b_type, c_type = mods.left
    if (a_type, shape) not in _MMA or a_type != b_type or not d_type == c_type == "f32":
        raise PtxError("unknown modifier", detail="mma." + ".".join(mods.left))
    k = int(shape.partition("k")[2])
    per = 1 if a_type == "tf32" else 2  # elements in a register
    parts = k // (4 * per)  # pieces of k, each 4 lanes wide
    # A register i holds row g (+8 when i is odd), k piece i // 2; B register i: column g, k piece i,
    # where the lane is 4 g + t and the piece's elements are t * per ... (t + 1) * per - 1.
    load = _elements(a_type)
    names = [D.vector(x) for x in ins.operands]
    if [len(x) for x in names] != [4, 2 * parts, parts, 4]:
        raise PtxError("vector length does not match")
    puts = [D.dst(x, "b32") for x in names[0]]
    a, b, c = ([D.src(x, "b32") for x in v] for v in names[1:])

    def stack(gets, S):
        return np.stack([S.full(g(S)) for g in gets])

    def body(S, m):
        w = S.W
        A = load(stack(a, S)).reshape(parts, 2, w, 8, 4, per).transpose(2, 1, 3, 0, 4, 5).reshape(w, 16, k)
        B = load(stack(b, S)).reshape(parts, w, 8, 4, per).transpose(1, 0, 3, 4, 2).reshape(w, k, 8)
        C = stack(c, S).view(F32).astype(F64)
        # register i: row g + 8 (i // 2), column 2 t + i % 2
        r = A @ B + C.reshape(2, 2, w, 8, 4).transpose(2, 0, 3, 4, 1).reshape(w, 16, 8)
        r = r.astype(F32).reshape(w, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, w * 32)
        for put, v in zip(puts, r, strict=True):
            put(S, v, m)

    return warp_wide(body)
