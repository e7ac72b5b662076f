"""The CUDA C++ kernels beside their Triton twins by the performance model, a section of docs/gpu-model.md.

    python -m benches.model_cuda [--arch 80 90] [--docs docs/gpu-model.md]

Both are compiled for the chip as they are, without options, in bf16, and their loops over whole tiles are
compared. A CUDA C++ kernel asks for options at run time, so that the model takes the plain path through its
loop (`benches/sassmodel/paths.py`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from attnrec.kernels import aot

from benches.model import BACKWARD_EVENTS, BACKWARD_ROWS, FORWARD, SCORES, analysis_of, plain_case
from benches.model_page import CHIP, MARK, table
from benches.sassmodel import Analysis, analyse, load
from benches.sassmodel.model import hot_loop
from benches.sassmodel.paths import plain
from benches.sassmodel.sass import find_tool

CSRC = Path(__file__).resolve().parent.parent / "csrc"
WARPS = 4  # of a block, by the launch plans, where users have many rows
HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Twin:
    """A CUDA C++ kernel and the Triton kernel that does the same."""

    op: str
    triton: str
    header: str
    kernel: str
    arguments: Callable[[int], str]  # of the template, by head dim
    bytes: str  # of shared memory, as C++
    rows: str  # of a tile of the stream, as C++
    tensors: int  # that stream
    flops: int  # of a score and head dim in the loop's products


def _row_blocks(head_dim: int) -> str:
    return f"BFloat16, {head_dim}, {2 if head_dim <= 64 else 1}"


TWINS = (
    Twin(
        "target_attention",
        "target_attention._forward",
        "target_attention.cuh",
        "target_attention_kernel",
        _row_blocks,
        "AttentionMemory<{arguments}>::bytes({warps}, false)",
        "AttentionMemory<{arguments}>::kN",
        2,
        FORWARD,
    ),
    Twin(
        "target_attention_backward",
        "target_attention_backward._rows",
        "target_attention_backward.cuh",
        "grad_rows_kernel",
        lambda head_dim: f"BFloat16, {head_dim}",
        "GradRowsMemory<{arguments}>::bytes({warps})",
        "kStreamed<{arguments}>",
        2,
        BACKWARD_ROWS,
    ),
    Twin(
        "target_attention_backward",
        "target_attention_backward_events.grad_events",
        "target_attention_backward_events.cuh",
        "grad_events_kernel",
        lambda head_dim: f"BFloat16, {head_dim}",
        "GradEventsMemory<{arguments}>::bytes({warps})",
        "kStreamed<{arguments}>",
        2,
        BACKWARD_EVENTS,
    ),
    Twin(
        "catalog_cross_entropy",
        "catalog_cross_entropy._log_sums",
        "catalog_cross_entropy.cuh",
        "log_sum_kernel",
        lambda head_dim: f"BFloat16, {head_dim}",
        "LogSumShape<{arguments}>::bytes({warps})",
        "LogSumShape<{arguments}>::kN",
        1,
        SCORES,
    ),
)

SOURCE = """#include <cuda_runtime.h>
#include <cstdio>
#include "cuda/{header}"
int main() {{  // compiles this kernel and no other
  using namespace attnrec::cuda;
  std::printf("%d %d", static_cast<int>({bytes}), {rows});
  return reinterpret_cast<const void*>({kernel}<{arguments}>) == nullptr;
}}
"""


@dataclass(frozen=True)
class Loop:
    """A kernel's loop on a chip, a score apart."""

    analysis: Analysis
    scores: float  # of a warp and iteration

    @property
    def instructions(self) -> float:
        return len(self.analysis.loop.path) * 32 / self.scores

    # Of an SM for 1,000 scores:
    @property
    def bound(self) -> float:
        return self.analysis.bound * 1000 / (4 * self.scores)

    @property
    def cycles(self) -> float:
        return self.analysis.cycles * 1000 / (4 * self.scores)


