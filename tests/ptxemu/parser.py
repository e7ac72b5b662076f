"""PTX text -> a Module of kernels, functions and variables.

Nothing is executed or checked for meaning here: an instruction is kept as its
opcode parts, its operand strings and the scope in which names are looked up.
"""

import bisect
import re
from dataclasses import dataclass, field

from .errors import PtxError

# bytes of each fundamental type (predicates have no size in memory)
TYPE_BYTES = {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
TYPE_BYTES |= {
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "f64": 8,
    "b128": 16,
    "pred": 1,
}


@dataclass
class Scope:
    """A `{ }` region: registers, labels and variables declared in it."""

    parent: "Scope" = None
    regs: dict = field(default_factory=dict)  # name -> type
    ranges: dict = field(default_factory=dict)  # prefix -> (count, type)
    labels: dict = field(default_factory=dict)  # name -> index of the next statement
    variables: dict = field(default_factory=dict)  # name -> Variable
    tables: dict = field(default_factory=dict)  # .branchtargets name -> label names

    def register(self, name):
        """(scope that declares the register, type), or None."""
        scope = self
        while scope is not None:
            if name in scope.regs:
                return scope, scope.regs[name]
            prefix = name.rstrip("0123456789")
            if prefix in scope.ranges and len(prefix) < len(name):
                count, type_ = scope.ranges[prefix]
                if int(name[len(prefix) :]) < count:
                    return scope, type_
            scope = scope.parent
        return None

    def find(self, table, name):
        """(scope, value) of a label, variable or branch table, or None."""
        scope = self
        while scope is not None:
            if name in getattr(scope, table):
                return scope, getattr(scope, table)[name]
            scope = scope.parent
        return None


@dataclass
class Variable:
    name: str
    space: str  # global, const, shared, local or param
    type: str
    size: int  # bytes; 0 for an extern array of open size
    align: int
    init: list = None  # (bytes per element, [number or symbol text, ...])
    extern: bool = False


@dataclass
class Instruction:
    op: str  # first part of the opcode
    mods: list  # the other parts
    operands: list  # operand texts, split at top-level commas
    pred: str = None  # guard register
    negated: bool = False
    line: int = 0
    text: str = ""
    scope: Scope = None


@dataclass
class Function:
    name: str
    is_entry: bool
    params: list  # Variables of space "param"
    returns: list
    scope: Scope
    body: list = field(default_factory=list)  # Instructions
    directives: str = ""  # .reqntid, .maxntid, ... as written
    line: int = 0


@dataclass
class Module:
    functions: dict  # name -> Function with a body
    scope: Scope  # module-level variables
    externs: set  # declared but undefined functions (vprintf, ...)

    @property
    def kernels(self):
        return [f.name for f in self.functions.values() if f.is_entry]


def split_top(text, separator=","):
    """Split at separators that are outside of (), [] and {}."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_HEADER = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b(.*)", re.S)
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$.]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_VARIABLE = re.compile(
    r"(?P<pre>(?:\.(?:visible|weak|extern|common)\s+)*)\.(?P<space>global|const|shared|local|param)\b"
    r"(?P<attrs>.*?)(?P<name>[A-Za-z_$%][\w$]*)\s*(?P<dims>(?:<\d+>|\[[^\]]*\]\s*)*)"
    r"(?:=\s*(?P<init>.*))?$",
    re.S,
)


def _clean(text):
    """Blank out comments, strings and line-oriented directives, keeping every newline."""

    def blank(m):
        return re.sub(r"[^\n]", " ", m.group(0))

    text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"^[ \t]*\.file[^\n]*", blank, text, flags=re.M)
    text = re.sub(r"\.pragma[^;]*;", blank, text)
    text = re.sub(r"//[^\n]*", blank, text)
    return re.sub(r"^[ \t]*\.(loc|version|target|address_size)\b[^\n]*", blank, text, flags=re.M)


def _parse_variable(text, line):
    m = _VARIABLE.match(text)
    if not m:
        raise PtxError("cannot parse variable", line=line, text=text)
    attrs = m["attrs"].split()
    align, type_, vector = None, None, 1
    i = 0
    while i < len(attrs):
        a = attrs[i].lstrip(".")
        if a == "align":
            i += 1
            align = int(attrs[i])
        elif a in TYPE_BYTES:
            type_ = a
        elif a in ("v2", "v4"):
            vector = int(a[1])
        elif a.startswith(("attribute", "ptr", "global", "shared", "const", "local", "managed", "unified")):
            pass  # says what a pointer parameter points to
        else:
            raise PtxError(f"unknown attribute {attrs[i]!r} in a variable", line=line, text=text)
        i += 1
        if a == "ptr":  # .ptr .space .align N describe the pointee
            while i < len(attrs):
                i += 2 if attrs[i] == ".align" else 1
    count = vector
    for dim in re.findall(r"\[([^\]]*)\]", m["dims"]):
        count *= int(dim, 0) if dim.strip() else 0
    size = TYPE_BYTES[type_] * count
    init = None
    if m["init"]:
        items = [x.strip() for x in re.sub(r"[{}]", " ", m["init"]).split(",")]
        init = (TYPE_BYTES[type_], items)
        size = size or TYPE_BYTES[type_] * len(items)
    return Variable(
        m["name"], m["space"], type_, size, align or TYPE_BYTES[type_] * vector, init, "extern" in m["pre"]
    )


def _parse_registers(text, scope, line):
    m = re.match(r"\.reg\s*(?:\.(v[24])\s*)?\.(\w+)\s+(.*)", text, re.S)
    if not m or m[2] not in TYPE_BYTES:
        raise PtxError("cannot parse register declaration", line=line, text=text)
    for name in split_top(m[3]):
        r = re.match(r"([%\w$]+)<(\d+)>$", name)
        if r:
            scope.ranges[r[1]] = (int(r[2]), m[2])
        elif m[1]:  # a vector register is 2 or 4 scalar ones
            for c in "xyzw"[: int(m[1][1])]:
                scope.regs[f"{name}.{c}"] = m[2]
        else:
            scope.regs[name] = m[2]


def _parse_header(text, line, module_scope):
    m = _HEADER.match(text)
    kind, rest = m[1], m[2].strip()
    groups = []  # [(returns)] name (params) directives
    name = None
    while rest:
        if rest[0] == "(":
            end = next(
                i
                for i, c in enumerate(rest)
                if c == ")" and rest.count("(", 0, i) == rest.count(")", 0, i + 1)
            )
            groups.append((name is None, rest[1:end]))
            rest = rest[end + 1 :].strip()
        elif name is None:
            n = re.match(r"[A-Za-z_$%][\w$]*", rest)
            name, rest = n[0], rest[n.end() :].strip()
        else:
            break
    scope = Scope(module_scope)
    returns, params = [], []
    for is_return, body in groups:
        for p in split_top(body):
            if p.startswith(".reg"):
                raise PtxError("register parameters of functions are not supported", line=line, text=p)
            (returns if is_return else params).append(_parse_variable(p, line))
    return Function(name, kind == "entry", params, returns, scope, directives=rest, line=line)


def parse(text):
    """Parse a whole PTX module."""
    source = _clean(text)
    newlines = [m.start() for m in re.finditer("\n", source)]

    def line_of(pos):
        return bisect.bisect_left(newlines, pos) + 1

    module = Module({}, Scope(), set())
    function, scope = None, module.scope
    start = pos = 0

    def statement(chunk, at):
        chunk = _labels(chunk)
        stripped = chunk.strip()
        if not stripped:
            return
        line = line_of(at - len(chunk.lstrip()))
        flat = " ".join(stripped.split())
        if stripped.startswith(".reg"):
            _parse_registers(flat, scope, line)
        elif _HEADER.match(stripped):  # a declaration without a body
            module.externs.add(_parse_header(stripped, line, module.scope).name)
        elif _VARIABLE.match(stripped):
            v = _parse_variable(flat, line)
            (module.scope if v.extern else scope).variables[v.name] = v
        elif stripped.startswith((".branchtargets", ".callprototype")):
            targets = split_top(flat.split(None, 1)[1])
            scope.tables[last_label[0]] = targets
        elif function is not None and not stripped.startswith("."):
            m = _INSTRUCTION.match(flat)
            if not m:
                raise PtxError("cannot parse instruction", line=line, text=flat, kernel=function.name)
            op, *mods = m[3].split(".")
            function.body.append(Instruction(op, mods, split_top(m[4]), m[2], m[1] == "!", line, flat, scope))
        elif not stripped.startswith((".alias", ".weak", ".noreturn")):
            raise PtxError("unknown directive", line=line, text=flat)

    last_label = [None]

    def _labels(chunk):
        while (m := _LABEL.match(chunk)) is not None:
            if function is not None:
                scope.labels[m[1]] = len(function.body)
            last_label[0] = m[1]
            chunk = chunk[m.end() :]
        return chunk

    def matching(open_at):
        depth = 0
        for m in re.compile(r"[{}]").finditer(source, open_at):
            depth += 1 if m[0] == "{" else -1
            if depth == 0:
                return m.end()
        raise PtxError("unbalanced braces", line=line_of(open_at))

    delimiter = re.compile(r"[;{}]")
    while (m := delimiter.search(source, pos)) is not None:
        chunk = source[start : m.start()]
        if m[0] == ";":
            statement(chunk, m.start())
        elif m[0] == "{":
            rest = _labels(chunk).strip()
            if not rest:
                scope = Scope(scope)
            elif _HEADER.match(rest) and function is None:
                function = _parse_header(rest, line_of(m.start() - len(chunk.lstrip())), module.scope)
                module.functions[function.name] = function
                scope = function.scope
            elif rest.startswith(".section"):
                pos = start = matching(m.start())
                continue
            else:  # braces of an operand or an initialiser
                pos = matching(m.start())
                continue
        else:
            statement(chunk, m.start())
            scope = scope.parent
            if scope is module.scope:
                function = None
        pos = start = m.end()
    return module
