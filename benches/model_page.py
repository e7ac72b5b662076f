"""docs/gpu-model.md, written from the figures of `python -m benches.model`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from attnrec.kernels import launch

CHIP = {80: "A100", 90: "H100"}
MARK = "<!-- from here on: `python -m benches.model_cuda` -->"

HEAD = """# The GPU kernels by the performance model

Written by `python -m benches.model --docs docs/gpu-model.md`. **Nothing here was measured on a GPU.** Every
kernel is compiled ahead of time for the chip; `benches/sassmodel` decodes the schedule that ptxas wrote
into its instructions, finds the loop over tiles, counts what each pipe of an SM has to do in it, and
simulates the resident warps: in-order issue, stall counts, scoreboards, pipes, barriers, asynchronous
copies, wgmma groups.

## How far to trust it

Held against published figures of FlashAttention-2 and Triton kernels, its absolute rates are 0–23 % too
high at the upper end of the published ranges (11–46 % at the lower), never too low; ratios between
different kernels or chips are off by 12–16 %. Of eight comparisons of variants of one kernel that
FlashAttention-2's authors left in their source it has five right, one with the right sign and the wrong
size (heavy spills), two as ties. Left out, and all of it slows a kernel down: clocks under load, register
banks, instruction fetch, bank conflicts of shared memory, waves and tails of a grid, DRAM. The rates per
instruction agree with the stalls that ptxas leaves between neighbours; latencies are nominal. So: trust
counts, the bounding pipe, occupancy, and the sign of a difference above about 10 %. **A tie means:
measure.** Warp-specialised kernels and tcgen05 are not modelled, so sm_100 takes the H100's choice; nor are
exact float32 products, whose loops have no matrix instruction.
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def behind(page: Path) -> str:
    """What another command has written at the end of the page."""
    _, mark, after = page.read_text().partition(MARK) if page.exists() else ("", "", "")
    return f"\n{mark}{after}" if mark else ""


def _name(m: Any) -> str:
    return f"{CHIP.get(m.arch, m.arch)} D={m.head_dim}"


def page(
    mine: list[Any],
    theirs: list[Any],
    ratios: list[tuple[Any, Any, dict[str, float]]],
    shapes: dict[str, tuple[int, int]],
    floors: Callable[..., dict[str, float]],
) -> str:
    """The whole page."""
    lines = [HEAD, "## Our kernels", ""]
    lines += [
        "Without options, in bf16, as a batch of more than 1,024 events is served; `target_attention` once "
        "more as it serves such a batch when it knows (from dense or nested input, or from `max_kv_length`) "
        "that no history is longer than that. Some kernels have other tiles for up to 64 candidates a user. "
        "Costs are SM cycles for "
        "1,000 scores (a score is a row and an event), for users with *candidates x events*; `1 x 1024` is "
        "bound by memory and shows the waste of a tile only. *Ceiling* is the share of the tensor core's or "
        "the special-function unit's rate, whichever must be the busier.",
        "",
    ]
    names = [s for s in shapes if s != "loop"]
    head = ["chip", "tile, warps, stages", "registers", "blocks an SM", "bound by", "instructions a score"]
    head += ["ceiling", *names, "loop"]
    for kernel in dict.fromkeys(m.kernel for m in mine):
        lines += [f"### {kernel}", ""]
        lines += table(head, (_row(m, names) for m in mine if m.kernel == kernel))
    lines += ["## Against peers", ""]
    if ratios:
        lines += [
            "The peer's modelled cost over ours: above 1 ours is the faster, by the model. Peers run with "
            "the tiles that their own launch code chooses for the chip. They are causal; their loop over "
            "whole tiles is compared, and whole blocks with as many tiles.",
            "",
            *table(
                ["kernel", "peer", "chip", *names, "loop"],
                (
                    [
                        m.kernel,
                        f"`{peer.kernel.split(': ')[1]}`",
                        _name(m),
                        *(f"{r[s]:.2f}" if s in r else "–" for s in [*names, "loop"]),
                    ]
                    for m, peer, r in ratios
                ),
            ),
        ]
        lines += _verdict(ratios, [*names, "loop"])
    else:
        lines += ["No peer is installed.", ""]
    forward = [m for m in mine if m.kernel == "target_attention._forward"]
    if forward:
        lines += [
            "## Floors of a forward call",
            "",
            "64 users, 4 heads, 256 candidates, 200 events; and 256 users, 4 heads, 1 candidate, 1,024 "
            "events. Microseconds: the model's compute with a full chip, the bytes at the data sheet's "
            "bandwidth, and one launch inside a CUDA graph (a guess). A call takes at least the largest of "
            "them.",
            "",
            *table(
                ["chip", "256 x 200: compute", "memory", "1 x 1024: compute", "memory", "launch"],
                (_floor_row(m, floors) for m in forward),
            ),
        ]
    lines += ["## Launch parameters, and why", ""]
    lines += table(
        ["kernel", "chip", "dtype", "head dims", "tile, warps, stages", "why"],
        (
            [name, CHIP[arch], _kind(entry), _list(entry["head_dim"]), _tile(entry["launch"]), entry["why"]]
            for arch in CHIP
            for name, entries in launch.table(arch).items()
            if name in {m.table for m in mine}
            for entry in entries
        ),
    )
    noted = {(m.kernel, _name(m), n) for m in [*mine, *theirs] for n in m.notes}
    if noted:
        lines += ["## Notes on the figures", "", *(f"- {k}, {at}: {n}" for k, at, n in sorted(noted)), ""]
    return "\n".join(lines).rstrip()


