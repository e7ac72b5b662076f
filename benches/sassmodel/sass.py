"""Compiled kernels as data: disassembly, control words, control flow, loops.

A Volta-or-later instruction is 128 bits. Bits 105..125 are the schedule that ptxas wrote,
which this module decodes; the rest is left to nvdisasm's text.

    105..108  stall       cycles before this warp may issue its next instruction
    109       yield       0: prefer another warp next (not used)
    110..112  write bar   scoreboard released when the result is written   (7: none)
    113..115  read bar    scoreboard released when the operands were read  (7: none)
    116..121  wait mask   scoreboards that must be clear before issue
    122..125  reuse       operand reuse cache (not used)
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Instr:
    addr: int
    pred: str  # "@!P0" or ""
    op: str  # "HMMA"
    mods: tuple[str, ...]  # ("16816", "F32", "BF16")
    args: str
    stall: int = 1
    wbar: int = 7
    rbar: int = 7
    wait: int = 0
    target: int = -1  # branch target, -1: none or indirect

    @property
    def name(self):
        return ".".join((self.op, *self.mods))

    @property
    def never(self):
        """Predicated off for good (ptxas pads with @!PT and @!UPT instructions)."""
        return self.pred in ("@!PT", "@!UPT")

    @property
    def conditional(self):
        """A branch that may go either way; BRA.DIV (only when the warp has diverged) among them."""
        by_operand = self.op == "BRA" and ("DIV" in self.mods or re.match(r"!?U?P\d", self.args))
        return bool((self.pred and not self.never) or by_operand)


@dataclass
class Kernel:
    name: str
    sm: int
    code: list[Instr]
    regs: int = 0
    smem: int = 0  # static + dynamic bytes of a block
    threads: int = 0  # threads of a block
    source: str = ""


def decode(instr: Instr, hi: int) -> Instr:
    """Fill the schedule from the upper 64 bits of the encoding."""
    c = hi >> 41
    instr.stall = c & 15
    instr.wbar, instr.rbar = c >> 5 & 7, c >> 8 & 7
    instr.wait = c >> 11 & 63
    return instr


def find_tool(name: str) -> str:
    """nvdisasm: on the PATH, in the CUDA toolkit, or the copy in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    places = ["/usr/local/cuda/bin"]
    if spec and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    tool = shutil.which(name) or next((p for d in places if (p := shutil.which(name, path=d))), None)
    if not tool:
        raise FileNotFoundError(
            f"{name} not found: it comes with the CUDA toolkit and (nvdisasm) with Triton's wheel"
        )
    return tool


_LINE = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*?)\s*;"
    r"\s*/\* 0x([0-9a-f]{16}) \*/"
)
_HIGH = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")


