"""Benchmarks: every result is checked first, then ours and the peers are timed in turns.

    python -m benches                                  the standard suite
    python -m benches --suite smoke --json             the small one, as JSON on the standard output
    python -m benches --op catalog_topk --report out   one op, with a page of tables and plots in out/
    python -m benches --base main~5                    this tree against another revision, interleaved

`ratio` is a peer's time over ours, `share` the machine's own floor over the time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attnrec
from benches import base, compare, console, machine, registry, tables
from benches.case import DTYPES, SUITES, Case
from benches.measure import HOW_MEMORY
from benches.peers import PACKAGES
from benches.run import OURS, Row, failed, run_case, take_shares

SCHEMA = 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--op", action="append", default=[], help="only this op's cases (may be repeated)", metavar="OP")
    add("--case", action="append", default=[], help="only cases with this in their name", metavar="TEXT")
    add("--suite", choices=SUITES, help="default: standard; with --case all")
    add("--list", action="store_true", help="list the cases and the peers, and stop")
    add("--json", nargs="?", const="-", metavar="FILE", help="write the results; without FILE to the output")
    add("--report", type=Path, metavar="DIR", help="write a page with tables and plots")
    add("--compare", type=Path, metavar="OLD.json", help="print what changed against older results")
    add("--base", metavar="REV", help="build another revision and run it against this tree, interleaved")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--backend", metavar="NAME", help="force a backend of attnrec; a call that it can't serve is wrong")
    add("--graphs", action="store_true", help="on a GPU: time replays of CUDA graphs")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's choice")
    add("--seconds", type=float, help="timing of a case (default 2, smoke 0.3)")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.graphs and options.device != "cuda":
        parser.error("--graphs: only with --device cuda")
    if options.json not in (None, "-") and not Path(options.json).parent.is_dir():  # not after the run
        parser.error(f"--json {options.json}: there is no folder {Path(options.json).parent}")
    for op in options.op:
        if op not in registry.OPS:
            parser.error(f"--op {op}: there are {', '.join(registry.OPS)}")
    if options.suite is None and not options.case:
        options.suite = "standard"
    if options.seconds is None:
        options.seconds = 0.3 if options.suite == "smoke" else 2.0
    return options


def list_cases(cases: Sequence[Case]) -> None:
    rows = [
        (c.key, c.suite, " ".join(f"{k}={v}" for k, v in c.sizes.items()), ", ".join(c.peers)) for c in cases
    ]
    console.table(f"{len(cases)} cases", ("case", "suite", "sizes", "peers"), rows)
    peers = [(package, machine.version(package) or "not installed") for package in PACKAGES.values()]
    console.table("packages of peers", ("package", "version"), peers)


def run(cases: Sequence[Case], options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Everything that the JSON holds."""
    device = torch.device(options.device)
    started = time.time()
    described = machine.describe(options.threads, device, tuple(PACKAGES.values()))
    console.say(machine.line(described), to_stderr=True)
    dtypes = sorted({case.dtype for case in cases}, key=list(DTYPES).index)
    floors = machine.measure_floors(options.threads, device, dtypes)
    rows: list[Row] = []
    with console.progress(len(cases)) as step:
        for case in cases:
            row = run_case(
                case,
                device,
                threads=options.threads,
                seconds=options.seconds,
                graphs=options.graphs,
                backend=options.backend,
                say=lambda text, key=case.key: step(f"{key}: {text}", False),
            )
            rows.append(row)
            ours = row["results"].get(OURS)
            step(f"{case.key}: {tables.seconds(ours['seconds']) if ours else 'no result'}", True)
    # At both ends: beside a busy neighbour the start alone gave 192 of 234 GFLOP/s, and shares above 100 %.
    floors = floors.better(machine.measure_floors(options.threads, device, dtypes))
    take_shares(rows, floors)
    return {
        "schema": SCHEMA,
        "command": command,
        "suite": options.suite,
        "machine": described,
        "floors": floors.to_json(),
        "memory": HOW_MEMORY,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "rows": rows,
    }


def dump(results: dict[str, Any]) -> str:
    """JSON with a line for each row, numbers with the four digits that mean something."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {name: short(x) for name, x in value.items()}
        return [short(x) for x in value] if isinstance(value, list) else value

    head = json.dumps({**results, "rows": []}, indent=1, ensure_ascii=False)
    rows = ",\n  ".join(json.dumps(short(row), ensure_ascii=False) for row in results["rows"])
    return head.replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def show(results: dict[str, Any], *, to_stderr: bool) -> None:
    for op, rows in tables.by_op(results["rows"]).items():
        lines = [line for row in rows for line in tables.lines(row)]
        console.table(op, tables.HEADER, lines, to_stderr=to_stderr)
        if notes := tables.notes(rows):
            console.say(notes, to_stderr=to_stderr)
    families = tables.family_lines(results["rows"])
    if families:
        console.table("peers' time over ours", tables.FAMILY_HEADER, families, to_stderr=to_stderr)
    for header, lines in tables.variants(results["rows"]):
        console.table(tables.WITH_SOMETHING, header, lines, to_stderr=to_stderr)
    growth = tables.growth_lines(results["rows"])
    if growth:
        console.table("growth", tables.GROWTH_HEADER, growth, to_stderr=to_stderr)
    serving = tables.serving_lines(results["rows"])
    if serving:
        console.table("serving", tables.SERVING_HEADER, serving, to_stderr=to_stderr)
    missing = [
        (name, reason, str(count))
        for name, found in tables.reasons(results["rows"]).items()
        for reason, count in found.items()
    ]
    if missing:
        console.table("peers that did not run", ("peer", "reason", "cases"), missing, to_stderr=to_stderr)
    for row in results["rows"]:
        console.say(f"again: {row['reproduce']}", to_stderr=to_stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    command = "python -m benches " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    cases = registry.select(registry.all_cases(), ops=options.op, suite=options.suite, names=options.case)
    if not cases:
        print("no such case: see --list", file=sys.stderr)
        return 2
    if options.list:
        list_cases(cases)
        return 0
    old = json.loads(options.compare.read_text()) if options.compare else None
    if options.backend:
        attnrec.use_backend(options.backend)
    if options.base:
        return base.run(cases, options)
    results = run(cases, options, command)
    quiet = options.json == "-"
    show(results, to_stderr=quiet)
    if old is not None:
        compare.show(old, results, to_stderr=quiet)
    if options.json:
        text = dump(results)
        if quiet:
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.report:
        from benches import report  # needs matplotlib

        console.say(f"report: {report.write(results, options.report)}", to_stderr=quiet)
    wrong = [row["case"] for row in results["rows"] if failed(row)]
    if wrong:
        print(f"attnrec gave no right result in {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
