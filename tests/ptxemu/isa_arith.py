"""Arithmetic, logic, comparison, conversion and data movement between registers."""

import numpy as np

from . import floats as fl
from .decode import TYPES, Mods, handles
from .errors import PtxError

U8, U16, U32, U64, I32, I64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64
F32, F64 = np.float32, np.float64
ROUNDING = ("rn", "rz", "rm", "rp")
HALF = ("f16", "f16x2", "bf16", "bf16x2")


def emit(D, ins, type_, fn, n, dst_type=None):
    """Closure for d = fn(s1..sn), all operands of one type."""
    put = D.dst(ins.operands[0], dst_type or type_)
    s = [D.src(o, type_) for o in ins.operands[1 : 1 + n]]
    if len(ins.operands) != n + 1:
        raise PtxError("wrong number of operands", detail=f"{len(ins.operands)}, not {n + 1}")
    if n == 1:
        (a,) = s
        return lambda S, m: put(S, fn(a(S)), m)
    if n == 2:
        a, b = s
        return lambda S, m: put(S, fn(a(S), b(S)), m)
    a, b, c = s
    return lambda S, m: put(S, fn(a(S), b(S), c(S)), m)


# ---------------------------------------------------------------- half precision: computed in float64


def half_load(type_, ftz=False):
    """raw bits -> float64 values (packed types: two columns)."""
    bf16, packed = type_.name.startswith("b"), type_.name.endswith("x2")

    def load(bits):
        if packed:
            bits = np.ascontiguousarray(bits).view(U16).reshape(-1, 2)
        if bits.dtype != U16:
            bits = bits.view(U16)
        x = fl.bf16_bits_to_f32(bits) if bf16 else bits.view(np.float16)
        x = x.astype(F64)
        if ftz:
            x = np.where(np.abs(x) < (2.0**-126 if bf16 else 2.0**-14), np.copysign(0.0, x), x)
        return x

    return load


def half_store(type_, ftz=False, sat=False, relu=False):
    """float64 values -> raw bits."""
    bf16, packed = type_.name.startswith("b"), type_.name.endswith("x2")

    def store(x):
        if sat:
            x = fl.saturate(x)
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, 0.0))
        if bf16:
            bits = fl.to_bf16_bits(x)
        else:
            r = fl.to_f16(x)
            if ftz:
                r = np.where(np.abs(r) < 2.0**-14, np.copysign(np.float16(0), r), r)
            bits = np.where(np.isnan(r), U16(0x7FFF), r.view(U16))
        return np.ascontiguousarray(bits).reshape(-1).view(U32) if packed else bits

    return store


def float_op(D, ins, mods, type_, ops, n):
    """ops: name of precision -> fn(values..., mode)."""
    mode = mods.one_of(*ROUNDING, default="rn")
    ftz, sat, relu = mods.flag("ftz"), mods.flag("sat"), mods.flag("relu")
    mods.flag("approx", "full")  # approximations are computed correctly rounded
    mods.done()
    if mode != "rn" and (type_.name in HALF or (type_.name == "f64" and ins.op not in ALL_MODES_F64)):
        raise PtxError("unknown modifier", detail=f".{mode}.{type_}")
    if type_.name in HALF:
        load, store, op = half_load(type_, ftz), half_store(type_, ftz, sat, relu), ops["half"]

        def fn(*v):
            return store(op(*[load(x) for x in v], "rn"))
    elif type_.name == "f64":
        op = ops["f64"]

        def fn(*v):
            return op(*v, mode)
    else:
        op = ops["f32"]
        if ftz:

            def fn(*v):
                return fl.ftz(op(*[fl.ftz(x) for x in v], mode))
        elif mode == "rn":

            def fn(*v):
                return op(*v, "rn")
        else:

            def fn(*v):
                return op(*v, mode)

        if sat:
            inner = fn

            def fn(*v):
                return fl.saturate(inner(*v))

    return emit(D, ins, type_, fn, n)


def _wide32(op):
    """A float32 operation through float64: exact there or far more precise than float32."""
    return lambda *a: fl.to_f32(op(*[x.astype(F64) for x in a[:-1]]), a[-1])


