"""Floating-point instructions against exact fractions and numpy."""

# ruff: noqa: E501 (PTX stands on long lines)

from fractions import Fraction

import numpy as np
import pytest
from emu_util import bf16, bf16_value
from emu_values import f32_values, finite, halves, ints, pairs, rng, round_fraction, run, same


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
    got = run(
        f"{op}.rn.f64 o0, " + ", ".join(f"i{k}" for k in range(len(v))) + ";",
        [("f64", x) for x in v],
        [("f64", np.float64)],
    )
    for i in range(500):
        assert Fraction(float(got[i])) == exact_op(op, 53, -1074, "rn", *[x[i] for x in v]), i


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


def test_half_sat_ftz():
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
    got = run(
        "add.sat.f16x2 o0,i0,i1; mul.ftz.f16x2 o1,i0,i1; fma.rn.sat.f16x2 o2,i0,i1,i1;",
        [("f16x2", a.view(np.uint32)), ("f16x2", b.view(np.uint32))],
        [("b32", np.uint32)] * 3,
    )
    h = [g.view(np.float16) for g in got]

    def flush(v):
        return np.where(np.abs(v) < 2.0**-14, np.copysign(0.0, v), v)

    def sat(v):
        return np.where(v > 0, np.minimum(v, 1), 0)

    with np.errstate(all="ignore"):
        same(h[0], sat(x + y).astype(np.float16))
        same(h[1], flush((flush(x) * flush(y)).astype(np.float16)).astype(np.float16))
        same(h[2], sat(x * y + y).astype(np.float16))


def test_vector_registers_and_decimal_immediates():
    x = rng.standard_normal(64).astype(np.float32)
    got = run(
        ".reg .v2 .f32 v; .reg .v4 .f32 w; mov.f32 v.x, i0; mov.f32 v.y, 0f3F800000; add.f32 v.x, v.x, v.y; mov.f32 o0, v.x; ld.param.u64 a, [P0]; ld.global.v4.f32 w, [a]; add.f32 o1, w.x, w.w; mul.f32 o2, i0, 2.5; "
        "mov.b64 {t0, _}, i1; mov.b32 o3, t0; mov.f32 o4, w.y; mov.f32 o5, w.z; mul.f32 o6, i0, -0f40000000; mov.f64 o7, 1.25;",
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


def test_copysign_selp():
    a, b = pairs()
    got = run(
        "copysign.f32 o0,i0,i1; setp.lt.f32 p,i0,i1; selp.f32 o1,i0,i1,p;",
        [("f32", a), ("f32", b)],
        [("f32", np.float32)] * 2,
    )
    same(got[0], np.copysign(b, a))
    same(got[1], np.where(a < b, a, b))