def of_cuda(twin: Twin, arch: int, head_dim: int) -> Loop:
    names = {"kernel": twin.kernel, "arguments": twin.arguments(head_dim), "warps": WARPS}
    text = SOURCE.format(
        header=twin.header, bytes=twin.bytes.format(**names), rows=twin.rows.format(**names), **names
    )
    target = f"arch=compute_{arch},code=sm_{arch}" if arch < 90 else f"arch=compute_{arch}a,code=sm_{arch}a"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text(text)
        command = [find_tool("nvcc"), "-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "--keep"]
        command += ["--keep-dir", folder, "-gencode", target, str(source), "-o", f"{folder}/sizes"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        shared, rows = map(int, subprocess.check_output([f"{folder}/sizes"], text=True).split())
        (cubin,) = Path(folder).glob("kernel*.cubin")
        kernel = load(cubin, 32 * WARPS, shared, twin.kernel, twin.kernel)
    # Of 8 numbers; in a small tile some warps copy none.
    copies = twin.tensors * -(-rows * head_dim // (8 * 32 * WARPS))
    a = analyse(kernel, loop=plain(kernel, hot_loop(kernel), copies))
    return Loop(a, a.flops / (twin.flops * head_dim))


def of_triton(twin: Twin, arch: int, head_dim: int) -> Loop:
    case = plain_case(twin.op, "bfloat16", head_dim)
    launched = next(x for x in aot.launches(arch, twin.op, case) if aot.kernel_name(x) == twin.triton)
    a = analysis_of(launched)
    return Loop(a, a.flops / (twin.flops * head_dim))


# --- the section --------------------------------------------------------------------------------------------

HEAD = """
## The CUDA C++ kernels beside their Triton twins

Written by `python -m benches.model_cuda --docs docs/gpu-model.md`. Modelled, as all of this page. Both
kernels as they are compiled for the chip, in bf16, without options, a CUDA C++ block with four warps: the
loop over whole tiles, of users with many rows.

A CUDA C++ kernel asks for its options at run time, and which way a branch goes is not in the code. The model
takes the *plain path*: of all ways through the loop that do all of its matrix products and asynchronous
copies the one with the fewest other reads and then the fewest instructions. On it no option is set, rows
begin and end at multiples of 16 bytes, no row ends inside the tile, and no row's softmax gets a new base,
which happens a few times in a history; Triton's kernels do the work for a new base in every tile. An answer
is the shorter one also where the usual one is an instruction or two longer. What is outside the loop is not
compared.

Left out: `softmax_score`, exact float32 and D = 256 (no matrix product, none, columns in two parts);
`target_attention_top` and `catalog_topk`, where the data say how often something enters a list;
`target_attention_weights` and the gradient of `catalog_cross_entropy`, whose twins divide the work among
other loops. For those there are the counts of [gpu-status.md](gpu-status.md).

In each cell: CUDA C++ / Triton. *Bound*: cycles of the busiest pipe for 1,000 scores, reached with enough
warps; *cycles*: modelled with the warps that fit on an SM. The last column is Triton's cycles over CUDA
C++'s: above 1 CUDA C++ is the faster, from 0.9 to 1.1 it is a tie.
"""
TAIL = """
On an H100 Triton multiplies with wgmma, which reads its operands from shared memory by itself and takes no
issue slots; these kernels have mma.sync on every chip, which has two thirds of its rate there and whose
operands each warp loads for itself. On an A100 both have mma.sync.

What they are there for, whichever is ahead: a C++ process without Python has no other kernels
([backends.md](backends.md#without-python)), nothing is compiled at the first call, and a launch is a call in
C++, without Triton's launcher in Python. In Python Triton comes first where it has the op, until a GPU has
compared the two (`TRITON_FIRST` in `attnrec/ops/backends.py`).
"""
COLUMNS = [
    "kernel",
    "chip",
    "registers",
    "warps a scheduler",
    "instructions a score",
    "bound by",
    "bound",
    "cycles",
]


def pair(task: tuple[int, int, int]) -> tuple[list[str], float]:
    """A row of the table for TWINS[n], an architecture and a head dim, and the ratio of the cycles."""
    n, arch, head_dim = task
    both = of_cuda(TWINS[n], arch, head_dim), of_triton(TWINS[n], arch, head_dim)

    def cell(text: Callable[[Loop], str]) -> str:
        return " / ".join(map(text, both))

    ratio = both[1].cycles / both[0].cycles
    row = [
        f"`{TWINS[n].kernel}`",
        f"{CHIP[arch]} D={head_dim}",
        cell(lambda x: str(x.analysis.kernel.regs)),
        cell(lambda x: str(x.analysis.warps)),
        cell(lambda x: f"{x.instructions:.1f}"),
        cell(lambda x: x.analysis.bound_pipe),
        cell(lambda x: f"{x.bound:.0f}"),
        cell(lambda x: f"{x.cycles:.0f}"),
    ]
    return [*row, f"{ratio:.2f}"], ratio


def section(archs: Iterable[int], head_dims: Iterable[int], jobs: int) -> str:
    tasks = list(product(range(len(TWINS)), archs, head_dims))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(pair, tasks))
    ahead, behind = sum(r > 1.1 for _, r in rows), [row for row, r in rows if r < 0.9]
    lines = [HEAD, *table([*COLUMNS, "Triton / CUDA C++"], (row for row, _ in rows))]
    lines.append(
        f"CUDA C++ is ahead in {ahead} of {len(rows)} and behind in {len(behind)}"
        + ("" if not behind else ": " + "; ".join(f"{row[0]} {row[1]}" for row in behind))
        + "."
    )
    lines.append(TAIL.rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benches.model_cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=[80, 90])
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS, choices=HEAD_DIMS)
    parser.add_argument("--docs", type=Path, help="write the section at the end of this page")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    arguments = parser.parse_args(argv)
    text = section(arguments.arch, arguments.head_dim, arguments.jobs)
    print(text)
    if arguments.docs:
        page = arguments.docs.read_text().partition(MARK)[0].rstrip()
        arguments.docs.write_text(f"{page}\n\n{MARK}\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
