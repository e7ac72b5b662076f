"""Compiles every kernel ahead of time, without a GPU, and says what came out.

    python -m attnrec.kernels.aot [--arch 80 90 100] [--json FILE] [--subset [riskiest]] [--op NAME ...]
    python -m attnrec.kernels.aot --journal FILE     the whole set: hours, and goes on where it was stopped

The project's own host code is run on small CPU tensors under a stand-in driver, for each op over dtypes, head
dims and the options that change the code, so that what is compiled is what a GPU would run, with the launch
parameters that the table chooses. Every dtype and head dim gets all pairs of its options. With `--subset`
there are only cases in which every pair of values of two axes occurs (the architecture is one of them), with
`--subset riskiest`, which is `make aot`, for each architecture a few in which every option occurs, with the
dtypes and head dims that need most registers.

A row of the result is a compiled kernel: `kernel`, `op`, `dtype`, `arch`, `options` (constants, warps,
stages), `registers` of a thread, `shared_bytes` of a block, `spills` (bytes of a thread), `matrix` (matrix
instructions in its PTX) and the `case` that first asked for it. Offences, which end the command with 1: a
spill (but in a CAREFUL run, which does something only where there is a NaN or an infinity), more registers or
shared memory than the chip gives a block, a half-precision or tf32 product without a matrix instruction, an
error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from . import MODULES, kernel
from .aot_cases import DTYPES, HEAD_DIMS, OPS, Case, covering, riskiest, whole
from .launch import REGISTERS, fits, table
from .standin import MAX_SHARED_BYTES, Launched, stand_in

Row = dict[str, Any]
Task = tuple[int, str, Case]  # architecture, op, case

SUBSETS = ("pairs", "riskiest")
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
# A product in Triton's IR: its operands' types, and the precision of a float32 one.
PRODUCT = re.compile(r"tt\.dot (?P<options>.*?) : tensor<\S*x(?P<type>\w+)> \* tensor")
# Triton ships cuobjdump; it names, for a kernel in a cubin, what `ptxas -v` had said.
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


# --- one kernel ---------------------------------------------------------------------------------------------


@cache  # a kernel of many cases is compiled once, and looked into once
def resources(cubin: Path) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread; a Triton kernel has no other use of it than spills."""
    here = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(here) if here.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's package nor on PATH")
    found = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    registers, stack = RESOURCES.search(found.stdout).groups()
    return int(registers), int(stack)


def products(ttir: str) -> set[str]:
    """The kinds of matrix product in Triton's IR: "f16", "bf16", "tf32", or "f32" for an exact one."""
    kinds = set()
    for line in ttir.splitlines():
        if found := PRODUCT.search(line):
            kind = found["type"]
            if kind == "f32" and (precision := re.search(r"inputPrecision = (tf32|bf16)", found["options"])):
                kind = precision[1]
            kinds.add(kind)
    return kinds


def describe(launched: Launched, arch: int, op: str, case: Case) -> Row:
    """The row of one compiled kernel."""
    registers, spills = resources(launched.file("cubin"))
    matrix = sorted(set(MATRIX.findall(launched.file("ptx").read_text())))
    function = launched.source.fn
    constants = {
        function.arg_names[path[0]]: _plain(x)
        for path, x in launched.source.constants.items()
        if function.params[path[0]].is_constexpr  # and not an argument that happened to be None or 1
    }
    meta = launched.metadata
    return {
        "kernel": kernel_name(launched),
        "op": op,
        "dtype": case["dtype"],
        "arch": arch,
        "options": constants | {"num_warps": meta.num_warps, "num_stages": meta.num_stages},
        "registers": registers,
        "shared_bytes": meta.shared,
        "spills": spills,
        "products": sorted(products(launched.file("ttir").read_text())),
        "matrix": matrix,
        "case": case,
        "hash": meta.hash,
        "cubin": str(launched.file("cubin")),
    }


def kernel_name(launched: Launched) -> str:
    """The file and the function that a kernel was compiled from, "target_attention._forward"."""
    return f"{launched.source.fn.module.rpartition('.')[2]}.{launched.name}"


