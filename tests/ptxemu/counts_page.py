"""The counts of the GPU kernels as Markdown, and the part of docs/gpu-status.md that shows them.

    python -m tests.ptxemu.counts_page

writes that part from benches/results/emulated/counts.json, where `python -m tests.ptxemu.counts --json` put
them.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benches/results/emulated/counts.json"
PAGE = ROOT / "docs/gpu-status.md"
BEGIN, END = "<!-- counts: from `python -m tests.ptxemu.counts_page` -->\n", "<!-- end of counts -->\n"

COLUMNS = {
    "instructions": "instructions a score",
    "matrix": "mma, by warp",
    "exponential": "ex2",
    "global_read": "global bytes read",
    "global_written": "written",
    "sectors": "sectors",
    "shared": "shared bytes",
    "conflicts": "bank conflicts",
    "barriers": "barriers, by warp",
}


def table(rows):
    """A table a case."""
    lines, case = [], None
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            lines += ["", f"**{case}**", "", f"| of | kernel | {' | '.join(COLUMNS.values())} |"]
            lines.append("|" + " --- |" * (len(COLUMNS) + 2))
        cells = [f"{row[k]:,}" for k in COLUMNS]
        cells[0] = f"{row['instructions'] / row['scores']:.1f}"
        lines.append(f"| {row['who']} | `{row['kernel']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text, results):
    """The text of docs/gpu-status.md with that part from the results."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = f"\nCompiled for sm_80 with {versions}; [all figures](../benches/results/emulated/counts.json).\n"
    return f"{before}{BEGIN}{head}{table(results['rows'])}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
