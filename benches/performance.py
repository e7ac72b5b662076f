"""Writes docs/performance.md from committed results: `python -m benches.performance [RESULTS.json ...]`."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches import machine, tables
from benches.machine import ROOT
from benches.run import OURS, Row, fastest_peer, is_ours
from benches.tables import WITH_SOMETHING

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benches" / "results"

INTRODUCTION = """# Performance

<!-- Written by `python -m benches.performance` from benches/results; edit that, not this. -->

What a run of the benchmarks gave on the machines named below. Others give other figures: measure on yours.

```
make bench                                       # all peers installed first; results in runs/bench
python -m benches --suite smoke                  # a minute; with whatever peers are there
python -m benches --op catalog_topk --list       # what there is
python -m benches --suite growth --report out    # one size at a time, with plots
python -m benches --base main~5                  # this tree against another revision, interleaved
python -m benches --compare benches/results/X.json
```

How to read it:

- Every result is first held against the reference by the contract's rule (error at most twice that of plain
  PyTorch in the same dtype, plus a rounding step; the largest error and the root mean square); what is wrong
  has no speed.
- Contenders take turns in one process, in samples of at least 20 ms (40 where an engine brings its own
  threads). Times are medians. A **ratio** is the peer's time over attnrec's, above 1 where attnrec is
  faster, and is the median of the rounds' ratios.
- **Share** is the time that the machine would need at its own limit, measured before and after
  (matrix products, reading memory, or exponentials, the largest of the three) over the time taken. It counts
  the work that the result needs, not what somebody does.
- On a GPU a time is what lies between two events around a call, each with a cold L2 cache, so that small
  calls show their kernels and not their launches (`--graphs`: replays of a CUDA graph).
- A name that begins with `+` is attnrec's own call with something added; ×1.05 is five percent more time.
- **Memory** is {memory}.
  ONNX Runtime's results are in memory that was bound before.
- Padding is not timed, for the peers that need padded input. Engines run as their users would run them:
  OpenVINO for latency and without pinning, ONNX Runtime with bound memory and without spinning, faiss also
  with `distance_compute_blas_threshold = 1`. What computes in bf16 rounds its scores: in `catalog_topk`
  attnrec's scores are exact for the table as given, those of the bf16 peers are not.