def _kind(entry: dict[str, Any]) -> str:
    traits = [f"{k} {v}" for k, v in entry.items() if k not in ("dtype", "head_dim", "launch", "why")]
    return ", ".join([entry["dtype"], *traits])


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _tile(launch_: Sequence[int]) -> str:
    *shape, registers = (*launch_, None)[:5]
    return "{}x{}, {}, {}".format(*shape) + (f", {registers} registers" if registers else "")


def _row(m: Any, names: list[str]) -> list[str]:
    share = f"{m.share_of_ceiling:.0%} of {m.ceiling}"
    costs = [f"{m.costs[s]:.0f}" if s in m.costs else "–" for s in names]
    return [
        _name(m), _tile(m.launch), str(m.registers), str(m.blocks), m.pipe, f"{m.instructions:.1f}", share,
        *costs, f"{m.loop:.0f} ({m.order[0]:.0f}–{m.order[1]:.0f})",
    ]  # fmt: skip


def _floor_row(m: Any, floors: Callable[..., dict[str, float]]) -> list[str]:
    many, one = floors(m, 64, 256, 200), floors(m, 256, 1, 1024)
    figures = (many["compute"], many["memory"], one["compute"], one["memory"], one["launch"])
    return [_name(m), *(f"{x:.1f}" for x in figures)]


def _verdict(ratios: list[tuple[Any, Any, dict[str, float]]], names: list[str]) -> list[str]:
    """The goals, and where they are missed."""
    compared = [(m, s, r[s]) for m, _, r in ratios for s in names if s in r]
    missed = [f"{m.kernel}, {_name(m)}, {s}: {x:.2f}" for m, s, x in compared if x < 1]
    small = [x for m, _, x in compared if m.head_dim <= 64]
    reached = sum(x >= 1.25 for x in small)
    lines = [
        "Goals: no slower than the best peer on any shape that both serve, 1.25 times as fast at D <= 64.",
        "",
    ]
    lines.append(
        f"Slower by the model in {len(missed)} of {len(compared)} comparisons:"
        if missed
        else "Nowhere slower by the model."
    )
    lines += ["", *(f"- {x}" for x in missed), ""] if missed else [""]
    if small:
        lines += [f"1.25 at D <= 64 is reached in {reached} of {len(small)} comparisons.", ""]
    return lines
