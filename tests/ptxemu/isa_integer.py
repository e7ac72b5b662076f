"""Integer arithmetic and logic."""

import numpy as np

from .decode import TYPES, Mods, emit, handles
from .isa_float import FLOAT_OPS, float_op

U8, U32, U64, I64, F64 = np.uint8, np.uint32, np.uint64, np.int64, np.float64


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


@handles("add", "sub")
def add_sub(D, ins):
    mods = Mods(ins)
    t = mods.type()
    if t.float:
        return float_op(D, ins, mods, t, FLOAT_OPS[ins.op], 2)
    carry_out = mods.flag("cc")
    mods.done()
    if carry_out:
        return with_carry(D, ins, t, subtract=ins.op == "sub", carry_in=False, carry_out=True)
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


@handles("bmsk")
def bit_mask(D, ins):
    """b ones from bit a up."""
    mods = Mods(ins)
    mods.type()
    wrap = mods.one_of("clamp", "wrap") == "wrap"
    mods.done()

    def f(a, b):
        a, b = ((x & U32(31) if wrap else np.minimum(x, U32(32))).astype(U64) for x in (a, b))
        return (((U64(1) << b) - U64(1)) << a).astype(U32)

    return emit(D, ins, TYPES["b32"], f, 2)


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


@handles("prmt")
def prmt(D, ins):
    mods = Mods(ins)
    mods.type()
    mods.done()

    def f(a, b, c):
        a, b, c = np.broadcast_arrays(a, b, c)
        data = np.stack([a, b], 1).view(U8)  # bytes of {b, a}
        nibble = (c[:, None] >> np.arange(0, 16, 4, dtype=U32)) & U32(15)
        r = np.take_along_axis(data, (nibble & U32(7)).astype(I64), 1)
        r = np.where(nibble & U32(8), (r.view(np.int8) >> 7).view(U8), r)
        return np.ascontiguousarray(r).view(U32).ravel()

    return emit(D, ins, TYPES["b32"], f, 3)
