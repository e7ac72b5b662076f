"""Semantics of single instructions against Python integers, exact fractions and numpy."""

# ruff: noqa: E501 (PTX stands on long lines)

from fractions import Fraction

import numpy as np
import pytest
from emu_util import bf16, bf16_value, run_body
from ptxemu import PtxError

rng = np.random.default_rng(7)
F32_BITS = np.array(
    [
        0,
        0x80000000,
        1,
        0x80000001,
        0x007FFFFF,
        0x00800000,
        0x3F800000,
        0xBF800000,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x3F800001,
        0x33800000,
        0x4B000000,
        0x4B000001,
        0x4F000000,
        0xCF000000,
        0x3F000000,
        0x3FC00000,
        0x40200000,
        0x477FE000,
        0x477FF000,
        0x33000000,
        0x38800000,
    ],
    np.uint32,
)


def f32_values(n=4000):
    special = F32_BITS.view(np.float32)
    bits = rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    near = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4, n)).astype(np.float32)
    return np.concatenate([special, bits, near])


def halves(n):
    with np.errstate(all="ignore"):
        return f32_values(n).astype(np.float16)


def pairs():
    """Every pair of special values, then random ones."""
    s = F32_BITS.view(np.float32)
    a, b = np.repeat(s, len(s)), np.tile(s, len(s))
    return np.concatenate([a, rng.permutation(f32_values(150))]), np.concatenate(
        [b, rng.permutation(f32_values(150))]
    )


def chunks(*arrays, size=1024):
    for i in range(0, len(arrays[0]), size):
        yield [a[i : i + size] for a in arrays]


def run(body, inputs, outputs):
    """As run_body, for any number of elements."""
    outs = []
    for part in chunks(*[a for _, a in inputs]):
        r = run_body(body, [(t, p) for (t, _), p in zip(inputs, part, strict=True)], outputs)
        outs.append(r if isinstance(r, list) else [r])
    joined = [np.concatenate(x) for x in zip(*outs, strict=True)]
    return joined if len(joined) > 1 else joined[0]


def same(got, want):
    """Equal bits, all NaNs alike."""
    got, want = np.asarray(got), np.asarray(want).astype(np.asarray(got).dtype)
    ok = (got == want) & (np.signbit(got) == np.signbit(want)) if got.dtype.kind == "f" else got == want
    if got.dtype.kind == "f":
        ok |= np.isnan(got) & np.isnan(want)
    assert ok.all(), (np.flatnonzero(~ok)[:5], got[~ok][:5], want[~ok][:5])


def round_fraction(x, digits, min_exp, mode):
    """x rounded to `digits` significant bits, exponents not below min_exp (of the last bit)."""
    if x == 0:
        return Fraction(0)
    e = (abs(x.numerator).bit_length() - x.denominator.bit_length()) - digits
    while abs(x) / Fraction(2) ** e >= 2**digits:
        e += 1
    e = max(e, min_exp)
    y = x / Fraction(2) ** e
    low = y.numerator // y.denominator
    rest = y - low
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2)
    else:
        up = rest > 0 and (mode == "rp" or (mode == "rz" and x < 0))
    return Fraction(low + up) * Fraction(2) ** e


def finite(*arrays):
    ok = np.ones(len(arrays[0]), bool)
    for a in arrays:
        ok &= np.isfinite(a)
    return ok


# ---------------------------------------------------------------- integers

INT_OPS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: int(Fraction(a, b)) if b else -1,
    "rem": lambda a, b: a - b * int(Fraction(a, b)) if b else a,
}


def ints(type_, n=400):
    bits = int(type_[1:])
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if type_[0] == "s" else (0, 2**bits - 1)
    special = [0, 1, 2, 3, 7, hi, hi - 1, lo, lo + 1, hi // 2, hi // 3]
    dt = f"{'i' if type_[0] == 's' else 'u'}{bits // 8}"
    a = np.array(
        special * len(special) + [int(x) for x in rng.integers(lo, hi, n, endpoint=True, dtype=dt)], dt
    )
    b = np.array(
        [x for x in special for _ in special]
        + [
            int(x) >> int(s)
            for x, s in zip(
                rng.integers(lo, hi, n, endpoint=True, dtype=dt), rng.integers(0, bits, n), strict=True
            )
        ],
        dt,
    )
    return a, b


def wrap(values, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([v & ((1 << bits) - 1) for v in values], f"u{bits // 8}").view(dtype)


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("op", list(INT_OPS))
def test_integer_arithmetic(op, type_):
    a, b = ints(type_)
    if op in ("div", "rem") and type_[0] == "s":  # INT_MIN / -1 is not defined
        keep = ~((a == np.iinfo(a.dtype).min) & (b == -1))
        a, b = a[keep], b[keep]
    got = run(f"{op}.{type_} o0, i0, i1;", [(type_, a), (type_, b)], [(type_, a.dtype)])
    same(got, wrap([INT_OPS[op](int(x), int(y)) for x, y in zip(a, b, strict=True)], a.dtype))


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_multiply_high_wide_mad(type_):
    a, b = ints(type_)
    bits = int(type_[1:])
    c = a[::-1].copy()
    got = run(
        f"mul.hi.{type_} o0, i0, i1; mad.lo.{type_} o1, i0, i1, i2;"
        + (f"mad.hi.{type_} o2, i0, i1, i2;" if bits > 16 else "mov.b16 o2, i0;"),
        [(type_, a), (type_, b), (type_, c)],
        [(type_, a.dtype)] * 3,
    )
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    same(got[0], wrap([p >> bits for p in products], a.dtype))
    same(got[1], wrap([p + int(z) for p, z in zip(products, c, strict=True)], a.dtype))
    if bits > 16:
        same(got[2], wrap([(p >> bits) + int(z) for p, z in zip(products, c, strict=True)], a.dtype))
    if bits < 64:
        wide = f"{type_[0]}{2 * bits}"
        dt = f"{a.dtype.kind}{bits // 4}"
        d = np.arange(len(a)).astype(dt)
        got = run(
            f"mul.wide.{type_} o0, i0, i1; mad.wide.{type_} o1, i0, i1, i2;",
            [(type_, a), (type_, b), (wide, d)],
            [(wide, dt)] * 2,
        )
        same(got[0], wrap(products, dt))
        same(got[1], wrap([p + int(z) for p, z in zip(products, d, strict=True)], dt))


def test_carry_chains():
    a, b = ints("u64")
    lo = run(
        "mov.b64 {t0,t1}, i0; mov.b64 {t2,t3}, i1; add.cc.u32 t4, t0, t2; addc.u32 t5, t1, t3; mov.b64 o0, {t4,t5};"
        "sub.cc.u32 t4, t0, t2; subc.u32 t5, t1, t3; mov.b64 o1, {t4,t5};"
        "mul.lo.u32 t4, t0, t2; mul.hi.u32 t5, t0, t2; mad.lo.cc.u32 t5, t0, t3, t5; madc.hi.u32 t6, t0, t3, 0;"
        "mov.b64 o2, {t5,t6};",
        [("u64", a), ("u64", b)],
        [("u64", np.uint64)] * 3,
    )
    same(lo[0], wrap([int(x) + int(y) for x, y in zip(a, b, strict=True)], np.uint64))
    same(lo[1], wrap([int(x) - int(y) for x, y in zip(a, b, strict=True)], np.uint64))
    a0, b0, b1 = a.astype(object) % 2**32, b.astype(object) % 2**32, b.astype(object) >> 32
    same(lo[2], wrap([x * y1 + (x * y0 >> 32) for x, y0, y1 in zip(a0, b0, b1, strict=True)], np.uint64))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    a, _ = ints(f"u{bits}")
    n = np.resize(np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 2**31], np.uint32), len(a))
    got = run(
        f"shl.b{bits} o0, i0, i1; shr.u{bits} o1, i0, i1; shr.s{bits} o2, i0, i1;",
        [(f"u{bits}", a), ("u32", n)],
        [(f"u{bits}", a.dtype)] * 3,
    )
    signed = [int(x) for x in a.view(f"i{bits // 8}")]
    same(got[0], wrap([int(x) << min(int(k), 64) for x, k in zip(a, n, strict=True)], a.dtype))
    same(got[1], wrap([int(x) >> int(min(k, 64)) for x, k in zip(a, n, strict=True)], a.dtype))
    same(got[2], wrap([x >> int(min(k, 64)) for x, k in zip(signed, n, strict=True)], a.dtype))


