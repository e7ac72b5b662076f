"""What the compiled sm_80 kernels execute, counted: what a profiler would be asked first.

    python -m tests.ptxemu.counts [--json FILE] [--case WORD] [--who NAME]

Runs each op's kernels on small batches on the emulator and prints a row for each kernel: Triton's, on the
same inputs the CUDA C++ ones where the op has them and there is nvcc, and in the causal cases also
flash-linear-attention's attention, where it is installed. All counts are of the whole launch. `scores` are
the pairs of a row and an event (or item) that the op is asked about, so that "instructions a score" compares
kernels that cut them into tiles differently.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from helpers import make_jagged, make_offsets

import attnrec
from ptxemu import peers, project, session
from ptxemu.counts_page import COLUMNS, table
from ptxemu.cuda_front import CUDA_HOME
from ptxemu.triton_front import emulated


def of_launch(stats, blocks, threads):
    """The counts of a launch by class. Instructions, exponentials: by thread; matrix, barriers: by warp."""
    memory, classes = stats.memory, stats.classes
    return {
        "launches": 1,
        "blocks": blocks,
        "threads_a_block": threads,
        "instructions": stats.instructions,
        "matrix": sum(n for name, n in classes.items() if name.startswith("mma")),
        "exponential": classes["ex2"],
        "global_read": memory["global bytes read"] + memory["cp.async bytes"],
        "global_written": memory["global bytes written"],
        "sectors": sum(n for name, n in memory.items() if name.startswith("global sectors")),
        "shared": memory["shared bytes read"] + memory["shared bytes written"] + memory["cp.async bytes"],
        "conflicts": memory["shared bank conflicts"],
        "barriers": classes["barrier (threads)"] // 32,
    }


@cache
def plain_name(kernel):
    """A kernel's name in the source, of the mangled one that nvcc gives it."""
    if not kernel.startswith("_Z"):
        return kernel
    text = subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=True).stdout
    return re.search(r"(\w+)\s*[<(]", text.split("(anonymous namespace)::")[-1])[1]


def counted(function, tunes=False):
    """{kernel: counts} of the launches that function() makes; where it tunes at first, the second time."""
    found = {}

    def execute(call):
        stats = call.run(races=False)
        counts = of_launch(stats, call.blocks, int(np.prod(call.threads)))
        name = plain_name(call.name)
        before = found.get(name)
        if before:
            counts = {k: n if k == "threads_a_block" else n + before[k] for k, n in counts.items()}
        matrix = [name.removeprefix("mma ") for name in stats.classes if name.startswith("mma")]
        found[name] = counts | {"matrix_kinds": matrix}
        return stats

    with warnings.catch_warnings(), peers.on_an_a100(), emulated(execute):
        warnings.simplefilter("ignore")
        with mock.patch.object(session, "execute", execute):  # the CUDA C++ kernels'
            if tunes:
                function()
                found.clear()
            function()
    return found


# --- cases --------------------------------------------------------------------------------------------------

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    scores: int
    function: Callable
    inputs: tuple
    backward: bool = True
    peer: Callable | None = None  # another project's, on the same inputs

    def functions(self):
        """Who computes it, and what does: {name: function()}."""
        found = {"Triton": partial(self.ours, "triton", self.backward)}
        if self.op in cuda_kernels():
            both = self.backward and f"{self.op}_backward" in cuda_kernels()
            found["CUDA C++" if both == self.backward else "CUDA C++, forward"] = partial(
                self.ours, "cuda", both
            )
        if self.peer:
            found["flash-linear-attention"] = partial(
                forward_and_backward, self.peer, self.inputs, self.backward
            )
        return found

    def ours(self, backend, backward):
        with contextlib.ExitStack() as stack:
            if backend == "cuda":
                stack.enter_context(project.served())
            stack.enter_context(attnrec.use_backend(backend))
            forward_and_backward(self.function, self.inputs, backward)


@cache
def cuda_kernels():
    return set(project.kernels()) if project.why_not() is None else set()


def forward_and_backward(function, inputs, backward):
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    out = function(*leaves)
    if backward:
        torch.autograd.grad(out.float().sum(), leaves)