def _plain(x: Any) -> Any:
    return x if isinstance(x, bool | int | float | str | None) else str(x)


def offence(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    if "error" in row:
        return row["error"]
    # A kernel that only runs over tiles with a NaN or an infinity in them may be slow.
    if row["spills"] and not row["options"].get("CAREFUL"):
        return f"spills {row['spills']} bytes a thread"
    threads = 32 * row["options"]["num_warps"]
    if row["registers"] * threads > REGISTERS:
        return f"{row['registers']} registers a thread for {threads} threads, an SM has {REGISTERS}"
    most = MAX_SHARED_BYTES[row["arch"]]
    if row["shared_bytes"] > most:
        return f"{row['shared_bytes']} bytes of shared memory a block, sm_{row['arch']} has {most}"
    if set(row["products"]) - {"f32"} and not row["matrix"]:
        return f"a product of {', '.join(row['products'])} without a matrix instruction"
    return None


# --- all of them --------------------------------------------------------------------------------------------


def launches(arch: int, op: str, case: Case) -> list[Launched]:
    """What the op's host code launches in a case; compiles where Triton's cache has it not."""
    found: list[Launched] = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case["dtype"] == "tf32" else "highest")
    try:
        with stand_in(arch, found.append):
            kernel(op)(**OPS[op].arguments(case))
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def compile_case(task: Task) -> list[Row]:
    """The rows of one case; an exception becomes a row with `error`."""
    arch, op, case = task
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    try:
        return [describe(launched, arch, op, case) for launched in launches(arch, op, case)]
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
        return [{"kernel": "", "op": op, "dtype": case["dtype"], "arch": arch, "case": case, "error": text}]


def tasks(archs: list[int], ops: list[str], subset: str | None = None) -> list[Task]:
    """What is to be compiled: everything, or a subset of SUBSETS."""
    chosen = []
    for op in ops:
        if subset == "riskiest":
            chosen += [(arch, op, case) for arch in archs for case in riskiest(OPS[op])]
        elif subset == "pairs":
            cases = covering(OPS[op].axes | {"arch": tuple(archs)}, OPS[op].legal)
            chosen += [(case.pop("arch"), op, case) for case in cases]
        else:
            chosen += [(arch, op, case) for arch in archs for case in whole(OPS[op])]
    return chosen


def compile_all(
    todo: list[Task], jobs: int, progress: Callable[[int, int], None], journal: Path | None = None
) -> list[Row]:
    """Rows of all cases, each compiled kernel once, in the order of the tasks. What `journal` has is not
    compiled again, and the other cases are added to it one by one."""
    known = journalled(journal) if journal else {}
    missing = [task for task in todo if _key(task) not in known]
    with ExitStack() as stack:
        log = stack.enter_context(journal.open("a")) if journal else None
        if log:
            print(file=log)  # ends the line that a stopped run may have left
        pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=get_context("spawn")))
        for n, (task, found) in enumerate(zip(missing, pool.map(compile_case, missing), strict=True), 1):
            known[_key(task)] = found
            if log:
                entry = {"task": task, "sources": sources(task), "rows": found}
                print(json.dumps(entry), file=log, flush=True)
            progress(len(todo) - len(missing) + n, len(todo))
    rows: dict[Any, Row] = {}
    for row in (row for task in todo for row in known[_key(task)]):
        rows.setdefault(row.get("hash", id(row)), row)
    return list(rows.values())


def journalled(journal: Path) -> dict[str, list[Row]]:
    """The rows of each task that a journal has; not of those compiled from other sources."""
    found = {}
    for line in journal.read_text().splitlines() if journal.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the run was stopped while it wrote
            continue
        if entry["sources"] == sources(entry["task"]):
            found[_key(entry["task"])] = entry["rows"]
    return found


def _key(task: Task) -> str:
    return json.dumps(task)


def sources(task: Task) -> str:
    """A hash of what a task's rows come from: Triton, the ahead-of-time compiler, the op's files, and what
    the table says of the dtype and head dim to the kernels that these name."""
    arch, op, case = task
    return _sources(arch, op, DTYPES[case["dtype"]], case["head_dim"])