def test_funnel_shift():
    a, b = ints("u32")
    n = np.resize(np.arange(0, 70, dtype=np.uint32), len(a))
    got = run(
        "shf.l.wrap.b32 o0,i0,i1,i2; shf.r.wrap.b32 o1,i0,i1,i2; shf.l.clamp.b32 o2,i0,i1,i2; shf.r.clamp.b32 o3,i0,i1,i2;",
        [("u32", a), ("u32", b), ("u32", n)],
        [("u32", np.uint32)] * 4,
    )
    x = [(int(h) << 32) | int(l) for l, h in zip(a, b, strict=True)]
    same(got[0], wrap([(v << (int(k) & 31)) >> 32 for v, k in zip(x, n, strict=True)], np.uint32))
    same(got[1], wrap([v >> (int(k) & 31) for v, k in zip(x, n, strict=True)], np.uint32))
    same(got[2], wrap([(v << min(int(k), 32)) >> 32 for v, k in zip(x, n, strict=True)], np.uint32))
    same(got[3], wrap([v >> min(int(k), 32) for v, k in zip(x, n, strict=True)], np.uint32))


def test_lop3_every_table():
    a, b, c = (rng.integers(0, 2**32, 64, dtype=np.uint32) for _ in range(3))
    for table in [0, 1, 0x80, 0x96, 0xC0, 0xE8, 0xF8, 0xFF, 0x6A, 0x1B, 0xB1, 0xCA]:
        got = run(
            f"lop3.b32 o0, i0, i1, i2, {table};", [("u32", a), ("u32", b), ("u32", c)], [("u32", np.uint32)]
        )
        want = np.zeros(64, np.uint32)
        for bit in range(32):
            i = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
            want |= ((table >> i) & 1).astype(np.uint32) << np.uint32(bit)
        same(got, want)


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bit_fields(type_):
    bits = int(type_[1:])
    a, b = ints(type_)
    n = len(a)
    pos = np.resize(np.array([0, 1, 7, 16, 31, 32, 40, 63, 64, 100, 255], np.uint32), n)
    length = np.resize(np.array([0, 1, 2, 8, 31, 32, 33, 63, 64, 70, 255, 256 + 5], np.uint32), n)

    def extract(x, p, k):
        p, k, x = p & 255, k & 255, x & ((1 << bits) - 1)
        sign = 0 if type_[0] == "u" or k == 0 else x >> min(p + k - 1, bits - 1) & 1
        return sum(((x >> (p + i) & 1) if i < k and p + i < bits else sign) << i for i in range(bits))

    ins_t = f"b{bits}"
    got = run(
        f"bfe.{type_} o0, i0, i2, i3; bfi.{ins_t} o1, i0, i1, i2, i3;",
        [(type_, a), (type_, b), ("u32", pos), ("u32", length)],
        [(type_, a.dtype)] * 2,
    )
    same(
        got[0],
        wrap([extract(int(x), int(p), int(k)) for x, p, k in zip(a, pos, length, strict=True)], a.dtype),
    )

    def insert(x, y, p, k):
        p, k = p & 255, k & 255
        y &= (1 << bits) - 1
        for i in range(k):
            if p + i < bits and i < bits:
                y = (y & ~(1 << (p + i))) | ((x >> i & 1) << (p + i))
        return y

    same(
        got[1],
        wrap(
            [insert(int(x), int(y), int(p), int(k)) for x, y, p, k in zip(a, b, pos, length, strict=True)],
            a.dtype,
        ),
    )