def causal(dim, dtype, lengths=(256, 100, 37, 129), heads=4, kv_heads=2):
    """Self-attention over histories, grouped heads: the one thing that the peer can do too, in bf16."""
    batch = make_jagged(lengths, lengths, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    visible = torch.cat([torch.arange(1, n + 1) for n in lengths])
    offsets = batch.q_offsets

    def ours(q, k, v):
        return attnrec.target_attention(q, k, v, offsets, offsets, visible=visible)

    parallel_attn = peers.parallel_attn() if dtype == torch.bfloat16 else None

    def fla(q, k, v):
        return parallel_attn(q[None], k[None], v[None], cu_seqlens=offsets)[0]

    return Case(
        f"causal self-attention, D = {dim}, {NAMES[dtype]}, forward and backward",
        "target_attention",
        heads * sum(n * (n + 1) // 2 for n in lengths),
        ours,
        (batch.query, batch.key, batch.value),
        peer=fla if parallel_attn else None,
    )


def candidates(dim, options, dtype):
    counts, events, heads = (64, 20, 130, 1), (200, 50, 512, 129), 2
    batch = make_jagged(counts, events, heads=heads, dim=dim, dtype=dtype, options=options)

    def attend(q, k, v):
        return attnrec.target_attention(q, k, v, *batch.args[3:], **batch.options)

    said = f" with {' and '.join(options)}" if options else ""
    return Case(
        f"target attention{said}, D = {dim}, {NAMES[dtype]}, forward and backward",
        "target_attention",
        heads * sum(c * n for c, n in zip(counts, events, strict=True)),
        attend,
        (batch.query, batch.key, batch.value),
    )


def weights(top, dtype):
    counts, events = (64, 20, 130, 1), (200, 50, 512, 129)
    batch = make_jagged(counts, events, heads=2, dim=32, dtype=dtype)
    return Case(
        f"attention weights, {f'top {top}' if top else 'all'}, D = 32, {NAMES[dtype]}",
        "target_attention_top" if top else "target_attention_weights",
        2 * sum(c * n for c, n in zip(counts, events, strict=True)),
        lambda q, k: attnrec.target_attention_weights(q, k, *batch.weights_args[2:], top=top),
        (batch.query, batch.key),
        backward=False,
    )


def catalogue(op, dtype, rows=64, items=4096, dim=64):
    generator = torch.Generator().manual_seed(0)
    users, table = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, items))
    target = torch.randint(0, items, (rows,), generator=generator)
    offsets = make_offsets([items // rows] * rows)
    name, scores, function = {
        "softmax_score": ("softmax over a user's candidates", items,
                          lambda u, t: attnrec.softmax_score(u, t, offsets)),
        "catalog_topk": (f"top 100 of {items} items for {rows} users", rows * items,
                         lambda u, t: attnrec.catalog_topk(u, t, 100)),
        "catalog_cross_entropy": (f"cross-entropy over {items} items, {rows} positions", rows * items,
                                  lambda u, t: attnrec.catalog_cross_entropy(u, t, target)),
    }[op]  # fmt: skip
    backward = op != "catalog_topk"
    name += f", D = {dim}, {NAMES[dtype]}" + (", forward and backward" if backward else "")
    return Case(name, op, scores, function, (users, table), backward)


CASES = [
    partial(make, *arguments, dtype)
    for make, *arguments in (
        (causal, 32),
        (causal, 64),
        (candidates, 32, ()),
        (candidates, 64, ()),
        (candidates, 32, ("self", "key_bias")),
        (weights, 10),
        (weights, None),
        (catalogue, "softmax_score"),
        (catalogue, "catalog_topk"),
        (catalogue, "catalog_cross_entropy"),
    )
    for dtype in NAMES
]


def rows_of(case, known):
    rows, functions = [], case.functions()
    for who in dict.fromkeys([*functions, *(who for name, who in known if name == case.name)]):
        if (case.name, who) in known:
            rows += known[case.name, who]
            continue
        kernels = counted(functions[who], tunes=who == "flash-linear-attention")
        for kernel, counts in kernels.items():
            rows.append({"case": case.name, "who": who, "kernel": kernel, "scores": case.scores, **counts})
        if len(kernels) > 1:
            total = {k: sum(row[k] for row in kernels.values()) for k in COLUMNS}
            rows.append({"case": case.name, "who": who, "kernel": "(all)", "scores": case.scores, **total})
    return rows


def installed():
    """{distribution: version} of what compiled the kernels and of whose they are."""
    found = {}
    for name in ("triton", "flash-linear-attention"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if cuda_kernels():
        said = subprocess.run(
            [f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=True
        )
        found["nvcc"] = re.search(r"release ([\d.]+)", said.stdout)[1]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.ptxemu.counts")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--who", help="count only this one's kernels; --json keeps what it has of the others")
    options = parser.parse_args(argv)
    if options.who and not options.json:
        parser.error("--who wants --json, a file that has the others")
    rows, known, versions = [], {}, {}
    if options.who:
        before = json.loads(options.json.read_text())
        versions = before["versions"]
        for row in before["rows"]:
            if row["who"] != options.who:
                known.setdefault((row["case"], row["who"]), []).append(row)
    for make in CASES:
        case = make()
        if options.case and options.case not in case.name:
            continue
        found = rows_of(case, known)
        print(table(found), flush=True)
        rows += found
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = json.dumps({"command": "python -m tests.ptxemu.counts", "versions": versions | installed()})
        options.json.write_text(f'{head[:-1]},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
