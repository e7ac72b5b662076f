"""`--compare OLD.json`: what changed since older results."""

from __future__ import annotations

from typing import Any

from benches import console, machine, tables
from benches.run import OURS

HEADER = ("case", "old", "new", "old / new", "beyond noise", "memory")


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each case of both that has our time in both.

    Beyond noise: the ranges from the 10th to the 90th percentile do not meet.
    """
    before = {(row["op"], row["case"], row["threads"]): row for row in old["rows"]}
    lines = []
    for row in new["rows"]:
        other = before.get((row["op"], row["case"], row["threads"]))
        if other is None or OURS not in row["results"] or OURS not in other["results"]:
            continue
        a, b = other["results"][OURS], row["results"][OURS]
        apart = "faster" if b["p90"] < a["p10"] else "slower" if b["p10"] > a["p90"] else ""
        memory = f"{tables.bytes_(a['memory'])} → {tables.bytes_(b['memory'])}"
        name = f"{row['op']}/{row['case']}"
        times = tables.seconds(a["seconds"]), tables.seconds(b["seconds"])
        lines.append((name, *times, tables.ratio(a["seconds"] / b["seconds"]), apart, memory))
    return lines


def show(old: dict[str, Any], new: dict[str, Any], *, to_stderr: bool = False) -> None:
    of = old["machine"]["commit"], new["machine"]["commit"]
    lines = changes(old, new)
    if lines:
        console.table(f"{of[0]} → {of[1]}", HEADER, lines, to_stderr=to_stderr)
    else:
        console.say("no case is in both with as many threads", to_stderr=to_stderr)
    differ = [
        name
        for name in ("cpu", "threads", "tier", "torch", "gpu")
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    if differ:
        console.say(
            "not the same machine: "
            + ", ".join(f"{name} {old['machine'].get(name)} → {new['machine'].get(name)}" for name in differ),
            to_stderr=to_stderr,
        )
        console.say(f"old: {machine.line(old['machine'])}", to_stderr=to_stderr)