def test_bit_masks():
    a, _ = ints("u32")
    pos, width = (
        np.resize(np.array(v, np.uint32), len(a))
        for v in ([0, 1, 5, 31, 32, 33, 100], [0, 1, 4, 8, 16, 31, 32, 33, 60, 64, 255])
    )
    got = run(
        "bmsk.clamp.b32 o0,i1,i2; bmsk.wrap.b32 o1,i1,i2; szext.clamp.s32 o2,i0,i2; szext.clamp.u32 o3,i0,i2; szext.wrap.s32 o4,i0,i2;",
        [("u32", a), ("u32", pos), ("u32", width)],
        [("u32", np.uint32)] * 5,
    )

    def extend(x, n, signed):
        x &= (1 << n) - 1
        return x - (1 << n) if signed and n and x >> (n - 1) else x

    v = list(zip([int(x) for x in a], [int(x) for x in pos], [int(x) for x in width], strict=True))
    same(got[0], wrap([((1 << min(w, 32)) - 1) << min(p, 32) for _, p, w in v], np.uint32))
    same(got[1], wrap([((1 << (w & 31)) - 1) << (p & 31) for _, p, w in v], np.uint32))
    same(got[2], wrap([extend(x, min(w, 32), True) for x, _, w in v], np.uint32))
    same(got[3], wrap([extend(x, min(w, 32), False) for x, _, w in v], np.uint32))
    same(got[4], wrap([extend(x, w & 31, True) for x, _, w in v], np.uint32))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counting(bits):
    a, _ = ints(f"u{bits}")
    got = run(
        f"popc.b{bits} o0,i0; clz.b{bits} o1,i0; brev.b{bits} o2,i0; bfind.u{bits} o3,i0; bfind.s{bits} o4,i0; bfind.shiftamt.u{bits} o5,i0; not.b{bits} o6, i0;",
        [(f"u{bits}", a)],
        [
            ("u32", np.uint32),
            ("u32", np.uint32),
            (f"u{bits}", a.dtype),
            ("u32", np.uint32),
            ("u32", np.uint32),
            ("u32", np.uint32),
            (f"u{bits}", a.dtype),
        ],
    )
    v = [int(x) for x in a]
    s = [int(x) for x in a.view(f"i{bits // 8}")]
    same(got[0], [bin(x).count("1") for x in v])
    same(got[1], [bits - x.bit_length() for x in v])
    same(got[2], wrap([int(f"{x:0{bits}b}"[::-1], 2) for x in v], a.dtype))
    same(got[3], wrap([x.bit_length() - 1 for x in v], np.uint32))
    same(got[4], wrap([(~x if x < 0 else x).bit_length() - 1 for x in s], np.uint32))
    same(got[5], wrap([bits - x.bit_length() if x else -1 for x in v], np.uint32))
    same(got[6], ~a)


def test_prmt():
    a, b = ints("u32")
    c = rng.integers(0, 2**16, len(a), dtype=np.uint32)
    modes = {"": None, "f4e": 0, "b4e": 0, "rc8": 0, "ecl": 0, "ecr": 0, "rc16": 0}
    got = run(
        "".join(f"prmt.b32{'.' + m if m else ''} o{i}, i0, i1, i2;" for i, m in enumerate(modes)),
        [("u32", a), ("u32", b), ("u32", c)],
        [("u32", np.uint32)] * len(modes),
    )
    bytes_ = np.stack([a, b], 1).view(np.uint8)

    def default(row, sel):
        out = 0
        for i in range(4):
            k = sel >> 4 * i & 15
            byte = int(row[k & 7])
            out |= ((0xFF if byte & 0x80 else 0) if k & 8 else byte) << 8 * i
        return out

    same(got[0], [default(r, int(s)) for r, s in zip(bytes_, c, strict=True)])
    rules = {
        "f4e": lambda n, i: n + i,
        "b4e": lambda n, i: (n - i) % 8,
        "rc8": lambda n, i: n,
        "ecl": lambda n, i: max(n, i),
        "ecr": lambda n, i: min(n, i),
        "rc16": lambda n, i: (n & 1) * 2 + (i & 1),
    }
    for (_m, rule), g in zip(rules.items(), got[1:], strict=True):
        same(
            g,
            [
                sum(int(r[rule(int(s) & 3, i)]) << 8 * i for i in range(4))
                for r, s in zip(bytes_, c, strict=True)
            ],
        )


def test_dot_products_sad_abs_neg():
    a, b = ints("u32")
    c = a[::-1].copy()
    got = run(
        "dp4a.s32.s32 o0,i0,i1,i2; dp4a.u32.u32 o1,i0,i1,i2; dp4a.u32.s32 o2,i0,i1,i2; dp2a.lo.s32.s32 o3,i0,i1,i2; sad.s32 o4,i0,i1,i2; sad.u32 o5,i0,i1,i2; abs.s32 o6,i0; neg.s32 o7,i0;",
        [("u32", a), ("u32", b), ("u32", c)],
        [("u32", np.uint32)] * 8,
    )
    A = {k: a.view(k).reshape(-1, 4 // np.dtype(k).itemsize).astype(np.int64) for k in ("i1", "u1", "i2")}
    B = {k: b.view(k).reshape(-1, 4).astype(np.int64) for k in ("i1", "u1")}
    for g, x, y in ((0, "i1", "i1"), (1, "u1", "u1"), (2, "u1", "i1")):
        same(got[g], ((A[x] * B[y]).sum(1) + c).astype(np.uint32))
    same(got[3], ((A["i2"] * B["i1"][:, :2]).sum(1) + c).astype(np.uint32))
    s, t = a.view(np.int32).astype(np.int64), b.view(np.int32).astype(np.int64)
    same(got[4], (np.abs(s - t) + c).astype(np.uint32))
    same(got[5], (np.abs(a.astype(np.int64) - b.astype(np.int64)) + c).astype(np.uint32))
    same(got[6], np.abs(s).astype(np.uint32))
    same(got[7], (-s).astype(np.uint32))


def test_saturating_add():
    a, b = ints("s32")
    got = run(
        "add.sat.s32 o0,i0,i1; sub.sat.s32 o1,i0,i1;", [("s32", a), ("s32", b)], [("s32", np.int32)] * 2
    )
    same(got[0], np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1))
    same(got[1], np.clip(a.astype(np.int64) - b, -(2**31), 2**31 - 1))


# ---------------------------------------------------------------- floating point


def exact_op(op, digits, min_exp, mode, *v):
    x = [Fraction(float(y)) for y in v]
    r = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
        "div": lambda a, b: a / b,
    }[op](*x)
    return round_fraction(r, digits, min_exp, mode)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "div"])
def test_f32_rounding(op, mode):
    a, b = pairs()
    c = rng.permutation(a)
    near = rng.standard_normal((3, 1500)).astype(np.float32) * np.float32(2.0) ** rng.integers(
        -40, 40, (3, 1500)
    ).astype(np.float32)
    near[2, :500] = -(near[0, :500] * near[1, :500])  # cancellation in fma
    a, b, c = np.concatenate([a, near[0]]), np.concatenate([b, near[1]]), np.concatenate([c, near[2]])
    n = 3 if op == "fma" else 2
    v = (a, b, c)[:n]
    got = run(
        f"{op}.{mode}.f32 o0, " + ", ".join(f"i{k}" for k in range(n)) + ";",
        [("f32", x) for x in v],
        [("f32", np.float32)],
    )
    ok = finite(*v) & ((b != 0) | (op != "div"))
    big = Fraction(float(np.finfo(np.float32).max))
    for i in np.flatnonzero(ok):
        want = exact_op(op, 24, -149, mode, *[x[i] for x in v])
        if abs(want) <= big and want != 0:
            assert Fraction(float(got[i])) == want, (i, [x[i] for x in v], got[i], float(want))
        elif abs(want) > big and mode == "rn":
            assert np.isinf(got[i])
    with np.errstate(all="ignore"):  # specials: as IEEE
        wide = [x.astype(np.float64) for x in v]
        special = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            "div": lambda a, b: a / b,
            "fma": lambda a, b, c: a * b + c,
        }[op](*wide)
    same(got[~ok], special[~ok])


