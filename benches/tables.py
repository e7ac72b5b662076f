"""Rows as tables: the words and numbers that the console, the report and the documentation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benches.run import OURS, Row

HEADER = ("case", "who", "time", "p10 – p90", "ratio", "GFLOP/s", "GB/s", "share", "memory")


def seconds(value: float) -> str:
    """With three digits and the unit that suits."""
    unit, size = ("s", 1.0) if value >= 1 else ("ms", 1e-3) if value >= 1e-3 else ("µs", 1e-6)
    return f"{_three_digits(value / size)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def bytes_(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def lines(row: Row) -> list[tuple[str, ...]]:
    """A row's lines, ours first, then the others by speed, then those that have no speed."""
    results: dict[str, dict[str, Any]] = row["results"]
    others = sorted((name for name in results if name != OURS), key=lambda name: results[name]["seconds"])
    found = []
    for name in [OURS, *others] if OURS in results else []:
        r = results[name]
        found.append(
            (
                row["case"] if name == OURS else "",
                name,
                seconds(r["seconds"]),
                f"{seconds(r['p10'])} – {seconds(r['p90'])}",
                "1" if name == OURS else ratio(r["ratio"]),
                f"{r['gflops']:.3g}",
                f"{r['gbytes_per_second']:.3g}",
                "–" if r["share"] is None else f"{r['share']:.0%}",
                bytes_(r["memory"]),
            )
        )
    blank = [""] * (len(HEADER) - 3)
    for name, words in row["wrong"].items():
        found.append((row["case"] if name == OURS else "", name, f"WRONG: {words}", *blank))
    return found


def by_op(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


def reasons(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Peer → reason why it did not run → in how many rows."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for name, reason in row["refused"].items():
            of_peer = found.setdefault(name, {})
            of_peer[reason] = of_peer.get(reason, 0) + 1
    return found
