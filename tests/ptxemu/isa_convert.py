"""Comparison and selection, movement between registers, conversion between types."""

import numpy as np

from . import floats as fl
from .decode import TYPES, Mods, handles
from .errors import PtxError
from .isa_float import HALF, half_load

U16, U32, U64, I64, F32, F64 = np.uint16, np.uint32, np.uint64, np.int64, np.float32, np.float64
# ---------------------------------------------------------------- comparison and selection

_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARE = dict(_ORDERED)
COMPARE |= {"ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def _nan(a, b):
    return np.isnan(a) | np.isnan(b)


COMPARE_FLOAT = dict(_ORDERED)
COMPARE_FLOAT |= {
    "ne": lambda a, b: (a != b) & ~_nan(a, b),
    "neu": np.not_equal,
    "equ": lambda a, b: (a == b) | _nan(a, b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_nan(a, b),
    "nan": _nan,
}
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(mods, t):
    """fn(a, b) of raw-view operands -> bool array (two columns for packed types)."""
    names = COMPARE_FLOAT if t.float else COMPARE
    name = mods.one_of(*names)
    if name is None:
        raise PtxError("unknown comparison", detail=".".join(mods.left))
    op, ftz = names[name], mods.flag("ftz")
    if t.name in HALF:
        load = half_load(t, ftz)
        return lambda a, b: op(load(a), load(b))
    return (lambda a, b: op(fl.ftz(a), fl.ftz(b))) if ftz and t.name == "f32" else op


@handles("setp")
def setp(D, ins):
    mods = Mods(ins)
    t = mods.type()
    compare = comparison(mods, t)
    combine = mods.one_of(*BOOLEAN)
    mods.done()
    puts = [D.dst(x.strip(), "pred") for x in ins.operands[0].split("|")]
    a, b = D.src(ins.operands[1], t), D.src(ins.operands[2], t)
    third = D.predicate(ins.operands[3]) if combine else None
    combine = BOOLEAN.get(combine)
    packed = t.name.endswith("x2")

    def f(S, m):
        r = compare(a(S), b(S))
        first, second = (r[:, 0], r[:, 1]) if packed else (r, None)
        if len(puts) == 2 and second is None:
            second = ~first
        if combine:
            c = third(S)
            first = combine(first, c)
            second = combine(second, c) if len(puts) == 2 else None
        puts[0](S, np.ascontiguousarray(first), m)
        if len(puts) == 2:
            puts[1](S, np.ascontiguousarray(second), m)

    return f


@handles("selp")
def selp(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    put, a, b = D.dst(ins.operands[0], t), D.src(ins.operands[1], t), D.src(ins.operands[2], t)
    p = D.predicate(ins.operands[3])
    return lambda S, m: put(S, np.where(p(S), a(S), b(S)), m)


# ---------------------------------------------------------------- mov and cvt


@handles("mov")
def mov(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    d, s = ins.operands
    if d.startswith("{"):
        parts = D.vector(d)
        part = TYPES[f"b{t.bits // len(parts)}"]  # unpack
        puts, get = [D.dst(x, part) for x in parts], D.src(s, TYPES[f"b{t.bits}"])

        def unpack(S, m):
            columns = np.ascontiguousarray(get(S)).view(part.raw).reshape(-1, len(puts))
            for i, put in enumerate(puts):
                put(S, np.ascontiguousarray(columns[:, i]), m)

        return unpack
    if s.startswith("{"):  # pack
        parts = D.vector(s)
        part = TYPES[f"b{t.bits // len(parts)}"]
        put, gets = D.dst(d, TYPES[f"b{t.bits}"]), [D.src(x, part) for x in parts]
        return lambda S, m: put(S, np.stack([S.full(g(S)) for g in gets], 1).view(t.raw).ravel(), m)
    put, get = D.dst(d, t), D.src(s, t)
    return lambda S, m: put(S, get(S), m)


def round_integral(x, mode):
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)


def float_to_int(x, t, mode):
    """Round and clamp to the integer type; NaN gives 0."""
    x = round_integral(x.astype(F64), mode)
    low, high = (-(2.0 ** (t.bits - 1)), 2.0 ** (t.bits - 1)) if t.signed else (0.0, 2.0**t.bits)
    inside = (x >= low) & (x < high)
    r = np.where(inside, x, 0.0)
    r = (
        r.astype(t.view)
        if t.signed or t.bits < 64
        else np.where(
            r < 2.0**63, r.astype(I64).view(U64), (r - 2.0**63).astype(I64).view(U64) + U64(1 << 63)
        )
    )
    info = np.iinfo(t.view)
    return np.where(x >= high, t.view.type(info.max), np.where(x < low, t.view.type(info.min), r))


def int_to_float(x, t, mode):
    """Integer array -> array of the float type (bf16: bits), one rounding."""
    if mode == "rn" and t.name in ("f32", "f64"):
        return x.astype(t.view)
    exact = x.astype(np.longdouble)  # 64 bits of mantissa: exact
    y = exact.astype(F64)
    y = fl._odd(y, (exact - y).astype(F64))
    return {"f32": fl.to_f32, "f16": fl.to_f16, "bf16": fl.to_bf16_bits}[t.name](y, mode)


def to_float_type(x, t, mode, ftz, sat):
    """float array -> array of t.view (bf16: bits)."""
    if ftz and x.dtype == F32:
        x = fl.ftz(x)
    if mode in ("rni", "rzi", "rmi", "rpi"):
        x = round_integral(x, mode)
        mode = "rn"
    if sat:
        x = fl.saturate(x)
    if t.name == "bf16":
        return fl.f32_to_bf16_bits(x, mode) if x.dtype == F32 else fl.to_bf16_bits(x.astype(F64), mode)
    if t.view == x.dtype:
        return x
    if t.name == "f64":
        return x.astype(F64)
    r = (
        x.astype(t.view)
        if mode == "rn"
        else {"f32": fl.to_f32, "f16": fl.to_f16}[t.name](x.astype(F64), mode)
    )
    if t.name == "f16":
        r = np.where(np.isnan(r), np.array([0x7FFF], U16).view(np.float16), r)
    return fl.ftz(r) if ftz and t.name == "f32" else r


@handles("cvt")
def cvt(D, ins):
    mods = Mods(ins)
    s = mods.type()
    d = mods.type()
    mode = mods.one_of("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna", default="rn")
    ftz, sat = mods.flag("ftz"), mods.flag("sat")
    if mods.flag("satfinite"):
        raise PtxError("unknown modifier", detail=".satfinite")
    mods.done()
    if d.name == "f64" and not s.float and mode != "rn":
        raise PtxError("unknown modifier", detail=f".{mode}.f64")
    if d.name in ("f16x2", "bf16x2"):  # d = {first source: high half, second: low half}
        put, half = D.dst(ins.operands[0], d), TYPES[d.name[:-2]]
        hi, lo = D.src(ins.operands[1], s), D.src(ins.operands[2], s)

        def pack(S, m):
            pair = [S.full(to_float_type(x(S), half, mode, ftz, sat).view(U16)) for x in (lo, hi)]
            put(S, np.stack(pair, 1).view(U32).ravel(), m)

        return pack
    if d.name == "tf32":
        if s.name != "f32" or mode != "rna":
            raise PtxError("unknown modifier", detail=f"cvt.{mode}.tf32.{s}")
        put, a = D.dst(ins.operands[0], "b32"), D.src(ins.operands[1], s)
        return lambda S, m: put(S, fl.to_tf32_rna(a(S)), m)
    put, a = D.dst(ins.operands[0], d, wide=True), D.src(ins.operands[1], s, wide=True)
    value = (lambda x: fl.bf16_bits_to_f32(x)) if s.name == "bf16" else (lambda x: x)
    if s.float and not d.float:
        flush = fl.ftz if ftz and s.name == "f32" else (lambda x: x)
        return lambda S, m: put(S, float_to_int(flush(value(a(S))), d, mode), m)
    if s.float:
        return lambda S, m: put(S, to_float_type(value(a(S)), d, mode, ftz, sat), m)
    if d.float:
        return lambda S, m: put(S, int_to_float(a(S), d, mode), m)
    if sat:
        info = np.iinfo(d.view)
        source = np.iinfo(s.view)
        low, high = max(info.min, source.min), min(info.max, source.max)
        return lambda S, m: put(S, np.clip(a(S), low, high).astype(d.view), m)
    return lambda S, m: put(S, a(S).astype(d.view), m)
