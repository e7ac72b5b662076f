"""Functions of the device runtime that kernels call: printf, assert."""

import re

import numpy as np

from .decode import EXTERNAL
from .errors import Fault
from .isa_memory import by_window, read
from .memory import HOST, host_index

U64 = np.uint64


def _c_string(S, address):
    out = bytearray()
    while c := int(HOST[1][host_index(S.memory.translate(np.array([address + len(out)], U64), 1), 1)][0]):
        out.append(c)
    return out.decode(errors="replace")


def _vprintf(D, params, returns):
    """printf: formats each active lane's arguments and prints them."""

    def f(S, m):
        formats = read(S, "local", np.full(S.L, params[0], U64), m, 8, 1)[0]
        arguments = read(S, "local", np.full(S.L, params[1], U64), m, 8, 1)[0]
        for lane in np.flatnonzero(S.lanes(m)):
            only = np.arange(S.L) == lane
            text, at, values = _c_string(S, int(formats[lane])), int(arguments[lane]), []
            for spec in re.findall(r"%[-+ #0-9.*]*(?:hh|h|ll|l|z)?([diouxXeEfFgGcsp%])|(?<=%)(l)", text):
                kind = spec[0]
                if kind == "%":
                    continue
                long = kind in "eEfFgGsp" or f"l{kind}" in text
                word = 8 if long else 4
                at = -(-at // word) * word
                ((where, a, sel),) = by_window(S, np.full(S.L, at, U64), only)
                v = read(S, where, a, sel, word, 1)[0][lane : lane + 1]
                at += word
                values.append(
                    v.view(np.float64)[0]
                    if kind in "eEfFgG"
                    else _c_string(S, int(v[0]))
                    if kind == "s"
                    else int(v.view(f"i{word}" if kind in "di" else v.dtype)[0])
                )
            print(
                re.sub(r"(hh|h|ll|l|z)(?=[diouxX])", "", text).replace("%p", "0x%x") % tuple(values), end=""
            )

    return f


def _assertfail(D, params, returns):
    def f(S, m):
        S.fault_mask = None
        lane = int(np.argmax(S.lanes(m)))
        message = read(S, "local", np.full(S.L, params[0], U64), m, 8, 1)[0][lane]
        S.fault_mask = None
        raise Fault("device assertion failed", lane, detail=_c_string(S, int(message)))

    return f


EXTERNAL |= {"vprintf": _vprintf, "__assertfail": _assertfail}
