"""The plain path through a loop with branches, for kernels whose options are asked at run time.

Which way a branch goes is not in the code. Of all ways through the loop the plain one does all of its matrix
products and all of its asynchronous copies, with the fewest other reads of global memory and then the
fewest instructions: no option is set, every row is there, nothing rare happens.
"""

from __future__ import annotations

from dataclasses import replace

from .model import tensor_work
from .sass import Instr, Kernel, Loop, blocks


def copies_of(path: list[Instr]) -> int:
    """Asynchronous copies of 16 bytes."""
    return sum(i.op == "LDGSTS" and "128" in i.mods and not i.never for i in path)


def plain(kernel: Kernel, loop: Loop, copies: int) -> Loop:
    """`loop` with the plain path, on which a thread makes so many copies of 16 bytes: loops inside that copy
    run until it has, all as often, other loops inside once."""
    graph = {s: block for s, block in blocks(kernel.code).items() if s in loop.body}
    # Of a block: the cost from it on, and the next.
    best: dict[int, tuple[tuple[int, ...], int | None]] = {}
    for start in sorted(graph, reverse=True):
        end, successors = graph[start]
        code = kernel.code[start:end]
        reads = sum(i.op in ("LDG", "LD") for i in code)
        cost = -tensor_work(code), -copies_of(code), reads, len(code)
        ways = [((0, 0, 0, 0), None)] if loop.header in successors else []
        ways += [(best[s][0], s) for s in successors if s > start and s in best]
        if ways:
            behind, following = min(ways, key=lambda way: way[0])
            best[start] = tuple(a + b for a, b in zip(cost, behind, strict=True)), following
    path, at, inner = [], loop.header, {}
    while at is not None:
        inner[at] = len(path)
        path.append(at)
        at = best[at][1]

    def code_of(starts: list[int]) -> list[Instr]:
        return [i for s in starts for i in kernel.code[s : graph[s][0]]]

    once = copies_of(code_of(path))
    trips, rest = divmod(copies, once) if once else (0, copies)
    if rest:
        raise ValueError(f"{kernel.name}: {copies} copies of an iteration, and {once} on the path")
    found: list[Instr] = []
    done = 0
    for n, start in enumerate(path):
        found += kernel.code[start : graph[start][0]]
        # A branch back to a block of the path that is not the header: what lies between is a loop inside.
        for s in graph[start][1]:
            if s in inner and loop.header < s <= start and copies_of(code_of(path[inner[s] : n + 1])):
                found += code_of(path[inner[s] : n + 1]) * (trips - 1)
                done += 1
    if trips > 1 and not done:
        raise ValueError(f"{kernel.name}: {copies} copies of an iteration, and no loop that makes them")
    return replace(loop, path=found)