"""

SHAPES = """\
Names are `family/sizes/dtype`; the sizes of attention are B,H,C,L,D (users, heads, candidates and events of
a user, head dim; the largest where users differ), of `catalog_topk` B,N,D,k, of `catalog_cross_entropy`
T,N,D, of the module B,H,C,L,E.
"""


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def op_table(rows: Sequence[Row]) -> str:
    """Ours, and the ratio to each peer in a column of its own."""
    peers = list(dict.fromkeys(name for row in rows for name in row["results"] if not is_ours(name)))
    lines = []
    for row in rows:
        if OURS in row["wrong"]:
            lines.append((f"`{row['case']}`", f"wrong: {row['wrong'][OURS]}", *[""] * (3 + len(peers))))
            continue
        ours = row["results"][OURS]
        best = fastest_peer(row)
        ratios = [_ratio(row, peer, best) for peer in peers]
        speed = (
            f"{ours['gflops']:.0f}" if row["bound"] != "memory" else f"{ours['gbytes_per_second']:.0f} GB/s"
        )
        share = f"{ours['share']:.0%}"
        lines.append(
            (
                f"`{row['case']}`",
                tables.seconds(ours["seconds"]),
                speed,
                share,
                tables.bytes_(ours["memory"]),
                *ratios,
            )
        )
    return table(("case", "attnrec", "GFLOP/s", "share", "memory", *peers), lines)


def _ratio(row: Row, peer: str, best: tuple[str, float] | None) -> str:
    if peer in row["wrong"]:
        return "wrong"
    if peer not in row["results"]:
        return ""
    text = tables.ratio(row["results"][peer]["ratio"])
    return f"**{text}**" if best is not None and peer == best[0] else text


def overview(rows: Sequence[Row]) -> str:
    lines = [
        (f"`{op}`", dtype, str(cases), *map(tables.ratio, numbers))
        for op, dtype, cases, *numbers in tables.against_the_fastest(rows)
    ]
    return table(("op", "dtype", "cases", "geometric mean", "least", "most"), lines)


def _families(rows: Sequence[Row]) -> list[str]:
    parts = []
    lines = [(f"`{line[0]}`", *line[1:-1], f"`{line[-1]}`") for line in tables.family_lines(rows)]
    if lines:
        parts += [
            "Each peer's time over attnrec's, by family of cases:\n",
            table(tables.FAMILY_HEADER, lines),
        ]
    for header, of in tables.variants(rows):
        parts += [f"{WITH_SOMETHING}:\n", table(header, [(f"`{line[0]}`", *line[1:]) for line in of])]
    return parts


def section(results: dict[str, Any], source: str) -> str:
    """One machine's results."""
    rows = [row for row in results["rows"] if row["varied"] is None]
    of, floors = results["machine"], results["floors"]
    limits = [f"{dtype} products {rate / 1e9:.0f} GFLOP/s" for dtype, rate in floors["flops"].items()]
    limits += [
        f"memory {floors['bandwidth'][-1][1] / 1e9:.0f} GB/s",
        f"{floors['exps'] / 1e9:.1f} G exponentials/s",
    ]
    packages = ", ".join(f"{name} {version}" for name, version in of["packages"].items())
    parts = [
        # Processors that call themselves by one name may have twice the rate of each other.
        f"## {of.get('gpu') or of['cpu']}, {of['threads']} threads, {limits[0]}\n",
        f"{machine.line(of)}\n",
        f"Peers: {packages or 'torch only'}. Measured limits: {', '.join(limits)}. "
        f"`{results['command']}`, {results['started'][:10]}, {results['seconds']:.0f} s; "
        f"[results]({source}).\n",
        "Against the fastest peer of each case (its time over attnrec's):\n",
        overview(rows),
        *_families(rows),
        SHAPES,
        "Beside attnrec's own figures stand the peers' ratios, the fastest peer's in bold.\n",
    ]
    for op, of_op in tables.by_op(rows).items():
        parts += [f"### {op}\n", op_table(of_op)]
    serving = tables.serving_lines(rows)
    if serving:
        parts += [
            "### Latency of a service\n",
            _words_on_serving(rows),
            table(tables.SERVING_HEADER, serving),
        ]
    absent = tables.reasons(rows)
    if absent:
        lines = [(n, reason, str(k)) for n, found in absent.items() for reason, k in found.items()]
        parts += ["### Peers that did not run\n", table(("peer", "reason", "cases"), lines)]
    return "\n".join(parts)


def _words_on_serving(rows: Sequence[Row]) -> str:
    counts = sorted({row["more"]["requests"] for row in rows if row.get("more")})
    return (
        f"The recommender's ranking model answers {' or '.join(map(str, counts))} requests of mixed lengths "
        "with Poisson arrivals, at 70 % of what plain PyTorch (the same model with `nn.MultiheadAttention`) "
        "answers one by one; the service takes up to so many of the waiting requests at once. Service times "
        "are real, idle time is not waited for.\n"
    )


def page(files: Sequence[Path]) -> str:
    results = [json.loads(file.read_text()) for file in files]
    memory = textwrap.fill(results[0]["memory"], 94, subsequent_indent="  ", break_on_hyphens=False)
    parts = [INTRODUCTION.format(memory=memory)]
    parts += [section(of, f"../benches/results/{file.name}") for of, file in zip(results, files, strict=True)]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.performance", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="default: all of benches/results")
    files = parser.parse_args(arguments).results or sorted(RESULTS.glob("*.json"))
    if not files:
        sys.exit(f"no results in {RESULTS}")
    PAGE.write_text(page(files))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