def test_fma_double_rounding():
    """a*b+c whose float64 value lies on a float32 tie although the exact value does not."""
    a, b = np.float32(1 + 2.0**-23), np.float32(1 + 2.0**-23)
    c = np.array([2.0**-60, -(2.0**-60), 2.0**30, 2.0**-47], np.float32)
    got = run(
        "fma.rn.f32 o0, i0, i1, i2;",
        [("f32", np.full(4, a)), ("f32", np.full(4, b)), ("f32", c)],
        [("f32", np.float32)],
    )
    want = [
        float(round_fraction(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(x)), 24, -149, "rn"))
        for x in c
    ]
    same(got, want)
    x = np.float32(2.0**12 + 1)  # 2^24 + 2^13 + 1: a tie of float32 broken by a tiny c
    got = run(
        "fma.rn.f32 o0, i0, i0, i1;",
        [("f32", np.full(2, x)), ("f32", np.array([2.0**-70, -(2.0**-70)], np.float32))],
        [("f32", np.float32)],
    )
    same(got, [2.0**24 + 2**13 + 2, 2.0**24 + 2**13])


@pytest.mark.parametrize("op", ["add", "mul", "fma"])
def test_f64(op):
    v = [rng.standard_normal(500) * 2.0 ** rng.integers(-60, 60, 500) for _ in range(3)]
    v[2][:200] = -(v[0][:200] * v[1][:200])
    v = v[: 3 if op == "fma" else 2]
    modes = ["rn"] if op == "fma" else ["rn", "rz", "rm", "rp"]
    for mode in modes:
        got = run(
            f"{op}.{mode}.f64 o0, " + ", ".join(f"i{k}" for k in range(len(v))) + ";",
            [("f64", x) for x in v],
            [("f64", np.float64)],
        )
        for i in range(500):
            assert Fraction(float(got[i])) == exact_op(op, 53, -1074, mode, *[x[i] for x in v]), (mode, i)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("type_", ["f16", "bf16", "f16x2", "bf16x2"])
def test_half_arithmetic(op, type_):
    # (add, sub and mul on bf16 are sm_90 instructions; for sm_80 compilers emit fma)
    n, base = 3 if op == "fma" else 2, type_[:-2] if type_.endswith("x2") else type_
    count = 1200
    if base == "f16":
        values = [
            (rng.standard_normal(count) * 2.0 ** rng.integers(-14, 6, count)).astype(np.float16)
            for _ in range(n)
        ]
        bits, value, (digits, min_exp, big) = (
            [x.view(np.uint16) for x in values],
            lambda b: b.view(np.float16),
            (11, -24, 65504),
        )
    else:
        bits = [bf16(rng.standard_normal(count) * 2.0 ** rng.integers(-30, 30, count)) for _ in range(n)]
        value, (digits, min_exp, big) = bf16_value, (8, -133, 3.38e38)
    if type_.endswith("x2"):
        got = run(
            f"{op}.rn.{type_} o0, " + ", ".join(f"i{k}" for k in range(n)) + ";",
            [(type_, b.view(np.uint32)) for b in bits],
            [(type_, np.uint32)],
        )
    else:
        got = run(
            f"{op}.rn.{type_} o0, " + ", ".join(f"i{k}" for k in range(n)) + ";",
            [(type_, b) for b in bits],
            [(type_, np.uint16)],
        )
    got = value(got.view(np.uint16))
    for i in range(count):
        want = exact_op(op, digits, min_exp, "rn", *[value(b)[i] for b in bits])
        if abs(want) <= big:
            assert Fraction(float(got[i])) == want, (i, [value(b)[i] for b in bits], got[i], float(want))
        else:
            assert np.isinf(got[i])


def test_half_sat_relu_ftz():
    with np.errstate(all="ignore"):
        a = np.concatenate(
            [
                f32_values(300).astype(np.float16),
                (rng.standard_normal(300) * 2.0 ** rng.integers(-24, 3, 300)).astype(np.float16),
            ]
        )
    a = a[: len(a) // 2 * 2]
    b = rng.permutation(a)
    x, y = a.astype(np.float64), b.astype(np.float64)
    b16 = [bf16(v) for v in (x, y)]  # (values and NaNs alike)
    X, Y = (bf16_value(v).astype(np.float64) for v in b16)
    got = run(
        "add.sat.f16x2 o0,i0,i1; fma.rn.relu.f16x2 o1,i0,i1,i0; mul.ftz.f16x2 o2,i0,i1; fma.rn.relu.bf16x2 o3,i2,i3,i2; fma.rn.sat.f16x2 o4,i0,i1,i1;",
        [
            ("f16x2", a.view(np.uint32)),
            ("f16x2", b.view(np.uint32)),
            ("bf16x2", b16[0].view(np.uint32)),
            ("bf16x2", b16[1].view(np.uint32)),
        ],
        [("b32", np.uint32)] * 5,
    )
    h = [g.view(np.float16) for g in got]

    def flush(v):
        return np.where(np.abs(v) < 2.0**-14, np.copysign(0.0, v), v)

    def sat(v):
        return np.where(v > 0, np.minimum(v, 1), 0)

    def relu(v):
        return np.where((v > 0) | np.isnan(v), v, 0)

    with np.errstate(all="ignore"):
        same(h[0], sat(x + y).astype(np.float16))
        same(h[1], relu(x * y + x).astype(np.float16))
        same(h[2], flush((flush(x) * flush(y)).astype(np.float16)).astype(np.float16))
        same(bf16_value(got[3].view(np.uint16)), bf16_value(bf16(relu(X * Y + X).astype(np.float32))))
        same(h[4], sat(x * y + y).astype(np.float16))


def test_vector_registers_and_decimal_immediates():
    x = rng.standard_normal(64).astype(np.float32)
    got = run(
        ".reg .v2 .f32 v; .reg .v4 .f32 w; mov.v2.f32 v, {i0, 0f3F800000}; add.f32 v.x, v.x, v.y; mov.f32 o0, v.x; ld.param.u64 a, [P0]; ld.global.v4.f32 w, [a]; add.f32 o1, w.x, w.w; mul.f32 o2, i0, 2.5; "
        "mov.b64 {t0, _}, i1; mov.b32 o3, t0; mov.v2.f32 {o4, o5}, {w.y, w.z}; mul.f32 o6, i0, -0f40000000; mov.f64 o7, 1.25;",
        [("f32", x), ("u64", np.arange(64, dtype=np.uint64) | np.uint64(7 << 40))],
        [("f32", np.float32)] * 3 + [("u32", np.uint32)] + [("f32", np.float32)] * 3 + [("f64", np.float64)],
    )
    for g, want in zip(
        got,
        [
            x + 1,
            np.full(64, x[0] + x[3]),
            x * np.float32(2.5),
            np.arange(64),
            np.full(64, x[1]),
            np.full(64, x[2]),
            x * -2,
            np.full(64, 1.25),
        ],
        strict=True,
    ):
        same(g, want)


def test_ftz_and_sat():
    a, b = pairs()
    got = run(
        "add.ftz.f32 o0,i0,i1; mul.sat.f32 o1,i0,i1; add.f32 o2,i0,i1;",
        [("f32", a), ("f32", b)],
        [("f32", np.float32)] * 3,
    )

    def flush(x):
        return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)

    with np.errstate(all="ignore"):
        same(got[0], flush(flush(a) + flush(b)))
        p = a * b
        same(got[1], np.where(np.isnan(p), np.float32(0), np.clip(p, 0, 1)) + np.float32(0))
        same(got[2], a + b)


