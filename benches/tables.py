"""Rows as tables: the words and numbers that the console, the report and the documentation share."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

from benches.run import OURS, Row, fastest_peer, geometric_mean, is_ours

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
    """A row's lines, ours first with its variants, then the others by speed, then those without a speed."""
    results: dict[str, dict[str, Any]] = row["results"]
    mine = [name for name in results if is_ours(name)]
    others = sorted(results.keys() - mine, key=lambda name: results[name]["seconds"])
    found = []
    for name in [*mine, *others]:
        r = results[name]
        found.append(
            (
                row["case"] if name == OURS else "",
                _who(name, row),
                seconds(r["seconds"]),
                f"{seconds(r['p10'])} – {seconds(r['p90'])}",
                "1" if name == OURS else f"×{ratio(r['ratio'])}" if is_ours(name) else ratio(r["ratio"]),
                _three_digits(r["gflops"]),
                _three_digits(r["gbytes_per_second"]),
                "–" if r["share"] is None else f"{r['share']:.0%}",
                bytes_(r["memory"]),
            )
        )
    blank = [""] * (len(HEADER) - 3)
    for name, words in row["wrong"].items():
        found.append((row["case"] if name == OURS else "", name, f"WRONG: {words}", *blank))
    return found


def _who(name: str, row: Row) -> str:
    """With an asterisk where there is a note; ours with its backend, where that is not the CPU's."""
    if name == OURS:
        return name if row["backend"] == "cpu" else f"{name} ({row['backend']})"
    return f"{name} *" if row["results"][name]["note"] else name


def notes(rows: Sequence[Row]) -> str:
    """What the asterisks mean, or ""."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, result in row["results"].items():
            of = found.setdefault(result["note"], [])
            if result["note"] and name not in of:
                of.append(name)
    return "; ".join(f"* {', '.join(names)}: {note}" for note, names in found.items() if note)


def by_op(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


Summary = tuple[str, str, int, float, float, float]


def against_the_fastest(rows: Sequence[Row]) -> list[Summary]:
    """Op, dtype, number of cases, and the fastest peers' ratios there: geometric mean, least, most.

    Growth is left out: its cases are one size many times.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        best = fastest_peer(row)
        if best is not None and row["varied"] is None:
            found.setdefault((row["op"], row["dtype"]), []).append(best[1])
    return [(*of, len(x), geometric_mean(x), min(x), max(x)) for of, x in found.items()]


FAMILY_HEADER = ("family", "dtype", "against", "cases", "geometric mean", "least", "where")
# Peers that are one, each case at its best: nobody uses the slower layout, or the slower engine.
GROUPS = {
    "sdpa, better layout": ("sdpa", "sdpa-strided"),
    "openvino, onnxruntime": ("openvino", "onnxruntime"),
}


def family_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Ratios to each peer over the cases of a family, the part of a case's name before the first slash."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["varied"] is not None:
            continue
        ratios = {name: r["ratio"] for name, r in row["results"].items() if not is_ours(name)}
        for group, members in GROUPS.items():
            together = [ratios[name] for name in members if name in ratios]
            if len(together) > 1:
                ratios[group] = min(together)
        family, _, rest = row["case"].partition("/")
        for name, value in ratios.items():
            of = found.setdefault((f"{row['op']}/{family}", row["dtype"], name), {})
            of[rest.removesuffix(f"/{row['dtype']}")] = value
    lines = []
    for (family, dtype, name), of in found.items():
        least = min(of, key=lambda case: of[case])
        numbers = ratio(geometric_mean(list(of.values()))), ratio(of[least])
        if len(of) > 1:
            lines.append((family, dtype, name, str(len(of)), *numbers, least))
    return lines


WITH_SOMETHING = "attnrec's own time with something added, over its time without"


def variants(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Tables of our own call with something added: header, and a line for each case that has such."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        names = [name for name in [*row["results"], *row["wrong"]] if is_ours(name) and name != OURS]
        if not names or OURS not in row["results"]:
            continue
        cells = [
            "wrong" if name in row["wrong"] else f"×{ratio(row['results'][name]['ratio'])}" for name in names
        ]
        time = seconds(row["results"][OURS]["seconds"])
        found.setdefault(("case", OURS, *names), []).append((f"{row['op']}/{row['case']}", time, *cells))
    return list(found.items())


def reasons(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Peer → reason why it did not run → in how many rows."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for name, reason in row["refused"].items():
            of_peer = found.setdefault(name, {})
            of_peer[reason] = of_peer.get(reason, 0) + 1
    return found


# --- serving ------------------------------------------------------------------------------------------------

SERVING_HEADER = ("case", "who", "p50", "p95", "p99", "answers/s", "arrivals/s")


def serving_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of the rows that simulated a service."""
    found = []
    for row in rows:
        more = row.get("more")
        for name, of in more["services"].items() if more else ():
            found.append(
                (
                    row["case"] if name == OURS else "",
                    name,
                    *(seconds(of[q]) for q in ("p50", "p95", "p99")),
                    f"{of['requests_per_second']:.0f}",
                    f"{more['arrivals_per_second']:.0f}",
                )
            )
    return found


# --- growth -------------------------------------------------------------------------------------------------


def growth(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[int, float, float | None]]]]:
    """What is varied → contender → (value, seconds, bytes), the values rising."""
    found: dict[str, dict[str, list[tuple[int, float, float | None]]]] = {}
    for row in rows:
        if row["varied"] is None:
            continue
        what, value = row["varied"]
        for name, result in row["results"].items():
            points = found.setdefault(what, {}).setdefault(name, [])
            points.append((value, result["seconds"], result["memory"]))
    for contenders in found.values():
        for points in contenders.values():
            points.sort()
    return found


GROWTH_HEADER = ("varied", "who", "values", "time", "slope of time", "slope of memory")


def growth_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = []
    for what, contenders in growth(rows).items():
        for name, points in contenders.items():
            slopes = [f"{slope([(p[0], p[i]) for p in points if p[i]]):.2f}" for i in (1, 2)]
            first, last = points[0], points[-1]
            span = f"{seconds(first[1])} → {seconds(last[1])}"
            lines.append((what, name, f"{first[0]} … {last[0]}", span, *slopes))
    return lines


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent of growth: of the least-squares line through the upper half in logarithms.

    The upper half, because small sizes pay the price of a call and not of the work.
    """
    logarithms = [(log(x), log(y)) for x, y in points if x > 0 and y > 0]
    upper = logarithms[max(0, len(logarithms) // 2 - 1) :]
    if len(upper) < 2:
        return float("nan")
    mean_x, mean_y = (sum(column) / len(upper) for column in zip(*upper, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in upper)
    # Rounded, with 0.0 added: a slope of -0.001 would be printed as "-0.00".
    return round(sum((x - mean_x) * (y - mean_y) for x, y in upper) / spread, 2) + 0.0