def _rn_else_odd(fast, odd):
    return lambda a, b, mode: (
        fast(a, b) if mode == "rn" else fl.to_f32(odd(a.astype(F64), b.astype(F64)), mode)
    )


def _nearest(op):
    """An operation that is here in rounding mode rn only (see float_op)."""
    return lambda *a: op(*a[:-1])


ALL_MODES_F64 = ("add", "sub", "mul")
FLOAT_OPS = {
    "add": {
        "f32": _rn_else_odd(np.add, fl.add_odd),
        "f64": fl.add_f64,
        "half": lambda a, b, _: fl.add_odd(a, b),
    },
    "sub": {
        "f32": _rn_else_odd(np.subtract, lambda a, b: fl.add_odd(a, -b)),
        "f64": lambda a, b, m: fl.add_f64(a, -b, m),
        "half": lambda a, b, _: fl.add_odd(a, -b),
    },
    "mul": {"f32": _rn_else_odd(np.multiply, np.multiply), "f64": fl.mul_f64, "half": lambda a, b, _: a * b},
    "div": {
        "f32": lambda a, b, m: a / b if m == "rn" else fl.to_f32(a.astype(F64) / b, m),
        "f64": _nearest(np.divide),
        "half": None,
    },
    "fma": {"f32": fl.fma_f32, "f64": _nearest(fl.fma_f64), "half": _nearest(fl.fma_odd)},
}
for _name, _f in {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "lg2": np.log2,
    "ex2": np.exp2,
    "tanh": np.tanh,
}.items():
    FLOAT_OPS[_name] = {"f32": _wide32(_f), "f64": _nearest(_f), "half": _nearest(_f)}


