"""What the compiled sm_80 kernels execute, counted: what a profiler would be asked first.

    python -m tests.ptxemu.counts [--json FILE] [--case WORD]

Runs each op's kernels on small batches on the emulator and prints a row for each kernel; the causal cases
also for flash-linear-attention's attention on the same inputs, where it is installed. All counts are of the
whole launch. `scores` are the pairs of a row and an event (or item) that the op is asked about, so that
"instructions a score" compares kernels that cut them into tiles differently.
"""

import argparse
import contextlib
import json
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from helpers import make_jagged, make_offsets

import attnrec
from ptxemu import peers
from ptxemu.counts_page import COLUMNS, table
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


def counted(function):
    """{kernel: counts} of the launches that function() makes the second time: the first may tune."""
    found = {}

    def execute(call):
        stats = call.run(races=False)
        counts = of_launch(stats, call.blocks, call.threads)
        before = found.get(call.name)
        if before:
            counts = {k: n if k == "threads_a_block" else n + before[k] for k, n in counts.items()}
        matrix = [name.removeprefix("mma ") for name in stats.classes if name.startswith("mma")]
        found[call.name] = counts | {"matrix_kinds": matrix}
        return stats

    with warnings.catch_warnings(), peers.on_an_a100(), emulated(execute):
        warnings.simplefilter("ignore")
        function()
        found.clear()
        function()
    return found


# --- cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    scores: int
    functions: dict


def ours(function):
    def run():
        with attnrec.use_backend("triton"):
            function()

    return run


def forward_and_backward(function, inputs, backward=True):
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    out = function(*leaves)
    if backward:
        torch.autograd.grad(out.float().sum(), leaves)


def causal(dim, lengths=(256, 100, 37, 129), heads=4, kv_heads=2):
    """Self-attention over histories, bf16, grouped heads: the one thing that both can do."""
    batch = make_jagged(lengths, lengths, heads=heads, kv_heads=kv_heads, dim=dim, dtype=torch.bfloat16)
    visible = torch.cat([torch.arange(1, n + 1) for n in lengths])
    inputs = batch.query, batch.key, batch.value
    offsets = batch.q_offsets

    def attnrec_(q, k, v):
        return attnrec.target_attention(q, k, v, offsets, offsets, visible=visible)

    functions = {"attnrec": ours(partial(forward_and_backward, attnrec_, inputs))}
    parallel_attn = peers.parallel_attn()
    if parallel_attn:

        def fla(q, k, v):
            return parallel_attn(q[None], k[None], v[None], cu_seqlens=offsets)[0]

        functions["flash-linear-attention"] = partial(forward_and_backward, fla, inputs)
    name = f"causal self-attention, D = {dim}, bf16, forward and backward"
    return Case(name, heads * sum(n * (n + 1) // 2 for n in lengths), functions)


def candidates(dim, options=()):
    counts, events, heads = (64, 20, 130, 1), (200, 50, 512, 129), 2
    batch = make_jagged(counts, events, heads=heads, dim=dim, dtype=torch.bfloat16, options=options)
    inputs = batch.query, batch.key, batch.value

    def attend(q, k, v):
        return attnrec.target_attention(q, k, v, *batch.args[3:], **batch.options)

    said = f" with {' and '.join(options)}" if options else ""
    name = f"target attention{said}, D = {dim}, bf16, forward and backward"
    scores = heads * sum(c * n for c, n in zip(counts, events, strict=True))
    return Case(name, scores, {"attnrec": ours(partial(forward_and_backward, attend, inputs))})


def weights(top):
    counts, events = (64, 20, 130, 1), (200, 50, 512, 129)
    batch = make_jagged(counts, events, heads=2, dim=32, dtype=torch.bfloat16)
    run = partial(attnrec.target_attention_weights, *batch.weights_args, top=top)
    scores = 2 * sum(c * n for c, n in zip(counts, events, strict=True))
    return Case(f"attention weights, {f'top {top}' if top else 'all'}", scores, {"attnrec": ours(run)})


def catalogue(op, backward=True, rows=64, items=4096, dim=64):
    generator = torch.Generator().manual_seed(0)
    users, table = (torch.randn(n, dim, generator=generator).bfloat16() for n in (rows, items))
    target = torch.randint(0, items, (rows,), generator=generator)
    offsets = make_offsets([items // rows] * rows)
    name, scores, function, inputs = {
        "softmax_score": ("softmax over a user's candidates", items,
                          lambda u, t: attnrec.softmax_score(u, t, offsets), (users, table)),
        "catalog_topk": (f"top 100 of {items} items for {rows} users", rows * items,
                         lambda u, t: attnrec.catalog_topk(u, t, 100), (users, table)),
        "catalog_cross_entropy": (f"cross-entropy over {items} items, {rows} positions", rows * items,
                                  lambda u, t: attnrec.catalog_cross_entropy(u, t, target), (users, table)),
    }[op]  # fmt: skip
    name += f", D = {dim}, bf16" + (", forward and backward" if backward else "")
    return Case(name, scores, {"attnrec": ours(partial(forward_and_backward, function, inputs, backward))})


CASES = [
    partial(causal, 32),
    partial(causal, 64),
    partial(candidates, 32),
    partial(candidates, 64),
    partial(candidates, 32, ("self", "key_bias")),
    partial(weights, 10),
    partial(weights, None),
    partial(catalogue, "softmax_score"),
    partial(catalogue, "catalog_topk", backward=False),
    partial(catalogue, "catalog_cross_entropy"),
]


def rows_of(case):
    rows = []
    for who, function in case.functions.items():
        kernels = counted(function)
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
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.ptxemu.counts")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--case", help="only cases whose name contains this")
    options = parser.parse_args(argv)
    rows = []
    for make in CASES:
        case = make()
        if options.case and options.case not in case.name:
            continue
        found = rows_of(case)
        print(table(found), flush=True)
        rows += found
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = json.dumps({"command": "python -m tests.ptxemu.counts", "versions": installed()})
        options.json.write_text(f'{head[:-1]},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