def test_min_max():
    a, b = pairs()
    got = run(
        "min.f32 o0,i0,i1; max.f32 o1,i0,i1; min.NaN.f32 o2,i0,i1; max.NaN.f32 o3,i0,i1;",
        [("f32", a), ("f32", b)],
        [("f32", np.float32)] * 4,
    )
    nan = np.isnan(a) | np.isnan(b)
    for g, sign in ((got[0], -1), (got[1], 1)):
        for i in range(len(a)):
            x, y = float(a[i]), float(b[i])
            if np.isnan(x) or np.isnan(y):
                want = y if np.isnan(x) else x
            elif x == y:  # -0 is less than +0
                want = x if (np.copysign(1, x) * sign >= np.copysign(1, y) * sign) else y
            else:
                want = max(x, y) if sign > 0 else min(x, y)
            assert (np.isnan(want) and np.isnan(g[i])) or (
                g[i] == np.float32(want) and np.signbit(g[i]) == np.signbit(want)
            ), (x, y, g[i])
    for k in (2, 3):
        assert np.isnan(got[k][nan]).all()
        same(got[k][~nan], got[k - 2][~nan])
    assert (got[2].view(np.uint32)[nan] & 0x7FFFFFFF > 0x7F800000).all()


def test_packed_min_max_neg_abs():
    v = halves(500)[:1000]
    w = rng.permutation(v)
    got = run(
        "max.f16x2 o0,i0,i1; min.NaN.f16x2 o1,i0,i1; neg.f16x2 o2,i0; abs.f16x2 o3,i0;",
        [("f16x2", v.view(np.uint32)), ("f16x2", w.view(np.uint32))],
        [("f16x2", np.uint32)] * 4,
    )
    h = [g.view(np.float16) for g in got]
    with np.errstate(all="ignore"):
        assert np.array_equal(h[0], np.fmax(v, w), equal_nan=True)
        assert np.array_equal(h[1], np.minimum(v, w), equal_nan=True)
    same(h[2], -v)
    same(h[3], np.abs(v))
    b, c = bf16(f32_values(500)), bf16(rng.permutation(f32_values(500)))
    b, c = b[: len(b) // 2 * 2], c[: len(b) // 2 * 2]
    got = run(
        "max.bf16x2 o0,i0,i1; neg.bf16x2 o1,i0;",
        [("bf16x2", b.view(np.uint32)), ("bf16x2", c.view(np.uint32))],
        [("bf16x2", np.uint32)] * 2,
    )
    assert np.array_equal(
        bf16_value(got[0].view(np.uint16)), np.fmax(bf16_value(b), bf16_value(c)), equal_nan=True
    )
    same(got[1].view(np.uint16), b ^ 0x8000)


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_scalar_half_min_max_neg_abs_compare(type_):
    bits = (lambda x: x.astype(np.float16).view(np.uint16)) if type_ == "f16" else bf16
    value = (lambda b: b.view(np.float16).astype(np.float32)) if type_ == "f16" else bf16_value
    with np.errstate(all="ignore"):
        a, b = bits(f32_values(500)), bits(rng.permutation(f32_values(500)))
    b[::7] = a[::7]
    got = run(
        f"max.{type_} o0,i0,i1; min.NaN.{type_} o1,i0,i1; neg.{type_} o2,i0; abs.{type_} o3,i0; setp.lt.{type_} p,i0,i1; selp.b16 o4,1,0,p; setp.neu.{type_} p,i0,i1; selp.b16 o5,1,0,p;"
        f"setp.ge.{type_} p,i0,i1; selp.{'f16' if False else 'b16'} o6,i0,i1,p;",
        [(type_, a), (type_, b)],
        [(type_, np.uint16)] * 7,
    )
    x, y = value(a), value(b)
    with np.errstate(all="ignore"):
        assert np.array_equal(value(got[0]), np.fmax(x, y), equal_nan=True)
        assert np.array_equal(value(got[1]), np.minimum(x, y), equal_nan=True)
        same(got[2], a ^ 0x8000)
        same(got[3], a & 0x7FFF)
        same(got[4], x < y)
        same(got[5], x != y)
        same(got[6], np.where(x >= y, a, b))


@pytest.mark.parametrize("type_", ["f16", "f16x2", "bf16", "bf16x2"])
def test_half_transcendental(type_):
    base = type_.replace("x2", "")
    with np.errstate(all="ignore"):
        x = np.concatenate([f32_values(300), rng.standard_normal(300) * 4])
        bits = x.astype(np.float16).view(np.uint16) if base == "f16" else bf16(x)
        bits = bits[: len(bits) // 2 * 2]
        v = (bits.view(np.float16) if base == "f16" else bf16_value(bits)).astype(np.float64)
        for op, f in (("ex2.approx" + (".ftz" if base == "bf16" else ""), np.exp2), ("tanh.approx", np.tanh)):
            word = np.uint32 if type_.endswith("x2") else np.uint16
            got = run(f"{op}.{type_} o0,i0;", [(type_, bits.view(word))], [(type_, word)]).view(np.uint16)
            if base == "f16":
                same(got.view(np.float16), f(v).astype(np.float16))
            else:
                want = (
                    bf16_value(bf16(f(np.where(np.abs(v) < 2.0**-126, 0, v)).astype(np.float32)))
                    if "ftz" in op
                    else bf16_value(bf16(f(v).astype(np.float32)))
                )
                g = bf16_value(got)
                assert (np.isnan(g) == np.isnan(want)).all()
                ok = ~np.isnan(g) & (np.abs(want) >= 2.0**-126)
                assert np.array_equal(np.isinf(g), np.isinf(want))
                assert (
                    np.abs(g[ok] - want[ok])[np.isfinite(want[ok])]
                    <= np.abs(want[ok])[np.isfinite(want[ok])] * 2.0**-8
                ).all()


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_cvt_between_half_and_others(type_):
    with np.errstate(all="ignore"):
        x = f32_values(500)
        bits = x.astype(np.float16).view(np.uint16) if type_ == "f16" else bf16(x)
    v = bits.view(np.float16).astype(np.float64) if type_ == "f16" else bf16_value(bits).astype(np.float64)
    i = ints("s32")[0]
    wide = np.resize(rng.standard_normal(700) * 2.0 ** rng.integers(-14, 14, 700), len(i))
    got = run(
        f"cvt.rni.s32.{type_} o0,i0; cvt.rzi.u16.{type_} o1,i0; cvt.rzi.s64.{type_} o2,i0; cvt.f32.{type_} o3,i0; cvt.f64.{type_} o4,i0; cvt.rmi.{type_}.{type_} o5,i0;",
        [(type_, bits)],
        [
            ("s32", np.int32),
            ("u16", np.uint16),
            ("s64", np.int64),
            ("f32", np.float32),
            ("f64", np.float64),
            (type_, np.uint16),
        ],
    )
    with np.errstate(all="ignore"):
        for g, f, lo, hi in (
            (got[0], np.rint, -(2**31), 2**31 - 1),
            (got[1], np.trunc, 0, 65535),
            (got[2], np.trunc, -(2**63), 2**63 - 1),
        ):
            same(
                g,
                np.array(
                    [0 if np.isnan(y) else lo if f(y) < lo else hi if f(y) > hi else int(f(y)) for y in v],
                    g.dtype,
                ),
            )
        same(got[3], v.astype(np.float32))
        same(got[4], v)
        r = (
            got[5].view(np.float16).astype(np.float64)
            if type_ == "f16"
            else bf16_value(got[5]).astype(np.float64)
        )
        same(r, np.floor(v))
    got = run(
        f"cvt.rn.{type_}.s32 o0,i0; cvt.rz.{type_}.s32 o1,i0; cvt.rn.{type_}.f64 o2,i1;",
        [("s32", i), ("f64", wide)],
        [(type_, np.uint16)] * 3,
    )
    digits, min_exp, big = (11, -24, 65504) if type_ == "f16" else (8, -133, 3.38e38)
    value = (lambda b: b.view(np.float16)) if type_ == "f16" else bf16_value
    for g, mode, source in ((got[0], "rn", i), (got[1], "rz", i), (got[2], "rn", wide)):
        for k, y in enumerate(source):
            want = round_fraction(Fraction(y.item()), digits, min_exp, mode)
            if abs(want) <= big:
                assert Fraction(float(value(g)[k])) == want
            elif mode == "rn":
                assert np.isinf(value(g)[k])


@pytest.mark.parametrize(
    ("op", "f"),
    [
        ("rcp.approx", lambda x: 1 / x),
        ("rcp.rn", lambda x: 1 / x),
        ("sqrt.rn", np.sqrt),
        ("sqrt.approx", np.sqrt),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x)),
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("sin.approx", np.sin),
        ("cos.approx", np.cos),
        ("tanh.approx", np.tanh),
    ],
)
def test_transcendental(op, f):
    x = f32_values(500)
    got = run(f"{op}.f32 o0, i0;", [("f32", x)], [("f32", np.float32)])
    with np.errstate(all="ignore"):
        same(got, f(x.astype(np.float64)).astype(np.float32))
        got = run(f"{op}.ftz.f32 o0, i0;", [("f32", x)], [("f32", np.float32)])

        def flush(x):
            return (
                np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)
                if op != "tanh.approx"
                else x
            )

        if op != "tanh.approx":
            same(got, flush(f(flush(x).astype(np.float64)).astype(np.float32)))


