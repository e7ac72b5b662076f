"""Floating-point arithmetic: fp32, fp64, and fp16 and bf16 alone or in pairs."""

import numpy as np

from . import floats as fl
from .decode import Mods, emit, handles
from .errors import PtxError

U16, U32, F64 = np.uint16, np.uint32, np.float64
ROUNDING = ("rn", "rz", "rm", "rp")
HALF = ("f16", "f16x2", "bf16", "bf16x2")


# --- half precision: computed in float64


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


def half_store(type_, ftz=False, sat=False):
    """float64 values -> raw bits."""
    bf16, packed = type_.name.startswith("b"), type_.name.endswith("x2")

    def store(x):
        if sat:
            x = fl.saturate(x)
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
    ftz, sat = mods.flag("ftz"), mods.flag("sat")
    mods.flag("approx", "full")  # approximations are computed correctly rounded
    mods.done()
    if mode != "rn" and type_.name != "f32":
        raise PtxError("unknown modifier", detail=f".{mode}.{type_}")
    if type_.name in HALF:
        load, store, op = half_load(type_, ftz), half_store(type_, ftz, sat), ops["half"]

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


FLOAT_OPS = {
    "add": {
        "f32": _rn_else_odd(np.add, fl.add_odd),
        "f64": _nearest(np.add),
        "half": lambda a, b, _: fl.add_odd(a, b),
    },
    "sub": {
        "f32": _rn_else_odd(np.subtract, lambda a, b: fl.add_odd(a, -b)),
        "f64": _nearest(np.subtract),
        "half": lambda a, b, _: fl.add_odd(a, -b),
    },
    "mul": {
        "f32": _rn_else_odd(np.multiply, np.multiply),
        "f64": _nearest(np.multiply),
        "half": lambda a, b, _: a * b,
    },
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