@handles("fma", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")
def float_only(D, ins):
    mods = Mods(ins)
    return float_op(D, ins, mods, mods.type(), FLOAT_OPS[ins.op], 3 if ins.op == "fma" else 1)


@handles("min", "max")
def min_max(D, ins):
    mods = Mods(ins)
    t = mods.type()
    largest = ins.op == "max"
    if not t.float:
        mods.done()
        return emit(D, ins, t, np.maximum if largest else np.minimum, 2)
    nan = mods.flag("NaN")

    def op(*a):
        return fl.minmax(a[0], a[1], largest, nan)

    n = len(ins.operands) - 1
    return float_op(D, ins, mods, t, {"f32": op, "f64": op, "half": op}, n)


@handles("neg", "abs")
def neg_abs(D, ins):
    mods = Mods(ins)
    t = mods.type()
    ftz = mods.flag("ftz")
    mods.done()
    if not t.float:
        return emit(D, ins, t, np.negative if ins.op == "neg" else np.abs, 1)
    sign = {16: 0x8000, 32: 0x80008000 if t.name.endswith("x2") else 0x80000000, 64: 1 << 63}[t.bits]
    sign = t.raw.type(sign)
    flush = fl.ftz if ftz and t.name == "f32" else lambda x: x
    flip = (lambda b: b ^ sign) if ins.op == "neg" else (lambda b: b & ~sign)
    return emit(D, ins, t, lambda x: flip(flush(x).view(t.raw)), 1)


@handles("copysign")
def copysign(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    return emit(D, ins, t, lambda a, b: np.copysign(b, a), 2)


@handles("testp")
def testp(D, ins):
    mods = Mods(ins)
    t = mods.type()
    tiny = np.finfo(t.view).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }[mods.left.pop()]
    mods.done()
    return emit(D, ins, t, test, 1, TYPES["pred"])


# ---------------------------------------------------------------- integers


def mul_high(a, b):
    """High half of the product, for 16-, 32- or 64-bit arrays, signed or not."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * size)).astype(a.dtype)
    x, y = a.view(U64), b.view(U64)
    low, s = U64(0xFFFFFFFF), U64(32)
    x0, x1, y0, y1 = x & low, x >> s, y & low, y >> s
    mid = x1 * y0 + (x0 * y0 >> s)
    high = x1 * y1 + (mid >> s) + (x0 * y1 + (mid & low) >> s)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.view(a.dtype)


def wide_product(t):
    wide = TYPES[f"{'s' if t.signed else 'u'}{2 * t.bits}"]
    return wide, lambda a, b: a.astype(wide.view) * b.astype(wide.view)


def add_sat_s32(a, b):
    return np.clip(a.astype(I64) + b, -(2**31), 2**31 - 1).astype(I32)


@handles("add", "sub")
def add_sub(D, ins):
    mods = Mods(ins)
    t = mods.type()
    if t.float:
        return float_op(D, ins, mods, t, FLOAT_OPS[ins.op], 2)
    carry_out, sat = mods.flag("cc"), mods.flag("sat")
    mods.done()
    if carry_out:
        return with_carry(D, ins, t, subtract=ins.op == "sub", carry_in=False, carry_out=True)
    if sat:
        return emit(
            D, ins, t, add_sat_s32 if ins.op == "add" else lambda a, b: add_sat_s32(a, -b.astype(I64)), 2
        )
    return emit(D, ins, t, np.add if ins.op == "add" else np.subtract, 2)


@handles("addc", "subc")
def addc(D, ins):
    mods = Mods(ins)
    t = mods.type()
    out = mods.flag("cc")
    mods.done()
    return with_carry(D, ins, t, subtract=ins.op == "subc", carry_in=True, carry_out=out)


def with_carry(D, ins, t, subtract, carry_in, carry_out, product=None):
    """d = a +- b (+- carry); with `product`, a = product(s1, s2) and b is the third source."""
    put, slot, raw = D.dst(ins.operands[0], t), D.carry(), t.raw
    s = [D.src(o, TYPES[f"u{t.bits}"] if product is None else t) for o in ins.operands[1:]]

    def f(S, m):
        if product is None:
            a, b = s[0](S), s[1](S)
        else:
            a, b = product(s[0](S), s[1](S)).view(raw), s[2](S).view(raw)
        r = a - b if subtract else a + b
        carry = a < b if subtract else r < a
        if carry_in:
            c = S.r[slot].astype(raw)
            r2 = r - c if subtract else r + c
            carry = carry | (r < c if subtract else r2 < r)
            r = r2
        put(S, r, m)
        if carry_out:
            S.r[slot] = S.full(carry) if m is None else np.where(m, carry, S.r[slot])

    return f


@handles("mul", "mad", "madc")
def mul_mad(D, ins):
    mods = Mods(ins)
    t = mods.type()
    if t.float:
        return float_op(
            D, ins, mods, t, FLOAT_OPS["fma" if ins.op == "mad" else "mul"], 3 if ins.op == "mad" else 2
        )
    part = mods.one_of("lo", "hi", "wide")
    carry_out = mods.flag("cc")
    mods.done()
    product = {"lo": np.multiply, "hi": mul_high, "wide": None}[part] if part else None
    if carry_out or ins.op == "madc":
        return with_carry(D, ins, t, False, ins.op == "madc", carry_out, product)
    if part == "wide":
        wide, product = wide_product(t)
        put = D.dst(ins.operands[0], wide)
        a, b = D.src(ins.operands[1], t), D.src(ins.operands[2], t)
        if ins.op == "mul":
            return lambda S, m: put(S, product(a(S), b(S)), m)
        c = D.src(ins.operands[3], wide)
        return lambda S, m: put(S, product(a(S), b(S)) + c(S), m)
    if ins.op == "mul":
        return emit(D, ins, t, product, 2)
    return emit(D, ins, t, lambda a, b, c: product(a, b) + c, 3)


def int_div(a, b):
    zero = b == 0
    b = np.where(zero, np.ones_like(b), b)
    q = (a - np.fmod(a, b)) // b
    return np.where(zero, ~np.zeros_like(q), q)  # division by zero: all ones, as GPUs give


def int_rem(a, b):
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, np.ones_like(b), b)))


@handles("div", "rem")
def div_rem(D, ins):
    mods = Mods(ins)
    t = mods.type()
    if t.float:
        return float_op(D, ins, mods, t, FLOAT_OPS["div"], 2)
    mods.done()
    return emit(D, ins, t, int_div if ins.op == "div" else int_rem, 2)


@handles("sad")
def sad(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    return emit(D, ins, t, lambda a, b, c: c + np.where(a > b, a - b, b - a), 3)


@handles("and", "or", "xor")
def bitwise(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    return emit(D, ins, t, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.op], 2)


@handles("not")
def bitwise_not(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    return emit(D, ins, t, np.invert, 1)


@handles("lop3")
def lop3(D, ins):
    mods = Mods(ins)
    mods.type()
    mods.done()
    put = D.dst(ins.operands[0], "b32")
    a, b, c = (D.src(o, "b32") for o in ins.operands[1:4])
    table = int(ins.operands[4], 0)

    def f(S, m):
        x, y, z = a(S), b(S), c(S)
        r = np.zeros(1, U32)
        for i in range(8):
            if table >> i & 1:
                r = r | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        put(S, r, m)

    return f


@handles("shl", "shr")
def shift(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    put = D.dst(ins.operands[0], t)
    a, by = D.src(ins.operands[1], t), D.src(ins.operands[2], "u32")
    op, top = np.left_shift if ins.op == "shl" else np.right_shift, U32(t.bits)
    if t.signed:  # an arithmetic shift by the width or more gives the sign
        top = U32(t.bits - 1) if ins.op == "shr" else top
    # numpy: a shift by the width or more gives 0

    def f(S, m):
        put(S, op(a(S), np.minimum(by(S), top).astype(t.view)), m)

    return f


@handles("shf")
def funnel_shift(D, ins):
    mods = Mods(ins)
    mods.type()
    left, wrap = mods.one_of("l", "r") == "l", mods.one_of("wrap", "clamp") == "wrap"
    mods.done()

    def f(lo, hi, n):
        n = ((n & U32(31)) if wrap else np.minimum(n, U32(32))).astype(U64)
        x = (hi.astype(U64) << U64(32)) | lo
        return ((x << n) >> U64(32) if left else x >> n).astype(U32)

    return emit(D, ins, TYPES["b32"], f, 3)


@handles("bfe")
def bit_extract(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    put, a = D.dst(ins.operands[0], t), D.src(ins.operands[1], t)
    pos, length = D.src(ins.operands[2], "u32"), D.src(ins.operands[3], "u32")
    wide = I64 if t.signed else U64

    def f(S, m):
        p = np.minimum(pos(S) & U32(255), U32(63 if t.signed else 64)).astype(wide)
        n = length(S) & U32(255)
        x = a(S).astype(wide) >> p
        up = np.where(n < 64, 64 - n.astype(I64), 0).astype(wide)
        x = np.where(n == 0, wide(0), (x << up) >> up)
        put(S, x.astype(t.view), m)

    return f


@handles("bfi")
def bit_insert(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    put, a, b = D.dst(ins.operands[0], t), D.src(ins.operands[1], t), D.src(ins.operands[2], t)
    pos, length = D.src(ins.operands[3], "u32"), D.src(ins.operands[4], "u32")

    def f(S, m):
        p = np.minimum(pos(S) & U32(255), U32(64)).astype(U64)
        n = np.minimum(length(S) & U32(255), U32(64)).astype(U64)
        field = ((U64(1) << n) - U64(1)) << p  # a shift by 64 gives 0, so n = 64 gives all ones
        x = (b(S).astype(U64) & ~field) | ((a(S).astype(U64) << p) & field)
        put(S, x.astype(t.raw), m)

    return f


@handles("bmsk", "szext")
def bit_mask(D, ins):
    """bmsk: b ones from bit a up. szext: the low b bits of a, sign or zero extended."""
    mods = Mods(ins)
    t = mods.type()
    limit = (
        (lambda x: x & U32(31))
        if mods.one_of("clamp", "wrap") == "wrap"
        else (lambda x: np.minimum(x, U32(32)))
    )
    mods.done()
    put, a, b = D.dst(ins.operands[0], t), D.src(ins.operands[1], t), D.src(ins.operands[2], "u32")
    wide = I64 if t.signed else U64

    def f(S, m):
        if ins.op == "bmsk":
            r = ((U64(1) << limit(b(S)).astype(U64)) - U64(1)) << limit(a(S)).astype(U64)
        else:
            up = wide(64) - limit(b(S)).astype(wide)
            r = np.where(up == 64, wide(0), a(S).astype(wide) << up >> np.minimum(up, wide(63)))
        put(S, r.astype(t.view), m)

    return f


def top_bit(x):
    """Position of the highest set bit (int64), -1 for 0."""
    x = x.astype(U64)
    high, low = (x >> U64(32)).astype(F64), (x & U64(0xFFFFFFFF)).astype(F64)
    return np.where(high > 0, np.frexp(high)[1] + 31, np.frexp(low)[1] - 1)


@handles("bfind")
def bfind(D, ins):
    mods = Mods(ins)
    t = mods.type()
    amount = mods.flag("shiftamt")
    mods.done()

    def f(a):
        p = top_bit((np.where(a < 0, ~a, a) if t.signed else a).view(t.raw))
        return np.where(amount & (p >= 0), t.bits - 1 - p, p).astype(I64).astype(U32)

    return emit(D, ins, t, f, 1, TYPES["u32"])


@handles("clz", "popc")
def clz_popc(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    f = (
        (lambda a: (t.bits - 1 - top_bit(a)).astype(U32))
        if ins.op == "clz"
        else (lambda a: np.bitwise_count(a).astype(U32))
    )
    return emit(D, ins, t, f, 1, TYPES["u32"])


@handles("brev")
def brev(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()

    def f(a):
        b = np.unpackbits(a.view(U8).reshape(-1, t.bytes), axis=1, bitorder="little")
        return np.packbits(b[:, ::-1], axis=1, bitorder="little").view(t.raw).ravel()

    return emit(D, ins, t, f, 1)


_PRMT = {  # selector & 3 -> source bytes of d.b0 .. d.b3
    "f4e": [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)],
    "b4e": [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)],
    "rc8": [(i, i, i, i) for i in range(4)],
    "ecl": [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)],
    "ecr": [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
    "rc16": [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)],
}


@handles("prmt")
def prmt(D, ins):
    mods = Mods(ins)
    mods.type()
    table = _PRMT.get(mods.one_of(*_PRMT))
    mods.done()
    table = None if table is None else np.array(table)

    def f(a, b, c):
        a, b, c = np.broadcast_arrays(a, b, c)
        data = np.stack([a, b], 1).view(U8)  # bytes of {b, a}
        if table is not None:
            r = np.take_along_axis(data, table[c & U32(3)], 1)
        else:
            nibble = (c[:, None] >> np.arange(0, 16, 4, dtype=U32)) & U32(15)
            r = np.take_along_axis(data, (nibble & U32(7)).astype(I64), 1)
            r = np.where(nibble & U32(8), (r.view(np.int8) >> 7).view(U8), r)
        return np.ascontiguousarray(r).view(U32).ravel()

    return emit(D, ins, TYPES["b32"], f, 3)


@handles("dp4a", "dp2a")
def dot_product(D, ins):
    mods = Mods(ins)
    high = 2 if mods.one_of("lo", "hi") == "hi" else 0
    types = [TYPES[mods.left.pop(0)] for _ in range(2)]
    mods.done()
    signs = ["i" if t.signed else "u" for t in types]
    put = D.dst(ins.operands[0], "b32")
    a, b, c = (D.src(o, "b32") for o in ins.operands[1:4])

    def f(S, m):
        x, y = np.ascontiguousarray(a(S)), np.ascontiguousarray(b(S)).view(f"{signs[1]}1").reshape(-1, 4)
        if ins.op == "dp4a":
            x = x.view(f"{signs[0]}1").reshape(-1, 4)
        else:
            x, y = x.view(f"{signs[0]}2").reshape(-1, 2), y[:, high : high + 2]
        put(S, (x.astype(I64) * y.astype(I64)).sum(1).astype(U32) + c(S), m)

    return f


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


@handles("set")
def set_(D, ins):
    mods = Mods(ins)
    t = mods.type()
    d = mods.type()
    compare = comparison(mods, t)
    combine = mods.one_of(*BOOLEAN)
    mods.done()
    put, a, b = D.dst(ins.operands[0], d), D.src(ins.operands[1], t), D.src(ins.operands[2], t)
    third = D.predicate(ins.operands[3]) if combine else None
    combine, packed = BOOLEAN.get(combine), t.name.endswith("x2")
    if d.name == "f16x2" or d.name == "bf16x2":
        one, element = (0x3C00 if d.name == "f16x2" else 0x3F80), U16
    else:
        one = np.ones(1, d.view).view(d.raw)[0] if d.float else (1 << (16 if packed else d.bits)) - 1
        element = U16 if packed else d.raw.type

    def f(S, m):
        r = compare(a(S), b(S))
        if combine:
            r = combine(r, third(S)[:, None] if packed else third(S))
        r = np.where(r, element(one), element(0))
        put(S, np.ascontiguousarray(r).reshape(-1).view(d.raw), m)

    return f


@handles("selp")
def selp(D, ins):
    mods = Mods(ins)
    t = mods.type()
    mods.done()
    put, a, b = D.dst(ins.operands[0], t), D.src(ins.operands[1], t), D.src(ins.operands[2], t)
    p = D.predicate(ins.operands[3])
    return lambda S, m: put(S, np.where(p(S), a(S), b(S)), m)


@handles("slct")
def slct(D, ins):
    mods = Mods(ins)
    c_type = mods.type()
    t = mods.type()
    mods.flag("ftz")
    mods.done()
    put, a, b = D.dst(ins.operands[0], t), D.src(ins.operands[1], t), D.src(ins.operands[2], t)
    c = D.src(ins.operands[3], c_type)
    return lambda S, m: put(S, np.where(c(S) >= 0, a(S), b(S)), m)


# ---------------------------------------------------------------- mov and cvt


@handles("mov")
def mov(D, ins):
    mods = Mods(ins)
    vector = mods.one_of("v2", "v4")
    t = mods.type()
    mods.done()
    d, s = ins.operands
    if vector:  # element by element
        pairs = [(D.src(x, t), D.dst(y, t)) for x, y in zip(D.vector(s), D.vector(d), strict=True)]

        def move(S, m):
            for value, put in [(get(S), put) for get, put in pairs]:
                put(S, value, m)

        return move
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
    if t.name == "f64" and mode == "rn":
        return x.astype(F64)
    if t.name == "f32" and mode == "rn":
        return x.astype(F32)
    exact = x.astype(np.longdouble)  # 64 bits of mantissa: exact
    y = exact.astype(F64)
    y = fl._odd(y, (exact - y).astype(F64))
    if t.name == "f64":
        r = exact.astype(F64)
        return fl._step_f64(r, (exact - r).astype(F64), mode)
    return {"f32": fl.to_f32, "f16": fl.to_f16, "bf16": fl.to_bf16_bits}[t.name](y, mode)


def to_float_type(x, t, mode, ftz, sat, relu):
    """float array -> array of t.view (bf16: bits)."""
    if ftz and x.dtype == F32:
        x = fl.ftz(x)
    if mode in ("rni", "rzi", "rmi", "rpi"):
        x = round_integral(x, mode)
        mode = "rn"
    if sat:
        x = fl.saturate(x)
    if relu:
        x = np.where((x > 0) | np.isnan(x), x, np.zeros_like(x))
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
    ftz, sat, relu = mods.flag("ftz"), mods.flag("sat"), mods.flag("relu")
    if mods.flag("satfinite"):
        raise PtxError("unknown modifier", detail=".satfinite")
    mods.done()
    if d.name in ("f16x2", "bf16x2"):  # d = {first source: high half, second: low half}
        put, half = D.dst(ins.operands[0], d), TYPES[d.name[:-2]]
        hi, lo = D.src(ins.operands[1], s), D.src(ins.operands[2], s)

        def pack(S, m):
            pair = [S.full(to_float_type(x(S), half, mode, ftz, sat, relu).view(U16)) for x in (lo, hi)]
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
        return lambda S, m: put(S, to_float_type(value(a(S)), d, mode, ftz, sat, relu), m)
    if d.float:
        return lambda S, m: put(S, int_to_float(a(S), d, mode), m)
    if sat:
        info = np.iinfo(d.view)
        source = np.iinfo(s.view)
        low, high = max(info.min, source.min), min(info.max, source.max)
        return lambda S, m: put(S, np.clip(a(S), low, high).astype(d.view), m)
    return lambda S, m: put(S, a(S).astype(d.view), m)