def test_ex2_special_values():
    x = np.array([-np.inf, np.inf, np.nan, 0, -0.0, 1, -1, 128, 127, -126, -149, -150.5, 0.5], np.float32)
    got = run("ex2.approx.ftz.f32 o0, i0;", [("f32", x)], [("f32", np.float32)])
    same(
        got,
        np.array([0, np.inf, np.nan, 1, 1, 2, 0.5, np.inf, 2.0**127, 2.0**-126, 0, 0, 2**0.5], np.float32),
    )


def test_copysign_testp_selp_slct():
    a, b = pairs()
    got = run(
        "copysign.f32 o0,i0,i1; testp.finite.f32 p,i0; selp.b32 o1,1,0,p; testp.subnormal.f32 p,i0; selp.b32 o2,1,0,p;"
        "setp.lt.f32 p,i0,i1; selp.f32 o3,i0,i1,p; slct.f32.s32 o4,i0,i1,t0;".replace("t0", "i2"),
        [("f32", a), ("f32", b), ("s32", (np.arange(len(a)) % 3 - 1).astype(np.int32))],
        [
            ("f32", np.float32),
            ("u32", np.uint32),
            ("u32", np.uint32),
            ("f32", np.float32),
            ("f32", np.float32),
        ],
    )
    same(got[0], np.copysign(b, a))
    same(got[1], np.isfinite(a))
    same(got[2], (a != 0) & (np.abs(a) < 2.0**-126))
    same(got[3], np.where(a < b, a, b))
    same(got[4], np.where(np.arange(len(a)) % 3 - 1 >= 0, a, b))


