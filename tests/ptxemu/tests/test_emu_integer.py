"""Integer instructions against Python integers."""

# ruff: noqa: E501 (PTX stands on long lines)

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from emu_values import ints, rng, run, same, wrap

INT_OPS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: int(Fraction(a, b)) if b else -1,
    "rem": lambda a, b: a - b * int(Fraction(a, b)) if b else a,
}


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
    pairs = product([0, 1, 5, 31, 32, 33, 100], [0, 1, 4, 8, 16, 31, 32, 33, 60, 64, 255])
    pos, width = np.array(list(pairs), np.uint32).T.copy()
    got = run(
        "bmsk.clamp.b32 o0,i0,i1; bmsk.wrap.b32 o1,i0,i1;",
        [("u32", pos), ("u32", width)],
        [("u32", np.uint32)] * 2,
    )
    v = list(zip([int(x) for x in pos], [int(x) for x in width], strict=True))
    same(got[0], wrap([((1 << min(w, 32)) - 1) << min(p, 32) for p, w in v], np.uint32))
    same(got[1], wrap([((1 << (w & 31)) - 1) << (p & 31) for p, w in v], np.uint32))


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
    got = run("prmt.b32 o0, i0, i1, i2;", [("u32", a), ("u32", b), ("u32", c)], [("u32", np.uint32)])
    bytes_ = np.stack([a, b], 1).view(np.uint8)

    def selected(row, sel):
        out = 0
        for i in range(4):
            k = sel >> 4 * i & 15
            byte = int(row[k & 7])
            out |= ((0xFF if byte & 0x80 else 0) if k & 8 else byte) << 8 * i
        return out

    same(got, [selected(r, int(s)) for r, s in zip(bytes_, c, strict=True)])


def test_abs_neg():
    a, _ = ints("s32")
    got = run("abs.s32 o0,i0; neg.s32 o1,i0;", [("s32", a)], [("u32", np.uint32)] * 2)
    same(got[0], np.abs(a.astype(np.int64)).astype(np.uint32))
    same(got[1], (-a.astype(np.int64)).astype(np.uint32))
