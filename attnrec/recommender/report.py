"""What a run leaves for people: the heat map of an explanation, CSV files, and a page with all of it."""

from __future__ import annotations

import csv
import html
import io
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display needed

import numpy as np
import torch
from matplotlib import pyplot

from attnrec._extension import extension

from . import runs
from .checkpoint import write_file
from .data import Interactions
from .serve import Explanation, Recommender


def environment() -> dict[str, Any]:
    """Where a run took place."""
    import attnrec

    return {
        "attnrec": attnrec.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu tier": "no compiled kernels" if extension is None else extension.tier_name(),
    }


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def heat_map(path: Path, data: Interactions, explanation: Explanation, events: int = 12) -> None:
    """A PNG: the weights of all events (across) in each head (down), and the heaviest events by name."""
    weights = explanation.weights
    places = explanation.heaviest(events)
    figure, (strip, bars) = pyplot.subplots(
        2, 1, figsize=(11, 7), height_ratios=(1, 1.8), layout="constrained"
    )
    image = strip.imshow(
        weights.T,
        aspect="auto",
        cmap="magma",
        vmin=0,
        interpolation="nearest",
        extent=(0.5, len(weights) + 0.5, weights.shape[1] + 0.5, 0.5),
    )
    strip.set(xlabel="event, oldest first", ylabel="head", yticks=range(1, weights.shape[1] + 1))
    figure.colorbar(image, ax=strip, label="attention weight", pad=0.01)
    left = np.zeros(len(places))
    for head in range(weights.shape[1]):
        width = weights[places, head] / weights.shape[1]
        bars.barh(range(len(places)), width, left=left, label=f"head {head + 1}")
        left += width
    rows = explanation.events[places]
    names = [
        f"{_plain(data.titles[data.item[row]])}  (rated {data.rating[row]:g}, event {place + 1})"
        for row, place in zip(rows, places, strict=True)
    ]
    bars.set_yticks(range(len(places)), names)
    bars.invert_yaxis()
    bars.set_xlabel("attention weight, mean of the heads")
    bars.legend(loc="lower right")
    figure.suptitle(
        f"User {_plain(data.user_names[explanation.user])}, {_plain(data.titles[explanation.item])}: "
        f"liked with probability {explanation.click:.2f}"
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot.close(figure)
    write_file(path, content.getvalue())


def _plain(text: str) -> str:
    # matplotlib reads text between two dollar signs as mathematics
    return text.replace("$", r"\$")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1rem }
td, th { padding: .15rem .8rem .15rem 0; text-align: left }
th { border-bottom: 1px solid #999 } td.number { text-align: right; font-variant-numeric: tabular-nums }
section { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem } h2, .wide { grid-column: 1 / -1 }
.strip { display: flex; height: 1.1rem; margin-bottom: 1px } .strip i { flex: 1; min-width: 1px }
img { max-width: 100% } small { color: #666 }
"""


def page(metrics: dict[str, Any], recommender: Recommender, users: list[int]) -> str:
    """The report: metrics, and for each user the latest events, the list, the attention to its first item."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>attnrec: recommender</title>",
        f"<style>{STYLE}</style><h1>Recommender report</h1>",
        _metrics_table(metrics),
        *(_user_section(recommender, user) for user in users),
        "<h2>Attention behind one prediction</h2><img src=heatmap.png alt='Attention weights over events'>",
        "</html>",
    ]
    return "\n".join(parts)


def _metrics_table(metrics: dict[str, Any]) -> str:
    ranking = [(name, f"{value:.4f}") for name, value in metrics["ranking"].items()]
    where = ", ".join(f"{name} {value}" for name, value in metrics["environment"].items())
    return (
        "<h2>Metrics on the test events</h2>"
        + _table(*runs.list_rows(metrics))
        + _table(("ranking", "value"), ranking)
        + f"<small>{metrics['seconds']:.0f} s on {html.escape(where)}</small>"
    )


def _user_section(recommender: Recommender, user: int) -> str:
    data = recommender.encoded.data
    span = data.history(user)
    latest = range(span.stop - 1, max(span.start, span.stop - 10) - 1, -1)
    history = [(data.titles[data.item[row]], f"{data.rating[row]:g}") for row in latest]
    found = recommender.recommend(user, 10)
    rows = [(data.titles[r.item], f"{r.probability:.4f}", f"{r.click:.2f}") for r in found]
    explanation = recommender.explain(user, found[0].item)
    carried = ", ".join(
        f"{data.titles[data.item[explanation.events[place]]]} ({explanation.weights[place].mean():.2f})"
        for place in explanation.heaviest(5)
    )
    return (
        f"<section><h2>User {html.escape(data.user_names[user])} "
        f"<small>{span.stop - span.start} events</small></h2>"
        f"<div><b>Latest events</b>{_table(('title', 'rating'), history)}</div>"
        f"<div><b>Recommended</b>{_table(('title', 'next', 'liked'), rows)}</div>"
        f"<div class=wide><b>Attention to the events, one row a head, oldest first, for "
        f"{html.escape(data.titles[explanation.item])}</b>{_strip(data, explanation)}"
        f"<small>Heaviest: {html.escape(carried)}</small></div></section>"
    )


def _strip(data: Interactions, explanation: Explanation) -> str:
    shade = explanation.weights / max(float(explanation.weights.max()), 1e-12)
    lines = []
    for head in range(shade.shape[1]):
        cells = (
            f"<i style='background:rgba(180,30,60,{value:.2f})' "
            f"title='{html.escape(data.titles[data.item[row]], quote=True)}: {weight:.3f}'></i>"
            for row, value, weight in zip(
                explanation.events, shade[:, head], explanation.weights[:, head], strict=True
            )
        )
        lines.append(f"<div class=strip>{''.join(cells)}</div>")
    return "".join(lines)


def _table(header: Sequence[str], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td{_is_number(cell)}>{html.escape(cell)}" for cell in row) for row in rows
    )
    return f"<table><tr>{head}{body}</table>"


def _is_number(cell: str) -> str:
    return " class=number" if cell.removeprefix("-").replace(".", "", 1).isdigit() else ""