@cache
def _sources(arch: int, op: str, dtype: torch.dtype, head_dim: int) -> str:
    ours = "\0".join(_file(module).read_text() for module in ("aot", "aot_cases", "standin"))
    text = "\0".join(file.read_text() for file in sorted(_imported(MODULES[op])))
    entries = [
        (kernel, entry)
        for kernel, entries in table(arch).items()
        if f'"{kernel}"' in text
        for entry in entries
        if fits(entry, head_dim, dtype, traits=entry)
    ]
    return hashlib.sha256(
        "\0".join([triton.__version__, ours, text, json.dumps(entries)]).encode()
    ).hexdigest()


def _imported(module: str) -> set[Path]:
    """The file of a module of kernels/, and those of the modules that it imports."""
    found, todo = set(), {module}
    while todo:
        file = _file(todo.pop())
        if file not in found and file.exists():
            found.add(file)
            todo.update(*re.findall(r"from \.(\w*) import (\w+)", file.read_text()))
    return found


def _file(module: str) -> Path:
    return Path(__file__).with_name(f"{module}.py")


# --- the command --------------------------------------------------------------------------------------------


def _progress() -> Callable[[int, int], None]:
    """A progress bar where rich is installed and somebody watches, else a line now and then."""
    if sys.stderr.isatty():
        try:
            from rich.progress import Progress

            bar = Progress(transient=True)
            task = bar.add_task("compiling")

            def advance(done: int, total: int) -> None:
                bar.start()
                bar.update(task, completed=done, total=total)
                if done == total:
                    bar.stop()

            return advance
        except ImportError:
            pass
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 20:
            print(f"{done} of {total} cases", file=sys.stderr, flush=True)
            last = time.monotonic()

    return line


def summary(rows: list[Row]) -> Iterator[str]:
    """A line for each kernel and architecture, then the offenders."""
    yield f"{'kernel':42} {'sm':>3} {'compiled':>8} {'registers':>9} {'shared KB':>9}  matrix instruction"
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    for (name, arch), group in sorted(groups.items()):
        matrix = sorted({m for row in group for m in row["matrix"]})
        shared = max(row["shared_bytes"] for row in group) / 1024
        registers = max(row["registers"] for row in group)
        yield f"{name:42} {arch:3} {len(group):8} {registers:9} {shared:9.0f}  {', '.join(matrix) or '-'}"
    offenders = [(row, why) for row in rows if (why := offence(row))]
    if offenders:
        yield f"\n{len(offenders)} of {len(rows)} kernels are not as they must be:"
    for row, why in offenders:
        case = ", ".join(f"{k} {v}" for k, v in row["case"].items())
        yield f"  {row['kernel'] or row['op']} sm_{row['arch']}: {why}\n    case: {case}"
        if "options" in row:
            yield "    options: " + ", ".join(f"{k} {v}" for k, v in row["options"].items())


def main(argv: list[str] | None = None) -> int:
    known = [op for op in OPS if op in MODULES]
    parser = argparse.ArgumentParser(
        "python -m attnrec.kernels.aot", description="Compile every kernel ahead of time, without a GPU."
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(MAX_SHARED_BYTES)
    )
    parser.add_argument("--op", nargs="+", default=known, choices=known, help="only these ops")
    parser.add_argument(
        "--subset",
        nargs="?",
        const="pairs",
        choices=SUBSETS,
        help="instead of the whole set all pairs of values (the default), or only all values, with the "
        "dtypes and head dims that need most registers",
    )
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, help="only cases of these")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="only cases of these")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument(
        "--journal",
        type=Path,
        help="keep each case's rows there, and go on from what it has of these sources",
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    arguments = parser.parse_args(argv)
    todo = [
        (arch, op, case)
        for arch, op, case in tasks(arguments.arch, arguments.op, arguments.subset)
        if case["head_dim"] in (arguments.head_dim or HEAD_DIMS)
        and case["dtype"] in (arguments.dtype or DTYPES)
    ]
    rows = compile_all(todo, arguments.jobs, _progress(), arguments.journal)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(summary(rows)))
    return 1 if any(map(offence, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
