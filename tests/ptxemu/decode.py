"""From parsed PTX to executable code: names, registers, operands, control flow.

Each instruction becomes a closure f(group, mask). It returns None to go on to the
next one, an int to jump, or RESELECT when it has set the lanes' pcs itself. The
instructions themselves are in isa_*.py, which register handlers in `HANDLERS`.
A call of a device function is decoded as the function's body in place.
"""

import re

import numpy as np

from .errors import PtxError
from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .parser import TYPE_BYTES, Instruction
from .special import special_register

HANDLERS = {}  # opcode -> handler(decoder, instruction) -> closure or list of closures


def handles(*ops):
    def register(f):
        for op in ops:
            HANDLERS[op] = f
        return f

    return register


class Type:
    """A PTX type: `raw` holds its bits, `view` is what arithmetic sees (bf16 and packed types: raw)."""

    def __init__(self, name):
        self.name = name
        self.bytes = TYPE_BYTES[name]
        self.bits = 8 * self.bytes
        self.pred = name == "pred"
        self.float = name in ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32")
        self.signed = name[0] == "s"
        self.raw = np.dtype(bool) if self.pred else np.dtype(f"u{min(self.bytes, 8)}")
        floats = {"f16": "f2", "f32": "f4", "f64": "f8", "tf32": "f4"}
        self.view = np.dtype(floats.get(name, f"i{self.bytes}" if self.signed else self.raw))

    def __repr__(self):
        return self.name


TYPES = {name: Type(name) for name in TYPE_BYTES}


class Mods:
    """The dotted parts of an opcode; every one has to be taken by the handler."""

    def __init__(self, ins):
        self.left = list(ins.mods)

    def flag(self, *names):
        for n in names:
            if n in self.left:
                self.left.remove(n)
                return True
        return False

    def one_of(self, *names, default=None):
        for n in self.left:
            if n in names:
                self.left.remove(n)
                return n
        return default

    def drop(self, pattern):
        self.left = [n for n in self.left if not re.fullmatch(pattern, n)]

    def type(self):
        """The last part that names a type."""
        for i in range(len(self.left) - 1, -1, -1):
            if self.left[i] in TYPES:
                return TYPES[self.left.pop(i)]
        raise PtxError("no known type in the opcode")

    def done(self):
        if self.left:
            raise PtxError("unknown modifier", detail="." + ".".join(self.left))


class Frame:
    """One activation of a function's text: its registers, labels and variables."""

    def __init__(self, function, end_label=None, params=None):
        self.function, self.end_label = function, end_label
        self.slots, self.labels, self.offsets = {}, {}, {}
        self.params = params or {}  # formal parameter -> (space, offset)


