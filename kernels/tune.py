"""Measures launch parameters on the GPU at hand and writes its table.

    python -m attnrec.kernels.tune [--kernel NAME ...] [--dry-run]

For every entry of the table the candidates are compiled; those that spill or do not fit, with or without the
options that change the code, are left out; the others are timed over shapes that recommenders have; the best
by geometric mean is written, with the reason. Nothing of this happens in a user's process.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from triton import OutOfResources

from . import MODULES, kernel
from .aot import describe, launches, offence
from .aot_cases import OPS, Case
from .launch import SIZES, TABLES, Launch, arch, forced, table

# The kernels whose tiles are a choice, and the op that launches each. The others' entries stay as they are.
OP_OF = {
    "target_attention": "target_attention",
    "target_attention_weights": "target_attention_weights",
    "target_attention_top": "target_attention_top",
    "target_attention_backward_rows": "target_attention_backward",
    "target_attention_backward_events": "target_attention_backward",
    "catalog_topk": "catalog_topk",
    "catalog_cross_entropy": "catalog_cross_entropy",
    "catalog_cross_entropy_backward_users": "catalog_cross_entropy_backward",
    "catalog_cross_entropy_backward_table": "catalog_cross_entropy_backward",
}
# Short, middling and long histories, few and many candidates; a catalogue.
SHAPES = (
    {"users": 256, "candidates": 20, "events": 50, "rows": 1024, "items": 100_000},
    {"users": 64, "candidates": 256, "events": 200, "rows": 4096, "items": 100_000},
    {"users": 32, "candidates": 256, "events": 1024, "rows": 1024, "items": 1_000_000},
)
# By head dim; wider tiles spill, taller ones waste rows where users have few candidates.
_SMALL = (
    *((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 4, 3)),
    *((64, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
)
_LARGE = (
    *((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2)),
    *((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)),
)
_LARGEST = (
    *((64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 2), (32, 32, 8, 2)),
    *((32, 32, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1)),
)
MATRIX = {
    head_dim: tuple(Launch(*x) for x in tiles)
    for head_dim, tiles in ((16, _SMALL), (32, _SMALL), (64, _SMALL), (128, _LARGE), (256, _LARGEST))
}
# Exact float32 products keep a thread's rows and columns in registers: small tiles, no pipeline.
EXACT = tuple(
    Launch(m, n, warps, 1) for m, n, warps in product((16, 32, 64), (16, 32), (4, 8)) if m * n <= 1024
)

Measure = Callable[[Launch], float | None]  # a cost, the lower the better; None where it cannot be used


def cases_of(name: str, entry: dict[str, Any], head_dim: int) -> Iterable[Case]:
    """An entry's cases: without options, then with all of them, in each precision that the entry serves."""
    op = OPS[OP_OF[name]]
    wanted = {
        trait: x for trait, x in entry.items() if trait in op.axes and trait not in ("dtype", "head_dim")
    }
    for dtype in ("bfloat16",) if entry["dtype"] == "half" else _precisions(entry):
        for pick in (0, -1):
            case = {axis: values[pick] for axis, values in op.axes.items()}
            for trait, x in wanted.items():
                # A trait says whether an option is there; the axis may have several of a kind.
                case[trait] = op.axes[trait][-1 if x else 0] if isinstance(x, bool) else x
            case |= {"dtype": dtype, "head_dim": head_dim}
            if SIZES & entry.keys():
                case["history"] = "short" if entry.get("few_rows") else "short, full"
            if op.legal(case):
                yield case


def _precisions(entry: dict[str, Any]) -> tuple[str, ...]:
    tf32 = entry.get("tf32")
    return ("float32", "tf32") if tf32 is None else ("tf32",) if tf32 else ("float32",)


def candidates(entry: dict[str, Any], head_dim: int) -> tuple[Launch, ...]:
    """What may be chosen for an entry: the present choice first."""
    others = MATRIX[head_dim] if entry["dtype"] == "half" or entry.get("tf32") else EXACT
    present = Launch(*entry["launch"])
    return (present, *(x for x in others if x != present))


def why_unsound(name: str, launch: Launch, arch: int, cases: Iterable[Case]) -> str | None:
    """Why these parameters cannot be used in one of the cases (a spill, too much shared memory), or None."""
    op = OP_OF[name]
    with forced(name, launch):
        for case in cases:
            try:
                for launched in launches(arch, op, case):
                    if why := offence(describe(launched, arch, op, case)):
                        return why
            except Exception as error:  # a tile that Triton cannot compile
                return f"{type(error).__name__}"
    return None


