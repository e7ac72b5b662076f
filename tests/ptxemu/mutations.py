"""Faults planted in PTX, one line at a time.

`mutants(ptx, kernel)` lists them all. Each is a fault of a kind that a programmer or a compiler makes:
a barrier or a wait that is missing, a bound off by one, a mask that is lost or inverted, an operator or a
constant that is another, an address of 32 bits, fragments swapped. EQUIVALENT lists those of the project's
kernels that no input could tell; it names lines of the kernels' sources.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
EQUIVALENT = json.loads((HERE / "equivalent.json").read_text())


@cache
def source_lines(file):
    """Of a Triton kernel or of what it calls in Triton's own library, by the file's name."""
    import triton

    folders = HERE.parent.parent / "kernels", Path(triton.__file__).parent / "language"
    path = next(folder / file for folder in folders if (folder / file).exists())
    return [line.strip() for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Mutant:
    kind: str
    line: int  # of the PTX, from 1
    old: str
    new: str

    def plant(self, ptx):
        lines = ptx.split("\n")
        assert lines[self.line - 1] == self.old
        lines[self.line - 1] = self.new
        return "\n".join(lines)

    def __str__(self):
        return f"{self.kind}, PTX line {self.line}: {self.old.strip()}  ->  {self.new.strip() or '(nothing)'}"


def _swap(*pairs):
    """Opcode parts for one another, in either direction."""
    table = {**dict(pairs), **{b: a for a, b in pairs}}
    pattern = re.compile(r"(?<![\w.%])(@!?%\w+\s+)?([a-z][\w.:]*)")

    def change(line):
        m = pattern.search(line)
        parts = m[2].split(".") if m else []
        for i, part in enumerate(parts):
            if part in table:
                parts[i] = table[part]
                return line[: m.start(2)] + ".".join(parts) + line[m.end(2) :]
        return None

    return change


def _replace(pattern, new):
    pattern = re.compile(pattern)

    def change(line):
        changed = pattern.sub(new, line, count=1)
        return None if changed == line else changed

    return change


def _next_integer(line):
    """The last operand, an integer immediate, plus one."""
    m = re.match(
        r"(\s*(?:@!?%\w+ )?(?:add|sub|mul|mad|and|or|xor|shl|shr|mov|setp|min|max)\.\S+\s.*?[\s,])(-?\d+);",
        line,
    )
    return m and f"{m[1]}{int(m[2]) + 1};{line[m.end() :]}"


def _float_constant(line):
    """A float immediate other than 0 and infinities doubled; zero becomes one."""
    m = re.search(r"0f([0-9A-Fa-f]{8})", line)
    if not m or m[1].upper() in ("7F800000", "FF800000"):
        return None
    bits = int(m[1], 16)
    new = bits + 0x800000 if bits & 0x7FFFFFFF else 0x3F800000
    return f"{line[: m.start()]}0f{new:08X}{line[m.end() :]}"


def _offset(line):
    """A load, store or copy one access further."""
    m = re.match(
        r"(\s*(?:@!?%\w+ )?cp\.async\.c[ag]\..*\],\s*\[\s*[%\w]+)\s*\+\s*(\d+)\s*\](.*?0x(\w+))", line
    )
    if m:
        return f"{m[1]} + {int(m[2]) + int(m[4], 16)} ]{m[3]}{line[m.end() :]}"
    m = re.match(r"\s*(?:@!?%\w+ )?(?:ld|st|ldmatrix)\.(?!param)\S*", line)
    a = m and re.search(r"\[(\s*[%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", line)
    if not a:
        return None
    v, width = re.search(r"\.v([248])", m[0]), re.search(r"\.[busf](8|16|32|64)\b", m[0])
    step = 16 if "ldmatrix" in m[0] else int(v[1] if v else 1) * int(width[1]) // 8
    return f"{line[: a.start()]}[{a[1].strip()}+{int(a[2] or 0) + step}]{line[a.end() :]}"


def _fragments(line):
    """The first two registers of a matrix instruction's A operand swapped."""
    if not line.lstrip().startswith("mma."):
        return None
    groups = list(re.finditer(r"\{([^}]*)\}", line))
    a = groups[1]
    registers = [x.strip() for x in a[1].split(",")]
    if len(registers) < 2:
        return None
    registers[:2] = registers[1::-1]
    return f"{line[: a.start(1)]} {', '.join(registers)} {line[a.end(1) :]}"


def _low_half(line):
    """The result of a 64-bit product or sum of an address, only its low 32 bits."""
    m = re.match(r"\s*(?:mul\.lo|mad\.lo|mul\.wide|mad\.wide|shl)\.[usb](?:64|32)\s+(%rd\w+),", line)
    return m and f"{line} shl.b64 {m[1]}, {m[1]}, 32; shr.s64 {m[1]}, {m[1]}, 32;"


# A scale or another fp32 argument, which `mutants` finds, is 1.
_argument = _replace(r"ld\.param\.[bf]32(\s+%\w+), \[[%\w+]+\];", r"mov.b32\1, 0f3F800000;")


KINDS = {
    "barrier removed": _replace(r"^\s*(bar\.sync|barrier\.sync)\b[^;]*;", ""),
    "wait removed": _replace(r"^\s*cp\.async\.wait_(group|all)\b[^;]*;", ""),
    "bound off by one": _swap(("lt", "le"), ("gt", "ge"), ("ltu", "leu"), ("gtu", "geu")),
    "comparison inverted": _swap(("eq", "ne"), ("equ", "neu")),
    "guard lost": _replace(r"^(\s*)@!?%\w+ ((?:ld|st|cp|atom|red)\.)", r"\1\2"),
    "selection swapped": _replace(r"^(\s*selp\.\S+\s+[^,]+),\s*([^,]+),\s*([^,]+),", r"\1, \3, \2,"),
    "operator": _swap(("add", "sub"), ("min", "max"), ("and", "or"), ("shl", "shr")),
    "product to sum": _replace(r"^(\s*)mul\.((?:rn\.)?(?:ftz\.)?f32)", r"\1add.\2"),
    "integer constant": _next_integer,
    "float constant": _float_constant,
    "load or store moved": _offset,
    "fragments swapped": _fragments,
    "32-bit address": _low_half,
    "argument lost": _argument,
}


def mutants(ptx, kernel):
    """Every mutant of the kernel in a PTX text."""
    lines = ptx.split("\n")
    first = next(i for i, line in enumerate(lines) if re.search(rf"\.entry\s+{re.escape(kernel)}\b", line))
    floats = set(re.findall(r"\.param \.f32 (\w+)", ptx))
    found = []
    for i, line in enumerate(lines[first:], first):
        if re.match(r"\s*(//|\.|\$|\{|\}|$)", line) or "//" in line.split(";")[0]:
            continue
        for kind, change in KINDS.items():
            if kind == "argument lost" and not (
                "ld.param.f32" in line or floats.intersection(re.findall(r"\[(\w+)\]", line))
            ):
                continue
            new = change(line)
            if new is not None:
                found.append(Mutant(kind, i + 1, line, new))
    return found