# ---------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    "cmp", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_setp_float(cmp):
    a, b = pairs()
    c = np.arange(len(a)) % 2
    got = run(
        f"setp.ne.u32 q, i2, 0; setp.{cmp}.f32 p, i0, i1; selp.b32 o0,1,0,p; setp.{cmp}.xor.f32 p|q, i0, i1, q; selp.b32 o1,1,0,p; selp.b32 o2,1,0,q;",
        [("f32", a), ("f32", b), ("u32", c.astype(np.uint32))],
        [("u32", np.uint32)] * 3,
    )
    nan = np.isnan(a) | np.isnan(b)
    with np.errstate(all="ignore"):
        table = {"eq": a == b, "ne": (a != b), "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    want = {"num": ~nan, "nan": nan}.get(cmp)
    if want is None:
        want = (table[cmp[:2]] & ~nan) | (nan if cmp.endswith("u") else False)
    same(got[0], want)
    same(got[1], want ^ (c == 1))
    same(got[2], ~want ^ (c == 1))


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64", "u16", "s16"])
def test_setp_integer(type_):
    a, b = ints(type_)
    b[::5] = a[::5]
    ops = ["eq", "ne", "lt", "le", "gt", "ge"] + (["lo", "ls", "hi", "hs"] if type_[0] == "u" else [])
    got = run(
        "".join(f"setp.{o}.{type_} p,i0,i1; selp.b32 o{k},1,0,p;" for k, o in enumerate(ops)),
        [(type_, a), (type_, b)],
        [("u32", np.uint32)] * len(ops),
    )
    f = {
        "eq": a == b,
        "ne": a != b,
        "lt": a < b,
        "lo": a < b,
        "le": a <= b,
        "ls": a <= b,
        "gt": a > b,
        "hi": a > b,
        "ge": a >= b,
        "hs": a >= b,
    }
    for o, g in zip(ops, got, strict=True):
        same(g, f[o])


def test_set_and_packed_setp():
    h = halves(600)[:1200]
    k = rng.permutation(h)
    got = run(
        "setp.gt.f16x2 p|q, i0, i1; selp.b32 o0,1,0,p; selp.b32 o1,1,0,q; set.lt.u32.f32 o2, i2, 0f3F800000; set.lt.f32.f32 o3, i2, 0f3F800000; set.ge.f16x2.f16x2 o4, i0, i1; setp.lt.u32 p, tid, 32; set.lt.and.u32.f32 o5, i2, 0f3F800000, p;",
        [("f16x2", h.view(np.uint32)), ("f16x2", k.view(np.uint32)), ("f32", f32_values(1200)[:600])],
        [("u32", np.uint32)] * 2
        + [("u32", np.uint32), ("f32", np.float32), ("f16x2", np.uint32), ("u32", np.uint32)],
    )
    same(got[5], np.where(np.arange(600) % 1024 < 32, got[2], 0))
    same(got[0], (h > k)[0::2])
    same(got[1], (h > k)[1::2])
    same(got[4].view(np.float16), (h >= k).astype(np.float16))
    x = got[2] == 0xFFFFFFFF
    same(got[3], x.astype(np.float32))
    assert set(np.unique(got[2])) <= {0, 0xFFFFFFFF}
    assert x.any()
    assert not x.all()


# ---------------------------------------------------------------- conversions


def test_cvt_f32_to_half_and_back():
    a, b = f32_values(), rng.permutation(f32_values())
    got = run(
        "cvt.rn.f16.f32 o0,i0; cvt.rn.bf16.f32 o1,i0; cvt.rn.f16x2.f32 o2,i0,i1; cvt.rn.bf16x2.f32 o3,i0,i1; cvt.f32.f16 o4,o0; cvt.f32.bf16 o5,o1; cvt.rn.relu.bf16.f32 o6,i0;",
        [("f32", a), ("f32", b)],
        [
            ("f16", np.float16),
            ("bf16", np.uint16),
            ("f16x2", np.uint32),
            ("bf16x2", np.uint32),
            ("f32", np.float32),
            ("f32", np.float32),
            ("bf16", np.uint16),
        ],
    )
    with np.errstate(all="ignore"):
        ah, bh = a.astype(np.float16), b.astype(np.float16)
    same(got[0], ah)
    nan = np.isnan(a)
    same(got[1][~nan], bf16(a)[~nan])
    assert (got[1][nan] == 0x7FFF).all()
    pair = got[2].view(np.float16).reshape(-1, 2)
    same(pair[:, 1], ah)
    same(pair[:, 0], bh)
    pair = bf16_value(got[3].view(np.uint16)).reshape(-1, 2)
    same(pair[:, 1], bf16_value(bf16(a)))
    same(pair[:, 0], bf16_value(bf16(b)))
    same(got[4], ah.astype(np.float32))
    same(got[5], bf16_value(bf16(a)))
    same(bf16_value(got[6])[~nan], np.maximum(bf16_value(bf16(a)), 0)[~nan] + np.float32(0))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_cvt_float_rounding_modes(mode):
    x = np.concatenate(
        [
            rng.standard_normal(800) * 2.0 ** rng.integers(-20, 14, 800),
            [1 + 2.0**-24, 1 + 2.0**-11, 2049.0, 2051.0],
        ]
    )
    got = run(f"cvt.{mode}.f32.f64 o0,i0;", [("f64", x)], [("f32", np.float32)])
    for g, v in zip(got, x, strict=True):
        assert Fraction(float(g)) == round_fraction(Fraction(float(v)), 24, -149, mode)
    y = x.astype(np.float32)
    got = run(f"cvt.{mode}.f16.f32 o0,i0;", [("f32", y)], [("f16", np.float16)])
    for g, v in zip(got, y, strict=True):
        assert Fraction(float(g)) == round_fraction(Fraction(float(v)), 11, -24, mode)
    if mode in ("rn", "rz"):
        got = bf16_value(run(f"cvt.{mode}.bf16.f32 o0,i0;", [("f32", y)], [("bf16", np.uint16)]))
        for g, v in zip(got, y, strict=True):
            assert Fraction(float(g)) == round_fraction(Fraction(float(v)), 8, -133, mode)
    i = ints("s64")[0]
    got = run(
        f"cvt.{mode}.f32.s64 o0,i0; cvt.{mode}.f64.s64 o1,i0;",
        [("s64", i)],
        [("f32", np.float32), ("f64", np.float64)],
    )
    for g, d, v in zip(*got, i, strict=True):
        assert Fraction(float(g)) == round_fraction(Fraction(int(v)), 24, -149, mode)
        assert Fraction(float(d)) == round_fraction(Fraction(int(v)), 53, -1074, mode)


def test_cvt_tf32():
    x = f32_values()
    got = run("cvt.rna.tf32.f32 o0,i0;", [("f32", x)], [("b32", np.uint32)]).view(np.float32)
    assert ((got.view(np.uint32) & 0x1FFF)[np.isfinite(x)] == 0).all()
    for g, v in zip(got, x, strict=True):
        if not np.isfinite(v):
            assert np.isnan(g) == np.isnan(v)
            assert np.isnan(v) or g == v
        elif np.isfinite(g) and abs(v) >= 2.0**-126:
            e = int(np.frexp(abs(float(v)))[1]) - 11
            y = abs(Fraction(float(v))) / Fraction(2) ** e
            want = (2 * y.numerator + y.denominator) // (2 * y.denominator)  # nearest, ties away
            assert abs(Fraction(float(g))) == Fraction(want) * Fraction(2) ** e, (v, g)


@pytest.mark.parametrize("d", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_cvt_float_to_int(d):
    x = np.concatenate(
        [
            f32_values(1000),
            np.array(
                [0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 128, 255.5, -129, 3e9, 5e9, 1e19, 2e19, -1e19], np.float32
            ),
        ]
    )
    bits = int(d[1:])
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if d[0] == "s" else (0, 2**bits - 1)
    dt = f"{'i' if d[0] == 's' else 'u'}{bits // 8}"
    reg = {8: f"{d[0]}16", 16: d, 32: d, 64: d}[bits]
    rdt = dt if bits > 8 else ("i2" if d[0] == "s" else "u2")
    rules = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    got = run(
        "".join(f"cvt.{m}.{d}.f32 o{k},i0;" for k, m in enumerate(rules)), [("f32", x)], [(reg, rdt)] * 4
    )
    for g, f in zip(got, rules.values(), strict=True):
        with np.errstate(all="ignore"):
            r = f(x.astype(np.float64))
        same(g, np.array([0 if np.isnan(v) else lo if v < lo else hi if v > hi else int(v) for v in r], rdt))


def test_cvt_integers():
    a = ints("s32")[0]
    got = run(
        "cvt.s64.s32 o0,i0; cvt.u64.u32 o1,i0; cvt.s16.s32 o2,i0; cvt.sat.s8.s32 o3,i0; cvt.sat.u8.s32 o4,i0; cvt.s32.s8 o5,i0; cvt.u32.u8 o6,i0; cvt.rn.f32.s32 o7,i0; cvt.rn.f32.u32 o8,i0; cvt.rn.f16.s32 o9,i0; cvt.sat.u32.s32 o10, i0;",
        [("s32", a)],
        [
            ("s64", np.int64),
            ("u64", np.uint64),
            ("s16", np.int16),
            ("s16", np.int16),
            ("u16", np.uint16),
            ("s32", np.int32),
            ("u32", np.uint32),
            ("f32", np.float32),
            ("f32", np.float32),
            ("f16", np.float16),
            ("u32", np.uint32),
        ],
    )
    u = a.view(np.uint32)
    with np.errstate(all="ignore"):
        for g, want in zip(
            got,
            [
                a.astype(np.int64),
                u.astype(np.uint64),
                a.astype(np.int16),
                np.clip(a, -128, 127),
                np.clip(a, 0, 255),
                a.astype(np.int8).astype(np.int32),
                u.astype(np.uint8),
                a.astype(np.float32),
                u.astype(np.float32),
                a.astype(np.float64).astype(np.float16),
                np.maximum(a, 0),
            ],
            strict=True,
        ):
            same(g, want)


def test_cvt_round_to_integral_and_sat():
    x = f32_values()
    got = run(
        "cvt.rni.f32.f32 o0,i0; cvt.rzi.f32.f32 o1,i0; cvt.sat.f32.f32 o2,i0; cvt.rpi.ftz.f32.f32 o3,i0;",
        [("f32", x)],
        [("f32", np.float32)] * 4,
    )
    with np.errstate(all="ignore"):
        same(got[0], np.rint(x))
        same(got[1], np.trunc(x))
        same(got[2], np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1)) + np.float32(0))
        same(got[3], np.ceil(np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)))


