"""Floating point as PTX defines it, over numpy arrays.

Values of type f16, f32 and f64 are numpy arrays of that type. bf16 has no numpy
type: its values are computed as float64 and rounded here. Where one rounding of
an exact result is asked for, the exact result is first formed in float64
"rounded to odd" (the last bit set when anything was lost); rounding that to a
narrower format, in any mode, equals rounding the exact result.
"""

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
_TINY32 = F32(2.0**-126)


# ---------------------------------------------------------------- exact sums


def _two_sum_error(a, b, s):
    t = s - a
    return (a - (s - t)) + (b - t)


def _two_product(a, b):
    p = a * b
    c = a * 134217729.0
    ah = c - (c - a)
    al = a - ah
    c = b * 134217729.0
    bh = c - (c - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _odd(s, err):
    """s + err, rounded to odd; s is the nearest double and err what it lost."""
    bits = s.view(np.int64)
    fix = (err != 0) & ((bits & 1) == 0) & np.isfinite(s) & np.isfinite(err)
    if not fix.any():
        return s
    away = np.signbit(s) == np.signbit(err)
    return np.where(fix, bits + np.where(away, 1, -1), bits).view(F64)  # an inexact sum is not 0


def add_odd(a, b):
    """a + b of float64 values, rounded to odd."""
    s = a + b
    return _odd(s, _two_sum_error(a, b, s))


def fma_odd(a, b, c):
    """a * b + c rounded to odd, for a and b with at most 26 significant bits (exact product)."""
    return add_odd(a * b, c)


# ---------------------------------------------------------------- rounding from float64


def _directed(x, r, mode, up, down):
    """Move r, the nearest value to x, so that it is x rounded in the given direction."""
    if mode == "rn":
        return r
    y = r.astype(F64)
    too_high, too_low = y > x, y < x
    if mode == "rz":
        too_high, too_low = too_high & (x > 0), too_low & (x < 0)
    elif mode == "rm":
        too_low = np.zeros_like(too_low)
    else:  # rp
        too_high = np.zeros_like(too_high)
    return np.where(too_high, down(r), np.where(too_low, up(r), r))


def to_f32(x, mode="rn"):
    r = x.astype(F32)
    return _directed(
        x, r, mode, lambda v: np.nextafter(v, F32(np.inf)), lambda v: np.nextafter(v, F32(-np.inf))
    )


def to_f16(x, mode="rn"):
    r = x.astype(F16)
    return _directed(
        x, r, mode, lambda v: np.nextafter(v, F16(np.inf)), lambda v: np.nextafter(v, F16(-np.inf))
    )


def f32_to_bf16_bits(x, mode="rn"):
    """float32 -> bf16 bits (uint16), mode rn or rz; NaN becomes 0x7fff."""
    b = x.view(U32)
    r = b >> U32(16)
    if mode == "rn":
        r = (b + U32(0x7FFF) + (r & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), r).astype(U16)


def to_bf16_bits(x, mode="rn"):
    """float64 -> bf16 bits, through a float32 rounded to odd."""
    with np.errstate(all="ignore"):
        r = x.astype(F32)
    y = r.astype(F64)
    bits = r.view(U32)
    inexact = (y != x) & ~np.isnan(x)
    bits = np.where(inexact, (bits - (np.abs(y) > np.abs(x)).astype(U32)) | U32(1), bits)
    return f32_to_bf16_bits(bits.view(F32), mode)


def bf16_bits_to_f32(bits):
    return (bits.astype(U32) << U32(16)).view(F32)


def to_tf32_rna(x):
    """cvt.rna.tf32.f32: nearest, ties away from zero; the low 13 bits become 0."""
    b = x.view(U32)
    r = (b + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(np.isfinite(x), r, np.where(np.isnan(x), U32(0x7FFFFFFF), b)).view(F32)


# ---------------------------------------------------------------- single-rounding operations


def fma_f32(a, b, c, mode="rn"):
    p = a.astype(F64) * b  # exact: 24 + 24 bits
    c = c.astype(F64)
    s = p + c
    if mode != "rn":
        return to_f32(_odd(s, _two_sum_error(p, c, s)), mode)
    # The double sum rounded to float32 is right unless the double lies on a
    # rounding boundary of float32 (or the result is subnormal there).
    odd = ((s.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)) | ((np.abs(s) < 2.0**-126) & (s != 0))
    if odd.any():
        s = np.where(odd, _odd(s, _two_sum_error(p, c, s)), s)
    return s.astype(F32)


def fma_f64(a, b, c):
    """Correctly rounded a*b+c for doubles (Boldo and Melquiond); plain where that overflows."""
    uh, ul = _two_product(a, b)
    th = c + ul
    tl = _two_sum_error(c, ul, th)
    vh = uh + th
    vl = _two_sum_error(uh, th, vh)
    z = _odd(tl + vl, _two_sum_error(tl, vl, tl + vl))
    r = vh + z
    return np.where(np.isfinite(r), r, a * b + c)


def ftz(x):
    """Flush subnormal float32 values to zero of the same sign."""
    small = np.abs(x) < _TINY32
    if not small.any():
        return x
    return np.where(small, np.copysign(F32(0), x), x)


def saturate(x):
    """Clamp to [0, 1]; NaN and -0 become +0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def minmax(a, b, largest, propagate_nan):
    """PTX min/max: a NaN operand is dropped unless .NaN; -0 < +0."""
    if propagate_nan:
        r = np.maximum(a, b) if largest else np.minimum(a, b)
        r = np.where(np.isnan(r), np.array(np.nan, r.dtype), r)
    else:
        r = np.fmax(a, b) if largest else np.fmin(a, b)
    zero = r == 0
    if zero.any():  # choose the sign of a zero result
        if largest:
            neg = (np.signbit(a) | np.isnan(a)) & (np.signbit(b) | np.isnan(b))
        else:
            neg = (np.signbit(a) & (a == 0)) | (np.signbit(b) & (b == 0))
        r = np.where(zero, np.where(neg, -np.zeros_like(r), np.zeros_like(r)), r)
    return r