def parse(text: str) -> list[Kernel]:
    """The kernels in the output of `nvdisasm -hex`."""
    sm = int(re.search(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)", text).expand(r"\1\2"))
    kernels, kernel, labels, waiting, attribute, section, owner = {}, None, {}, [], None, "", ""

    def kernel_of(name):
        return kernels.setdefault(name, Kernel(name, sm, []))

    for line in text.splitlines():
        if m := re.match(r"//-+ \.(\S+)", line):
            section = m[1]
            kernel = kernel_of(section[5:]) if section.startswith("text.") else None
        elif kernel is not None and (m := _LINE.match(line)):
            i = Instr(int(m[1], 16), m[2] or "", m[3], tuple(m[4].split(".")[1:]), m[5])
            if t := re.search(r"`\((\.L\w+)\)", i.args):
                waiting.append((i, t[1]))
            kernel.code.append(i)
        elif kernel is not None and kernel.code and (m := _HIGH.match(line)):
            decode(kernel.code[-1], int(m[1], 16))
        elif m := re.match(r"(\.L_\w+):", line):
            labels[m[1]] = (kernel, len(kernel.code) if kernel else 0)
        elif m := re.search(r"SHI_REGISTERS=(\d+)", line):
            kernel.regs = int(m[1])
        elif m := re.search(r"nvinfo : (EIATTR_\w+)", line):
            attribute, words = m[1], []
        elif attribute == "EIATTR_REGCOUNT" and (
            m := re.search(r"\.word\s+(?:index@\((\S+)\)|0x(\w+))", line)
        ):
            owner = m[1] or owner
            if m[2]:
                kernel_of(owner).regs = int(m[2], 16)
        elif section.startswith("nv.info.") and attribute in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID"):
            words += [int(w, 16) for w in re.findall(r"0x([0-9a-f]{8})", line)] if ".word" in line else []
            if len(words) == 3 or (".word" in line and len(words) > 2):
                kernel_of(section[8:]).threads = words[0] * words[1] * words[2]
        elif section.startswith("nv.shared.") and (m := re.match(r"\s+\.(?:zero|skip)\s+(\d+)", line)):
            kernel_of(section[10:]).smem += int(m[1])
    for i, label in waiting:
        k, index = labels.get(label, (None, 0))
        if k and index < len(k.code):
            i.target = k.code[index].addr
    for k in kernels.values():  # from sm_90 the section includes the 1 KB that the system keeps
        k.smem -= 1024 if sm >= 90 and k.smem >= 1024 else 0
    return [k for k in kernels.values() if k.code]


def load(path: str | Path, threads: int, smem: int = 0, kernel: str = "", source: str = "") -> Kernel:
    """The kernel in a cubin whose name contains `kernel`.

    `threads` of a block and its dynamic shared memory `smem` (bytes) are not in a cubin. `source` names it in
    reports. A cubin with several kernels and a name that does not tell one raises ValueError.
    """
    text = subprocess.run(
        [find_tool("nvdisasm"), "-hex", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = parse(text)
    chosen = [k for k in found if kernel in k.name]
    if len(chosen) != 1:
        raise ValueError(f"{path}: pick one kernel by name: {[k.name for k in found]}")
    chosen[0].threads = threads
    chosen[0].smem += smem
    chosen[0].source = source or chosen[0].name
    return chosen[0]


@dataclass
class Loop:
    header: int  # index of the first instruction
    latch: int  # index of the branch back
    body: set[int]  # indices
    path: list[Instr] = field(default_factory=list)  # the instructions of one iteration


def blocks(code: list[Instr]) -> dict[int, tuple[int, list[int]]]:
    """Basic blocks as {start: (end, [successors])}, by instruction index."""
    at = {i.addr: n for n, i in enumerate(code)}
    starts = {0}
    for n, i in enumerate(code):
        if i.op in ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "JMXU", "BREAK"):
            starts.add(n + 1)
            if i.target in at:
                starts.add(at[i.target])
    order = sorted(s for s in starts if s < len(code))
    graph = {}
    for s, e in zip(order, [*order[1:], len(code)], strict=True):
        last, succ = code[e - 1], []
        if last.op == "BRA" and last.target in at and not last.never:
            succ.append(at[last.target])
        stops = last.op in ("BRA", "BRX", "JMP", "EXIT", "RET") and not last.conditional and not last.never
        if not stops and e < len(code):
            succ.append(e)
        graph[s] = (e, succ)
    return graph


def loops(code: list[Instr]) -> list[Loop]:
    """Natural loops, innermost first. Inside an iteration a conditional forward branch falls through: the
    guarded code runs."""
    graph, at = blocks(code), {i.addr: n for n, i in enumerate(code)}
    preds = {}
    for s, (_, succ) in graph.items():
        for t in succ:
            preds.setdefault(t, []).append(s)
    found = {}
    for s, (e, succ) in graph.items():
        for h in succ:
            if h <= s and not (h == s and e - s == 1):
                inside, todo = {h}, [s]
                while todo:
                    b = todo.pop()
                    if b not in inside and b >= h:
                        inside.add(b)
                        todo += preds.get(b, [])
                latch, old = found.get(h, (0, set()))
                found[h] = (max(latch, e - 1), old | inside)
    result = []
    for h, (latch, inside) in found.items():
        body = {n for b in inside for n in range(b, graph[b][0])}
        loop = Loop(h, latch, body)
        n, seen = h, set()
        while n in body and n not in seen:
            seen.add(n)
            i = code[n]
            loop.path.append(i)
            n += 1
            if i.op != "BRA" or i.never:
                continue
            t = at.get(i.target, -1)
            if not i.conditional:
                n = t
            elif t in body and t != h:
                n = n if n in body else t
            elif t == h and (n not in body or i is code[latch]):
                break
            if n == h:
                break
        result.append(loop)
    return sorted(result, key=lambda l: len(l.body))
