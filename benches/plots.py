"""The report's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from benches import tables
from benches.run import OURS, Row, is_ours

# The first is ours in plots that show it; as many as an op has peers.
COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#9333ea",
    "#dc2626",
    "#0891b2",
    "#a16207",
    "#db2777",
    "#64748b",
    "#65a30d",
    "#7c2d12",
    "#0f172a",
)
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
    peers = sorted({name for row in rows for name in row["results"] if not is_ours(name)})
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


ACROSS = 3  # panels side by side: more are too small to read on a page


def growth(found: dict[str, dict[str, list[tuple[int, float, float | None]]]], path: Path) -> Path:
    """For each size that is varied time, and memory below it; in the legends the slopes."""
    bands = -(-len(found) // ACROSS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * bands, ACROSS, figsize=(10, 5.2 * bands), squeeze=False, layout="constrained"
        )
        names = sorted(
            {name for contenders in found.values() for name in contenders}, key=lambda n: (n != OURS, n)
        )
        for ax in axes.flat:
            ax.set_visible(False)
        for number, (what, contenders) in enumerate(found.items()):
            band, column = divmod(number, ACROSS)
            for index, scale, title in ((1, 1e3, f"{what}: time, ms"), (2, 2.0**-20, f"{what}: memory, MiB")):
                ax = axes[2 * band + index - 1][column]
                ax.set_visible(True)
                for i, name in enumerate(names):
                    points = [(p[0], p[index] * scale) for p in contenders.get(name, ()) if p[index]]
                    if points:
                        label = f"{name}, slope {tables.slope(points):.2f}"
                        ax.plot(
                            *zip(*points, strict=True), "o-", markersize=3.5, label=label, color=COLOURS[i]
                        )
                _growth_axes(ax, title)
        figure.savefig(path)
        plt.close(figure)
    return path


def _growth_axes(ax: plt.Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, high = ax.dataLim.intervaly
    if high < 8 * low:  # else a difference of a tenth fills the panel
        middle = (low * high) ** 0.5
        ax.set_ylim(middle / 8**0.5, middle * 8**0.5)
    ax.xaxis.set_major_formatter(FuncFormatter(_plain_numbers))
    ax.yaxis.set_major_formatter(FuncFormatter(_plain_numbers))
    ax.yaxis.set_minor_formatter(FuncFormatter(_few_numbers))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)
