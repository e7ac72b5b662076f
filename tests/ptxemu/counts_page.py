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


SUMMARY = {"instructions": "instructions a score", "sectors": "sectors", "shared": "shared bytes"}
OURS = "Triton", "CUDA C++"


def shown(row, column):
    return f"{row[column] / row['scores']:.1f}" if column == "instructions" else f"{row[column]:,}"


def table(rows):
    """A table a case."""
    lines, case = [], None
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            lines += ["", f"**{case}**", "", f"| of | kernel | {' | '.join(COLUMNS.values())} |"]
            lines.append("|" + " --- |" * (len(COLUMNS) + 2))
        cells = [shown(row, column) for column in COLUMNS]
        lines.append(f"| {row['who']} | `{row['kernel']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows):
    """Triton beside CUDA C++ in the cases that both do whole."""
    last = {(row["case"], row["who"]): row for row in rows}  # of several kernels: all together
    heads = [f"{what}, {who}" for what in SUMMARY.values() for who in OURS]
    lines = ["", f"| case | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for case in dict.fromkeys(row["case"] for row in rows):
        if all((case, who) in last for who in OURS):
            cells = [shown(last[case, who], column) for column in SUMMARY for who in OURS]
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text, results):
    """The text of docs/gpu-status.md with that part from the results: Triton beside CUDA C++, and the kernels
    of each case but those of the same shapes in fp32."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = f"\nCompiled for sm_80 with {versions}; [all figures](../benches/results/emulated/counts.json).\n"
    rows = results["rows"]
    halves = table([row for row in rows if "fp32" not in row["case"]])
    return f"{before}{BEGIN}{head}{summary(rows)}\n{halves}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
