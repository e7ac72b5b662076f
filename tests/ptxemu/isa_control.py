"""Control flow: branches, calls, returns."""

import numpy as np

from .decode import EXTERNAL, Frame, Mods, handles
from .errors import Fault, PtxError
from .machine import RESELECT


@handles("bra")
def bra(D, ins):
    mods = Mods(ins)
    mods.flag("uni")
    mods.done()
    cell = D.label(ins.operands[0])
    if ins.pred is None:
        return lambda S, m: cell[0]
    guard = D.predicate(("!" if ins.negated else "") + ins.pred)
    D.guard_taken = True

    def f(S, m):
        p = guard(S)
        p = S.full(p) if m is None else p & m
        n = int(np.count_nonzero(p))
        if n == 0:
            return None
        if n == S.count:
            return cell[0]
        S.set_pc(S.at + 1)
        S.pc[p] = cell[0]
        return RESELECT

    return f


@handles("brx")
def brx(D, ins):
    mods = Mods(ins)
    mods.flag("idx")
    mods.flag("uni")
    mods.done()
    index = D.src(ins.operands[0], "u32")
    cells = [D.label(t) for t in ins.scope.find("tables", ins.operands[1])[1]]

    def f(S, m):
        i = S.full(index(S))
        here = S.lanes(m)
        if (i[here] >= len(cells)).any():
            S.fault_mask = None
            raise Fault("brx.idx out of range", int(np.argmax(here & (i >= len(cells)))))
        S.set_pc(S.at + 1)
        S.pc[here] = np.array([c[0] for c in cells])[i[here]]
        return RESELECT

    return f


@handles("exit", "ret")
def leave(D, ins):
    mods = Mods(ins)
    mods.flag("uni")
    mods.done()
    if D.frame.end_label is not None and ins.op == "ret":
        cell = D.frame.end_label

        def back(S, m):  # the end of a function decoded in place
            S.set_pc(S.at + 1)
            S.pc[S.lanes(m)] = cell[0]
            return RESELECT

        return back

    def f(S, m):
        S.set_pc(S.at + 1)
        S.exit(m)
        return RESELECT

    if ins.pred is None:
        D.kernel.exits.append(len(D.kernel.code))
    return f


@handles("trap")
def trap(D, ins):
    def f(S, m):
        S.fault_mask = None
        raise Fault("trap", int(np.argmax(S.lanes(m))))

    return f


@handles("call")
def call(D, ins):
    mods = Mods(ins)
    mods.flag("uni")
    mods.done()
    ops = [o[1:-1] if o.startswith("(") else o for o in ins.operands]
    has_return = ins.operands[0].startswith("(")
    returns = [ops.pop(0)] if has_return else []
    name, actual = ops[0], [x.strip() for x in ops[1].split(",")] if len(ops) > 1 and ops[1] else []
    places = [D.address_of(a) for a in actual]
    if name in EXTERNAL:
        return EXTERNAL[name](D, [p[1] for p in places], [D.address_of(r)[1] for r in returns])
    callee = D.program.module.functions.get(name)
    if callee is None:
        raise PtxError("call of an unknown or indirect function", detail=name)
    if ins.pred:
        raise PtxError("predicated call is not supported")
    params = dict(zip([p.name for p in callee.params], places, strict=True))
    params |= dict(zip([p.name for p in callee.returns], [D.address_of(r) for r in returns], strict=True))
    D.function(Frame(callee, end_label=[None], params=params))
    D.ins = ins
    return []
