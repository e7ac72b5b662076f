"""`--report DIR`: one HTML page with the tables, and the plots beside it as PNG files."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benches import machine, plots, tables
from benches.run import OURS, Row
from benches.tables import WITH_SOMETHING

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881;
  --good: light-dark(#15803d, #4ade80); --bad: light-dark(#b91c1c, #f87171); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.machine { color: #888; } img { max-width: 100%; background: white; border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: .8rem 0; }
td, th { padding: .15rem .6rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
thead th { border-bottom: 1px solid var(--line); } tr.ours td { border-top: 1px solid var(--line); }
tr.ours { background: var(--soft); font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
code { font-size: 12px; } details { margin: .4rem 0; } .scroll { overflow-x: auto; }
"""


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes index.html and the PNG files; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = results["rows"]
    parts = [_head(results), *_overview(rows), *_families(rows)]
    for op, of_op in tables.by_op(rows).items():
        fixed = [row for row in of_op if row["varied"] is None]
        if not fixed:
            continue
        parts.append(f"<h2 id='{op}'>{op}</h2>")
        picture = plots.ratios(op, fixed, folder / f"{op}.png")
        parts += [_image(picture)] if picture else []
        parts += [_rows(fixed), _commands(fixed)]
    parts += _serving(rows, folder) + _growth(rows, folder) + [_absent(rows)]
    page = folder / "index.html"
    title = f"attnrec benchmarks, {results['suite'] or 'chosen cases'}"
    page.write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return page


def _head(results: dict[str, Any]) -> str:
    floors = results["floors"]
    limits = [f"{dtype} products {rate / 1e9:.0f} GFLOP/s" for dtype, rate in floors["flops"].items()]
    limits += [
        f"{tables.bytes_(size)} read at {rate / 1e9:.0f} GB/s" for size, rate in floors["bandwidth"][::2]
    ]
    limits += [f"{floors['exps'] / 1e9:.1f} G exponentials/s"]
    return (
        "<h1>attnrec benchmarks</h1>"
        f"<p class='machine'>{html.escape(machine.line(results['machine']))}<br>"
        f"{html.escape(results['command'])} · {results['started']} · {results['seconds']:.0f} s</p>"
        "<p>Every result was first held against the reference; what was wrong has no speed. Contenders "
        "took turns in one process. <b>Ratio</b> is a peer's time over attnrec's (above 1: attnrec is "
        "faster), taken round by round. <b>Share</b> is the machine's floor for the counted work over the "
        "time. <b>Memory</b>: "
        f"{html.escape(results['memory'])}.</p>"
        f"<p class='machine'>Floors, the better of start and end: {'; '.join(limits)}.</p>"
    )


def _overview(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"<tr><td><a href='#{op}'>{op}</a></td><td>{dtype}</td><td>{cases}</td>"
        f"{''.join(map(_ratio_cell, numbers))}</tr>"
        for op, dtype, cases, *numbers in tables.against_the_fastest(rows)
    ]
    if not lines:
        return []
    header = ("op", "dtype", "cases", "geometric mean", "least", "most")
    return ["<h2>Against the fastest peer of each case</h2>", _table(header, lines)]


def _families(rows: Sequence[Row]) -> list[str]:
    parts = []
    lines = tables.family_lines(rows)
    if lines:
        table = _plain_table(tables.FAMILY_HEADER, lines)
        parts.append(f"<details open><summary>each peer, by family of cases</summary>{table}</details>")
    for header, of in tables.variants(rows):
        parts += [f"<p>{WITH_SOMETHING}:</p>", _plain_table(header, of)]
    return parts


def _ratio_cell(value: float) -> str:
    return f"<td class='{'good' if value >= 1 else 'bad'}'>{tables.ratio(value)}</td>"


def _rows(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        for line in tables.lines(row):
            wrong = line[2].startswith("WRONG")
            cells = [
                f"<td class='{_tone(i, text, wrong)}'>{html.escape(text)}</td>" for i, text in enumerate(line)
            ]
            kind = " class='ours'" if line[1].startswith(OURS) else ""
            body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    notes = tables.notes(rows)
    return _table(tables.HEADER, body) + (f"<p class='machine'>{html.escape(notes)}</p>" if notes else "")


def _tone(column: int, text: str, wrong: bool) -> str:
    if wrong and column == 2:
        return "bad"
    if tables.HEADER[column] == "ratio" and re.fullmatch(r"[\d.]+", text) and text != "1":
        return "good" if float(text) >= 1 else "bad"
    return ""


def _table(header: Iterable[str], body: Sequence[str]) -> str:
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    content = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"<div class='scroll'><table>{content}</table></div>"


def _plain_table(header: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    return _table(
        header,
        ["<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in lines],
    )


def _commands(rows: Sequence[Row]) -> str:
    lines = "".join(f"<code>{html.escape(row['reproduce'])}</code><br>" for row in rows)
    return f"<details><summary>each row again</summary>{lines}</details>"


def _image(picture: Path) -> str:
    return f"<p><img src='{picture.name}' alt='{picture.stem}'></p>"


def _serving(rows: Sequence[Row], folder: Path) -> list[str]:
    lines = tables.serving_lines(rows)
    if not lines:
        return []
    picture = plots.serving(rows, folder / "latency.png")
    words = (
        "<p>Poisson arrivals at a stated load, mixed lengths, one process that takes up to so many waiting "
        "requests at once. Service times are real, the time between them is not waited for.</p>"
    )
    return [
        "<h2>Latency of a service</h2>",
        words,
        _image(picture),
        _plain_table(tables.SERVING_HEADER, lines),
    ]


def _growth(rows: Sequence[Row], folder: Path) -> list[str]:
    found = tables.growth(rows)
    if not found:
        return []
    picture = plots.growth(found, folder / "growth.png")
    table = _plain_table(tables.GROWTH_HEADER, tables.growth_lines(rows))
    return ["<h2>Growth</h2>", _image(picture), table]


def _absent(rows: Sequence[Row]) -> str:
    lines = [
        (name, reason, str(count))
        for name, found in tables.reasons(rows).items()
        for reason, count in found.items()
    ]
    if not lines:
        return ""
    return "<h2>Peers that did not run</h2>" + _plain_table(("peer", "reason", "cases"), lines)
