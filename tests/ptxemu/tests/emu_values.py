"""Values on which instructions are tried, and what the tests of single instructions share."""

from fractions import Fraction

import numpy as np
from emu_util import run_body

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