def choose(
    found: Iterable[Launch], measure: Measure, unsound: Callable[[Launch], str | None]
) -> tuple[Launch, float, str] | None:
    """The cheapest candidate that is sound, its cost, and in words what it was chosen over.

    Soundness is asked for in the order of cost, because compiling with all options takes longest. None where
    no candidate is left.
    """
    costs = [(cost, n, launch) for n, launch in enumerate(found) if (cost := measure(launch)) is not None]
    passed = []
    for cost, _, launch in sorted(costs):
        if why := unsound(launch):
            passed.append(f"{list(launch)} {cost:.3g} but {why}")
            continue
        others = [f"{list(o)} {c:.3g}" for c, _, o in sorted(costs) if c > cost][:1]
        return launch, cost, "; ".join([*passed[:1], *others])
    return None


def retuned(
    name: str,
    entries: list[dict[str, Any]],
    measure_of: Callable[[str, dict[str, Any], int], Measure],
    arch: int,
    how: str,
) -> list[dict[str, Any]]:
    """The entries of a kernel, one for each head dim, with the best launch parameters and the reason."""
    result = []
    for entry in entries:
        for head_dim in entry["head_dim"]:
            cases = list(cases_of(name, entry, head_dim))
            best = choose(
                candidates(entry, head_dim),
                measure_of(name, entry, head_dim),
                lambda launch, cases=cases: why_unsound(name, launch, arch, cases),
            )
            if best is None:
                raise RuntimeError(f"{name}: no launch parameters for {entry['dtype']}, head dim {head_dim}")
            launch, cost, others = best
            why = f"{how}: {cost:.3g}" + (f", against {others}" if others else "")
            result.append(entry | {"head_dim": [head_dim], "launch": list(launch), "why": why})
    return result


def write(arch: int, kernels: dict[str, list[dict[str, Any]]]) -> None:
    """The table of an architecture, an entry a line."""
    parts = []
    for name, entries in kernels.items():
        lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
        parts.append(f'  "{name}": [\n{lines}\n  ]')
    (TABLES / f"sm_{arch}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


# --- on a GPU -----------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> float:
    """Microseconds of a call on the GPU."""
    from triton.testing import do_bench

    return 1e3 * do_bench(call, warmup=10, rep=50, return_mode="median")


def on_gpu(timer: Callable[[Callable[[], Any]], float]) -> Callable[..., Measure]:
    """Measures by running the op with each candidate; microseconds, the geometric mean over SHAPES."""

    def measure_of(name: str, entry: dict[str, Any], head_dim: int) -> Measure:
        case, op = next(iter(cases_of(name, entry, head_dim))), OP_OF[name]

        def measure(launch: Launch) -> float | None:
            logs = []
            with forced(name, launch):
                for shape in SHAPES:
                    arguments = _on_gpu(OPS[op].arguments(case | {"sizes": shape}))
                    try:
                        logs.append(math.log(timer(lambda arguments=arguments: kernel(op)(**arguments))))
                    except OutOfResources:  # more shared memory than the GPU has
                        return None
            return math.exp(sum(logs) / len(logs))

        return measure

    return measure_of


def _on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.cuda().normal_() if x.is_floating_point() else x.cuda()

    return {name: moved(x) for name, x in arguments.items()}


def main(argv: list[str] | None = None) -> int:
    names = [name for name, op in OP_OF.items() if op in MODULES]
    parser = argparse.ArgumentParser("python -m attnrec.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=names, default=names, help="only these kernels")
    parser.add_argument("--dry-run", action="store_true", help="print the entries, write nothing")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "tune measures on a GPU, and torch finds none here; the tables stay as they are", file=sys.stderr
        )
        return 1
    here, gpu = arch(), torch.cuda.get_device_name()
    kernels = dict(table(here))
    for name in arguments.kernel:
        kernels[name] = retuned(name, kernels[name], on_gpu(timed), here, f"measured on {gpu}, µs")
        print(f"{name}:", *map(json.dumps, kernels[name]), sep="\n  ")
    if not arguments.dry_run:
        write(here, kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