class Kernel:
    """Decoded entry function."""

    def __init__(self, program, function):
        self.name, self.function, self.program = function.name, function, program
        self.code, self.source, self.exits = [], [], []  # exits: pcs of unguarded ends of the kernel
        self.register_types = []
        self.local_bytes = self.shared_bytes = 0
        self.params = {}
        offset = 0
        for p in function.params:
            offset = -(-offset // p.align) * p.align
            self.params[p.name] = (offset, p)
            offset += p.size
        self.param_bytes = offset
        Decoder(program, self).function(
            Frame(function, params={n: ("param", o) for n, (o, _) in self.params.items()})
        )
        self.is_exit = np.zeros(len(self.code) + 1, bool)
        self.is_exit[self.exits] = True

    def check_block(self, block):
        for name, test in (("reqntid", lambda a, b: a == b), ("maxntid", lambda a, b: a >= b)):
            m = re.search(rf"\.{name}\s+([\d,\s]+)", self.function.directives)
            if m:
                want = [int(x) for x in m[1].split(",")]
                if not test(int(np.prod(want)), int(np.prod(block))):
                    raise PtxError("bad launch", kernel=self.name, detail=f"block {block} but .{name} {want}")


class Decoder:
    def __init__(self, program, kernel):
        self.program, self.kernel = program, kernel
        self.frame, self.depth = None, 0
        self.shared_offsets = {}
        self.carry_slot = None

    # ------------------------------------------------------------ functions and code

    def emit(self, ins, closure):
        self.kernel.code.append(closure)
        self.kernel.source.append(ins)

    def function(self, frame):
        """Decode a function's body at the end of the code."""
        outer, self.frame = self.frame, frame
        self.depth += 1
        if self.depth > 20:
            raise PtxError("recursive device function", kernel=self.kernel.name)
        starts = []
        for ins in frame.function.body:
            starts.append(len(self.kernel.code))
            self._instruction(ins)
        end = Instruction(
            "ret" if frame.end_label is None else "bra.uni",
            [],
            [],
            line=frame.function.line,
            text="(end of function)",
            scope=frame.function.scope,
        )
        starts.append(len(self.kernel.code))
        if frame.end_label is None:
            self.emit(end, HANDLERS["exit"](self, end))
        else:
            frame.end_label[0] = len(self.kernel.code)
        for cell, index in frame.labels.values():
            cell[0] = starts[index]
        self.frame = outer
        self.depth -= 1

    def _instruction(self, ins):
        try:
            handler = HANDLERS.get(ins.op)
            if handler is None:
                raise PtxError("unknown instruction", detail=ins.op)
            self.ins, self.guard_taken = ins, False
            guard = self.predicate(("!" if ins.negated else "") + ins.pred) if ins.pred else None
            closures = handler(self, ins)
            for f in closures if isinstance(closures, list) else [closures]:
                self.emit(ins, guarded(guard, f) if guard is not None and not self.guard_taken else f)
        except PtxError as e:
            if e.line is None:
                e.kernel, e.line, e.text = self.kernel.name, ins.line, ins.text
            raise
        except (KeyError, IndexError, ValueError, TypeError) as e:
            raise PtxError(
                "cannot decode",
                kernel=self.kernel.name,
                line=ins.line,
                text=ins.text,
                detail=f"{type(e).__name__}: {e}",
            ) from e

    # ------------------------------------------------------------ names

    def slot(self, name):
        """(slot, type) of a register, or None if the name is not one."""
        found = self.ins.scope.register(name)
        if found is None:
            return None
        scope, type_ = found
        key = (id(scope), name)
        if key not in self.frame.slots:
            self.frame.slots[key] = self.new_slot(TYPES[type_].raw)
        return self.frame.slots[key], TYPES[type_]

    def new_slot(self, raw):
        self.kernel.register_types.append(np.dtype(raw))
        return len(self.kernel.register_types) - 1

    def label(self, name):
        """A cell that holds the label's pc once the function is decoded."""
        found = self.ins.scope.find("labels", name)
        if found is None:
            raise PtxError("unknown label", detail=name)
        scope, index = found
        return self.frame.labels.setdefault((id(scope), name), ([None], index))[0]

    def address_of(self, name):
        """(space, offset or address) of a variable, or None. Space "param" is a kernel parameter;
        parameters and variables of calls live in local memory."""
        if name in self.frame.params:
            return self.frame.params[name]
        found = self.ins.scope.find("variables", name)
        if found is None:
            return None
        scope, v = found
        if v.space in ("global", "const"):
            return v.space, self.program.address(v)
        if v.space == "shared":
            return "shared", self._shared_offset(v, id(scope))
        key = (id(scope), name)
        if key not in self.frame.offsets:
            k = self.kernel
            k.local_bytes = -(-k.local_bytes // v.align) * v.align
            self.frame.offsets[key] = k.local_bytes
            k.local_bytes += max(v.size, 1)
        return "local", self.frame.offsets[key]

    def _shared_offset(self, v, scope_id):
        k = self.kernel
        if v.extern:  # dynamic memory begins after all static variables
            self._place_all_shared()
            k.shared_bytes = -(-k.shared_bytes // 16) * 16
            return k.shared_bytes
        key = (scope_id, v.name)
        if key not in self.shared_offsets:
            k.shared_bytes = -(-k.shared_bytes // v.align) * v.align
            self.shared_offsets[key] = k.shared_bytes
            k.shared_bytes += v.size
        return self.shared_offsets[key]

    def _place_all_shared(self):
        """Place every static shared variable that the kernel or a function it calls mentions."""
        functions, todo, words = self.program.module.functions, [self.kernel.function], set()
        seen = set()
        while todo:
            f = todo.pop()
            if f.name in seen:
                continue
            seen.add(f.name)
            words |= set(re.findall(r"[\w$%]+", " ".join(o for i in f.body for o in i.operands)))
            todo += [functions[w] for w in words & functions.keys()]
        scopes = {}
        for name in sorted(seen):
            for ins in functions[name].body:
                scope = ins.scope
                while scope is not None:
                    scopes[id(scope)] = scope
                    scope = scope.parent
        for scope in scopes.values():
            for v in scope.variables.values():
                if v.space == "shared" and not v.extern and v.name in words:
                    self._shared_offset(v, id(scope))

    # ------------------------------------------------------------ operands

    def number(self, text, type_):
        """Bits of an immediate as an array of length 1 of the type's raw dtype, or None."""
        m = re.fullmatch(r"(-?)0([fF])([0-9a-fA-F]{8})|(-?)0([dD])([0-9a-fA-F]{16})", text)
        if m:
            double = m[5] is not None
            bits = int(m[6] if double else m[3], 16) ^ ((m[4] or m[1] or "") == "-") << (63 if double else 31)
            if type_.float and double != (type_.bits == 64):
                raise PtxError("immediate of another floating-point type", detail=text)
        elif re.fullmatch(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
            digits = text.rstrip("U")
            octal = re.fullmatch(r"([-+]?)0([0-7]+)", digits)
            bits = int(octal[1] + "0o" + octal[2], 8) if octal else int(digits, 0)
            if type_.name in ("f32", "f64"):  # a decimal integer where a float is expected
                raise PtxError("integer immediate for a floating-point operand", detail=text)
        elif re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", text) and type_.float:
            return np.array([float(text)], type_.view).view(type_.raw)
        else:
            return None
        if type_.pred:
            return np.array([bits != 0])
        return np.array([bits & ((1 << type_.bits) - 1)], np.uint64).astype(type_.raw)

    def src(self, text, type_, wide=False):
        """get(group) -> array of type_.view. With wide=True the register may be wider than the type."""
        if isinstance(type_, str):
            type_ = TYPES[type_]
        view, raw = type_.view, type_.raw
        if type_.pred:
            return self.predicate(text)
        found = self.slot(text)
        if found is not None:
            slot, have = found
            if have.bits == type_.bits and not have.pred:
                return (lambda S: S.r[slot]) if view == raw else (lambda S: S.r[slot].view(view))
            if wide and have.bits > type_.bits:
                return lambda S: S.r[slot].astype(raw).view(view)
            raise PtxError(
                "register size does not match the instruction", detail=f"{text} is .{have}, needs .{type_}"
            )
        bits = self.number(text, type_)
        if bits is None:
            special = special_register(text)
            if special is not None:
                return lambda S: special(S).astype(raw).view(view)
            place = self.address_of(text)
            if place is None:
                raise PtxError("unknown operand", detail=text)
            bits = np.array([place[1]], np.uint64).astype(raw)
        constant = bits.view(view)
        return lambda S: constant

    def predicate(self, text):
        negate, name = text.startswith("!"), text.lstrip("! ")
        found = self.slot(name)
        if found is None:
            bits = self.number(name, TYPES["pred"])
            if bits is None:
                raise PtxError("unknown predicate", detail=text)
            return lambda S: bits ^ negate
        slot, have = found
        if not have.pred:
            raise PtxError("a predicate is needed", detail=f"{name} is .{have}")
        return (lambda S: ~S.r[slot]) if negate else (lambda S: S.r[slot])

    def dst(self, text, type_, wide=False):
        """put(group, array, mask): write an array of the type. With wide=True a wider register is
        filled by sign or zero extension."""
        if isinstance(type_, str):
            type_ = TYPES[type_]
        if text == "_":
            return lambda S, v, m: None
        found = self.slot(text)
        if found is None:
            raise PtxError("unknown destination register", detail=text)
        slot, have = found
        raw = have.raw
        if have.pred != type_.pred or (have.bits != type_.bits and not (wide and have.bits > type_.bits)):
            raise PtxError(
                "register size does not match the instruction", detail=f"{text} is .{have}, needs .{type_}"
            )
        if have.bits == type_.bits:

            def put(S, v, m):
                v = v.view(raw)
                if m is None:
                    S.r[slot] = v if v.shape[0] == S.L else np.repeat(v, S.L)
                else:
                    S.r[slot] = np.where(m, v, S.r[slot])

            return put
        extended = np.dtype(f"i{have.bytes}") if type_.signed else raw

        def put_wide(S, v, m):
            v = S.full(v.view(type_.view if not type_.float else type_.raw).astype(extended).view(raw))
            S.r[slot] = v if m is None else np.where(m, v, S.r[slot])

        return put_wide

    def vector(self, text):
        """Operand texts of {a, b, ...}, or [text]."""
        if text.startswith("{"):
            return [x.strip() for x in text[1:-1].split(",")]
        parts = [f"{text}.{c}" for c in "xyzw" if self.slot(f"{text}.{c}")]
        return parts or [text]

    def address(self, text):
        """(space of a named variable or None, get(group) -> uint64 array) of [base + offset]."""
        m = re.fullmatch(r"\[\s*([^\]\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not m:
            raise PtxError("cannot parse address", detail=text)
        base, offset = m[1], int(m[2] or "0", 0)
        found = self.slot(base)
        if found is None:
            place = self.address_of(base)
            if place is None:
                place = (None, int(base, 0))
            constant = np.array([(place[1] + offset) & 0xFFFFFFFFFFFFFFFF], np.uint64)
            return place[0], lambda S: S.full(constant)
        slot, have = found
        if have.bits == 64:
            if offset == 0:
                return None, lambda S: S.r[slot]
            k = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
            return None, lambda S: S.r[slot] + k
        k = np.uint32(offset & 0xFFFFFFFF)
        return None, lambda S: (S.r[slot] + k).astype(np.uint64)

    def carry(self):
        if self.carry_slot is None:
            self.carry_slot = self.new_slot(bool)
        return self.carry_slot


def guarded(guard, f):
    """The instruction for the lanes whose guard predicate is true."""

    def g(S, m):
        p = guard(S)
        p = S.full(p) if m is None else p & m
        n = int(np.count_nonzero(p))
        S.counts[S.at] += n - S.count
        if n == 0:
            return None
        return f(S, None if n == S.L else p)

    return g


def emit(D, ins, type_, fn, n, dst_type=None):
    """Closure for d = fn(s1..sn), all operands of one type."""
    put = D.dst(ins.operands[0], dst_type or type_)
    s = [D.src(o, type_) for o in ins.operands[1 : 1 + n]]
    if len(ins.operands) != n + 1:
        raise PtxError("wrong number of operands", detail=f"{len(ins.operands)}, not {n + 1}")
    if n == 1:
        (a,) = s
        return lambda S, m: put(S, fn(a(S)), m)
    if n == 2:
        a, b = s
        return lambda S, m: put(S, fn(a(S), b(S)), m)
    a, b, c = s
    return lambda S, m: put(S, fn(a(S), b(S), c(S)), m)


EXTERNAL = {}  # functions of the device runtime, which device_runtime.py has
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