# ---------------------------------------------------------------- moves and refusals


def test_mov_pack_unpack_and_immediates():
    a = rng.integers(0, 2**32, 64, dtype=np.uint32)
    got = run(
        "{ .reg .b16 h, l; mov.b32 {l, h}, i0; mov.b32 o0, {h, l}; mov.b64 o1, {i0, o0}; } mov.b32 o2, 0f3FC00000; mov.u32 o3, -2; mov.u32 o4, 0xFFFFU; mov.f64 o5, 0d3FF8000000000000; mov.b32 {_, o6}, i0;".replace(
            "{_, o6}, i0", "o6, i0"
        ),
        [("u32", a)],
        [
            ("u32", np.uint32),
            ("u64", np.uint64),
            ("f32", np.float32),
            ("u32", np.uint32),
            ("u32", np.uint32),
            ("f64", np.float64),
            ("u32", np.uint32),
        ],
    )
    swapped = (a >> 16) | (a << 16)
    same(got[0], swapped)
    same(got[1], a.astype(np.uint64) | (swapped.astype(np.uint64) << 32))
    assert (got[2] == 1.5).all()
    assert (got[3] == 2**32 - 2).all()
    assert (got[4] == 0xFFFF).all()
    assert (got[5] == 1.5).all()


def test_special_registers():
    got = run_body(
        "mov.u32 o0, %laneid; mov.u32 o1, %warpid; mov.u32 o2, %ntid.x; mov.u32 o3, %lanemask_lt; mov.u32 o4, %lanemask_ge; mov.u32 o5, %tid.x;"
        "mov.u32 o6, %lanemask_eq; mov.u32 o7, %lanemask_gt; mov.u32 o8, %lanemask_le;",
        [("u32", np.zeros(96, np.uint32))],
        [("u32", np.uint32)] * 9,
    )
    t = np.arange(96)
    lane = t % 32
    for g, want in zip(
        got,
        [
            lane,
            t // 32,
            np.full(96, 96),
            (1 << lane) - 1,
            2**32 - (1 << lane),
            t,
            1 << lane,
            2**32 - (2 << lane),
            (2 << lane) - 1,
        ],
        strict=True,
    ):
        same(g, want)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("frobnicate.b32 o0, i0;", "unknown instruction"),
        ("add.wobbly.s32 o0, i0, i0;", "unknown modifier"),
        ("ld.global.strange.b32 o0, [a];", "unknown modifier"),
        ("add.s64 o0, i0, i0;", "register size"),
        ("mov.u32 o0, %nothing;", "unknown operand"),
        ("fma.rz.f64 a, a, a, a;", "unknown modifier"),
        ("add.f32 o0, i0, 1;", "integer immediate"),
        ("add.f32 o0, i0, 0d3FF0000000000000;", "immediate of another"),
        ("add.f32 o0, i0;", "number of operands"),
        ("call f, (a);", "unknown or indirect function"),
        ("bra nowhere;", "unknown label"),
        (
            "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {o0,o0,o0,o0},{i0,i0,i0,i0},{i0,i0},{o0,o0,o0,o0};",
            "unknown modifier",
        ),
    ],
)
def test_refused_at_decode(body, what):
    with pytest.raises(PtxError) as e:
        run_body(body, [("u32", np.zeros(32, np.uint32))], [("u32", np.uint32)])
    assert what in e.value.kind
    assert e.value.line
    assert body.split(";")[0] in e.value.text
