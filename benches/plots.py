"""The report's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from benches import tables
from benches.run import OURS, Row, ours

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777", "#64748b")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 110,
    "legend.frameon": False,
}


def _plain_numbers(value: float, _: int) -> str:
    return f"{value:g}"


def _few_numbers(value: float, _: int) -> str:
    """Between the powers of ten only 2 and 5, which do not run into each other."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def ratios(op: str, rows: Sequence[Row], path: Path) -> Path | None:
    """Beside each case a dot for each peer at its ratio, and a bar for ours at its share of the machine."""
    rows = [row for row in rows if OURS in row["results"]][::-1]  # first case on top
    if not rows:
        return None
    peers = sorted({name for row in rows for name in row["results"] if not ours(name)})
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, sharey=True, figsize=(10, 1.5 + 0.24 * len(rows)), width_ratios=(3, 1), layout="constrained"
        )
        for i, peer in enumerate(peers):
            points = [
                (row["results"][peer]["ratio"], y) for y, row in enumerate(rows) if peer in row["results"]
            ]
            marker = "osD^vPX*"[i % 8]
            left.scatter(
                *zip(*points, strict=True),
                s=26,
                label=peer,
                color=COLOURS[i % len(COLOURS)],
                marker=marker,
                zorder=3,
            )
        left.axvline(1.0, color="black", linewidth=1)
        left.set_xscale("log")
        left.xaxis.set_major_formatter(FuncFormatter(_plain_numbers))
        left.xaxis.set_minor_formatter(FuncFormatter(_few_numbers))
        left.set_yticks(range(len(rows)), [row["case"] for row in rows])
        left.set_ylim(-0.7, len(rows) - 0.3)
        left.set_xlabel("peer's time / attnrec's (right of the line: attnrec is faster)")
        left.set_title(op, loc="left", fontweight="bold")
        if peers:
            figure.legend(loc="outside lower center", ncols=min(len(peers), 6))
        shares = [row["results"][OURS]["share"] or 0.0 for row in rows]
        right.barh(range(len(rows)), shares, color="#2563eb99", height=0.6)
        right.set_xlim(0, max(1.0, *shares))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        right.set_xlabel("attnrec's share")
        figure.savefig(path)
        plt.close(figure)
    return path


def serving(rows: Sequence[Row], path: Path) -> Path:
    """p50, p95 and p99 of each service, in groups."""
    rows = [row for row in rows if row.get("more")]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(rows), figsize=(5 * len(rows), 3), squeeze=False, layout="constrained"
        )
        for ax, row in zip(axes[0], rows, strict=True):
            services = row["more"]["services"]
            width = 0.8 / len(services)
            for i, (name, of) in enumerate(services.items()):
                heights = [of[q] * 1e3 for q in ("p50", "p95", "p99")]
                places = [x + (i - (len(services) - 1) / 2) * width for x in range(3)]
                ax.bar(places, heights, width * 0.92, label=name, color=COLOURS[i % len(COLOURS)])
            ax.set_xticks(range(3), ("p50", "p95", "p99"))
            ax.set_ylabel("ms")
            load = f"{row['more']['arrivals_per_second']:.0f} arrivals/s"
            ax.set_title(f"{row['case']}, {load}", loc="left", fontsize=9)
            ax.legend()
        figure.savefig(path)
        plt.close(figure)
    return path


def growth(found: dict[str, dict[str, list[tuple[int, float, float | None]]]], path: Path) -> Path:
    """Time above, memory below, a column for each size that is varied."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(found), figsize=(3.1 * len(found), 5.4), squeeze=False, layout="constrained"
        )
        names = sorted(
            {name for contenders in found.values() for name in contenders}, key=lambda n: (n != OURS, n)
        )
        for column, (what, contenders) in enumerate(found.items()):
            for i, name in enumerate(names):
                for panel, index, scale in ((0, 1, 1e3), (1, 2, 2.0**-20)):
                    points = [(p[0], p[index] * scale) for p in contenders.get(name, ()) if p[index]]
                    if not points:
                        continue
                    label = f"{name}, slope {tables.slope(points):.2f}"
                    ax = axes[panel][column]
                    ax.plot(*zip(*points, strict=True), "o-", markersize=3.5, label=label, color=COLOURS[i])
            for panel, title in ((0, f"{what}: time, ms"), (1, "memory, MiB")):
                ax = axes[panel][column]
                ax.set_title(title, loc="left", fontsize=9)
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.xaxis.set_major_formatter(FuncFormatter(_plain_numbers))
                ax.yaxis.set_major_formatter(FuncFormatter(_plain_numbers))
                ax.yaxis.set_minor_formatter(FuncFormatter(_few_numbers))
                if ax.get_legend_handles_labels()[0]:
                    ax.legend(fontsize=7)
        figure.savefig(path)
        plt.close(figure)
    return path
