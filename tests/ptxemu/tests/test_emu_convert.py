"""Comparison, conversion and movement against numpy; what is refused."""

# ruff: noqa: E501 (PTX stands on long lines)

from fractions import Fraction

import numpy as np
import pytest
from emu_util import bf16, bf16_value, run_body
from emu_values import f32_values, halves, ints, pairs, rng, round_fraction, run, same
from ptxemu import PtxError


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


def test_packed_setp():
    h = halves(600)[:1200]
    k = rng.permutation(h)
    got = run(
        "setp.gt.f16x2 p|q, i0, i1; selp.b32 o0,1,0,p; selp.b32 o1,1,0,q;",
        [("f16x2", h.view(np.uint32)), ("f16x2", k.view(np.uint32))],
        [("u32", np.uint32)] * 2,
    )
    same(got[0], (h > k)[0::2])
    same(got[1], (h > k)[1::2])


def test_cvt_f32_to_half_and_back():
    a, b = f32_values(), rng.permutation(f32_values())
    got = run(
        "cvt.rn.f16.f32 o0,i0; cvt.rn.bf16.f32 o1,i0; cvt.rn.f16x2.f32 o2,i0,i1; cvt.rn.bf16x2.f32 o3,i0,i1; cvt.f32.f16 o4,o0; cvt.f32.bf16 o5,o1;",
        [("f32", a), ("f32", b)],
        [
            ("f16", np.float16),
            ("bf16", np.uint16),
            ("f16x2", np.uint32),
            ("bf16x2", np.uint32),
            ("f32", np.float32),
            ("f32", np.float32),
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
    got = run(f"cvt.{mode}.f32.s64 o0,i0;", [("s64", i)], [("f32", np.float32)])
    for g, v in zip(got, i, strict=True):
        assert Fraction(float(g)) == round_fraction(Fraction(int(v)), 24, -149, mode)


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
        ("cvt.rz.f64.s32 a, i0;", "unknown modifier"),
        ("max.relu.s32 o0, i0, i0;", "unknown modifier"),
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
