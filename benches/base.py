"""`--base REV`: this tree against another revision, interleaved sample by sample.

Each runs in a process of its own with the same cases; the parent asks them in turns over pipes, and the one
that is not asked waits in a read.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benches import console, tables
from benches.case import Case
from benches.machine import ROOT, git
from benches.measure import MOST_ROUNDS, SAMPLE, Times, calls_per_sample, enough, time_calls, times

HEADER = ("case", "base", "this tree", "base / this", "p10 – p90 of this")


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A folder with the revision's files and its extension built, and gone afterwards."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    if not commit:
        raise SystemExit(f"--base {revision}: git knows no such revision")
    with tempfile.TemporaryDirectory(prefix="attnrec-base-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", "-q", str(tree), commit], check=True
        )
        try:
            console.say(f"building {revision} ({commit[:10]})", to_stderr=True)
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            done = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"--base {revision} does not build:\n{done.stderr[-2000:]}")
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=False)


class Worker:
    """A process with the `attnrec` of one tree and the benchmarks of this one."""

    def __init__(self, tree: Path, device: str, threads: int, room: Path) -> None:
        # Both packages side by side under one folder, so that nothing else of a tree is imported.
        room.mkdir()
        (room / "attnrec").symlink_to(tree / "attnrec")
        (room / "benches").symlink_to(ROOT / "benches")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benches.base", device, str(threads)],
            cwd=room,
            env=os.environ | {"PYTHONPATH": str(room)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a benchmark process ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(workers: Sequence[Worker], key: str, seconds: float) -> list[Times] | str:
    """Times of each worker for a case; the last is what ratios are taken to. Or why there are none."""
    for worker, name in zip(workers, ("base", "this tree"), strict=True):
        answer = worker.ask(case=key)
        if "error" in answer:
            return f"{name}: {answer['error']}"
    calls = [worker.ask(sample=SAMPLE)["calls"] for worker in workers]
    taken: list[list[float]] = [[] for _ in workers]
    start = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if enough(turn, time.perf_counter() - start, seconds):
            break
        for i in (0, 1) if turn % 2 else (1, 0):
            taken[i].append(workers[i].ask(time=calls[i])["seconds"])
    return [times(mine, taken[-1], n) for mine, n in zip(taken, calls, strict=True)]


def run(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Prints the table; 1 where a case had no right result in this tree."""
    lines, failures = [], 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree goes then too
    with worktree(options.base) as tree, tempfile.TemporaryDirectory(prefix="attnrec-bench-") as rooms:
        workers = [
            Worker(root, options.device, options.threads, Path(rooms) / name)
            for root, name in ((tree, "base"), (ROOT, "this"))
        ]
        try:
            with console.progress(len(cases)) as step:
                for case in cases:
                    found = measure(workers, case.key, options.seconds)
                    step(case.key, True)
                    if isinstance(found, str):
                        failures += found.startswith("this")
                        lines.append((case.key, found, "", "", ""))
                        continue
                    other, ours = found
                    spread = f"{tables.seconds(ours.p10)} – {tables.seconds(ours.p90)}"
                    pair = tables.seconds(other.median), tables.seconds(ours.median)
                    lines.append((case.key, *pair, tables.ratio(other.ratio), spread))
        finally:
            for worker in workers:
                worker.close()
    console.table(f"base {options.base} against this tree", HEADER, lines)
    return 1 if failures else 0


def serve(device: torch.device) -> None:
    """The worker's side: answers a line for each line."""
    from benches import registry

    cases = {case.key: case for case in registry.all_cases()}
    call = None
    for text in sys.stdin:
        question = json.loads(text)
        if "case" in question:
            answer, call = prepare(cases[question["case"]], device)
        elif "sample" in question:
            answer = {"calls": calls_per_sample(call, question["sample"], device)}
        else:
            call()
            answer = {"seconds": time_calls(call, question["time"], device)}
        print(json.dumps(answer), flush=True)


def prepare(case: Case, device: torch.device) -> tuple[dict[str, Any], Any]:
    """The case's call, once its result has been found right."""
    try:
        problem = case.make(device)
        contender = problem.ours()
        verdict = problem.check(contender.read(contender.call()), ours=True)
    except Exception as error:  # an older revision may lack an op
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}, None
    if not verdict.right:
        return {"error": f"WRONG: {verdict}"}, None
    return {"right": True}, contender.call


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    serve(torch.device(sys.argv[1]))
