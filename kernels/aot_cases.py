"""What the ahead-of-time compiler compiles: for each op the axes that change its code, and small arguments.

An axis has a name and the values it may take, the plainest first. Arguments are tensors of a few rows on the
CPU; their values do not matter, because nothing runs, but what host code reads from them is legal. A case may
say `sizes`, other numbers of users, candidates ... than SIZES: those of a batch to be measured or modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]  # a value for each axis

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,  # with torch.set_float32_matmul_precision("high")
}
# Every native head dim, and one that is not: its loads are masked.
HEAD_DIMS = (64, 16, 32, 128, 256, 40)
NO_YES = (False, True)
HEADS = 4
# Small enough to be allocated for every case, as nothing is written. Of histories a short one, and one that
# is split over blocks unless candidates alone fill a GPU ("full"); of a catalogue's users few, whose tiles
# are cut to fill one, and many.
SIZES = {"users": 3, "candidates": 5, "events": 70, "rows": 70, "items": 3000, "negatives": 50}
SIZES |= {"long": 5000, "full": 4000, "many": 70_000}


@dataclass(frozen=True)
class OpCases:
    """`function` is the op's name, `arguments(case)` what it is called with."""

    function: str
    axes: dict[str, tuple]
    arguments: Callable[[Case], dict[str, Any]]
    legal: Callable[[Case], bool] = lambda case: True

    def outer(self) -> Iterator[Case]:
        """Every dtype with every head dim."""
        for dtype, head_dim in product(self.axes["dtype"], self.axes["head_dim"]):
            yield {"dtype": dtype, "head_dim": head_dim}


# --- choosing cases -----------------------------------------------------------------------------------------


def covering(axes: dict[str, tuple], legal: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Cases in which every pair of values of two axes occurs that a legal case can have.

    Greedy and deterministic: a case starts from the first pair still missing and takes, axis by axis, the
    value that covers most of the others.
    """
    names = list(axes)
    possible = _pairs_of(_legal_cases(axes, legal))
    missing = dict.fromkeys(
        pair
        for a, b in combinations(names, 2)
        for pair in (((a, x), (b, y)) for x, y in product(axes[a], axes[b]))
        if pair in possible
    )
    cases = []
    while missing:
        best = max(_extensions(axes, legal, next(iter(missing)), missing), key=lambda c: _gain(c, missing))
        cases.append(best)
        for pair in _pairs_of([best]):
            missing.pop(pair, None)
    return cases


def _legal_cases(axes: dict[str, tuple], legal: Callable[[Case], bool]) -> Iterator[Case]:
    return filter(legal, (dict(zip(axes, values, strict=True)) for values in product(*axes.values())))


def _pairs_of(cases: Iterable[Case]) -> set[tuple]:
    return {pair for case in cases for pair in combinations(case.items(), 2)}


def _gain(case: Case, missing: dict) -> int:
    return sum(pair in missing for pair in combinations(case.items(), 2))


def _extensions(
    axes: dict[str, tuple], legal: Callable[[Case], bool], pair: tuple, missing: dict
) -> Iterator[Case]:
    """Legal cases that contain `pair`: the greedy one, and the others only where that is not legal."""
    case = dict(pair)
    for name, values in axes.items():
        if name not in case:
            case = max((_with(axes, case, name, x) for x in values), key=lambda c: _gain(c, missing))
    if legal(case):
        yield case
    else:
        yield from (c for c in _legal_cases(axes, legal) if dict(pair).items() <= c.items())


def _with(axes: dict[str, tuple], case: Case, name: str, value: Any) -> Case:
    """`case` with one more value, in the order of the axes, so that pairs are spelled alike everywhere."""
    extended = case | {name: value}
    return {axis: extended[axis] for axis in axes if axis in extended}


def whole(op: OpCases) -> list[Case]:
    """For every dtype and head dim: no option, every option, and all pairs of them."""
    options = {name: values for name, values in op.axes.items() if name not in ("dtype", "head_dim")}
    plain = {name: values[0] for name, values in options.items()}
    full = {name: values[-1] for name, values in options.items()}
    cases = []
    for outer in op.outer():
        chosen = [plain, full, *covering(options, lambda c, outer=outer: op.legal(outer | c))]
        cases += [case for c in chosen if op.legal(case := outer | c)]
    return [case for n, case in enumerate(cases) if case not in cases[:n]]


# Dtypes and head dims that need most registers: operands of 512 or 1,024 bytes a row, accumulators of 256
# floats, and exact products, which have no matrix instruction. The first one meets most options at once.
RISKIEST = (("bfloat16", 256), ("float32", 64), ("tf32", 256))


def riskiest(op: OpCases) -> list[Case]:
    """A few cases in which every one of RISKIEST occurs and every value of every option."""
    options = {name: values for name, values in op.axes.items() if name not in ("dtype", "head_dim")}
    missing = {("kind", kind) for kind in RISKIEST} | {
        (n, x) for n, values in options.items() for x in values
    }
    cases = []
    while missing:
        best, gain = {}, 0
        for kind in RISKIEST:
            for values in product(*(values[::-1] for values in options.values())):
                chosen = dict(zip(options, values, strict=True))
                new = sum(pair in missing for pair in (("kind", kind), *chosen.items()))
                case = {"dtype": kind[0], "head_dim": kind[1]} | chosen
                if new > gain and op.legal(case):
                    best, gain = case, new
        cases.append(best)
        missing -= {("kind", (best["dtype"], best["head_dim"])), *best.items()}
    return cases


# --- the ops ------------------------------------------------------------------------------------------------


def _rows(*shape: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    """Zeros; strided, as a view whose row stride is not a multiple of 16 elements."""
    if not strided:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros(*shape[:-1], shape[-1] + 8, dtype=dtype)[..., : shape[-1]]


def _sizes(case: Case) -> dict[str, int]:
    return SIZES | case.get("sizes", {})


def _attention(case: Case) -> dict[str, Any]:
    dtype, dim, sizes = DTYPES[case["dtype"]], case["head_dim"], _sizes(case)
    long, full = case["history"].startswith("long"), case["history"].endswith("full")
    users = 1 if long or full else sizes["users"]
    candidates = sizes["full" if full else "candidates"]
    events = sizes["long" if long else "events"]
    rows, kv_rows, kv_heads = users * candidates, users * events, HEADS // case["group"]
    integers, strided = torch.int32 if case["int32"] else torch.int64, case["strided"]
    bias_dtype = {"none": None, "float32": torch.float32, "query's": dtype}[case["bias"]]
    return {
        "query": _rows(rows, HEADS, dim, dtype=dtype, strided=strided),
        "key": _rows(kv_rows, kv_heads, dim, dtype=dtype, strided=strided),
        "value": _rows(kv_rows, kv_heads, dim, dtype=dtype, strided=strided),
        "q_offsets": torch.arange(0, rows + 1, candidates, dtype=integers),
        "kv_offsets": torch.arange(0, kv_rows + 1, events, dtype=integers),
        "kv_lengths": torch.full((users,), events, dtype=integers) if case["kv_lengths"] else None,
        "visible": torch.full((rows,), events, dtype=integers) if case["visible"] else None,
        "self_key": _rows(rows, kv_heads, dim, dtype=dtype) if case["self"] else None,
        "self_value": _rows(rows, kv_heads, dim, dtype=dtype) if case["self"] else None,
        "key_bias": torch.zeros(kv_rows, HEADS, dtype=bias_dtype) if bias_dtype else None,
    }


def _attention_backward(case: Case) -> dict[str, Any]:
    arguments = _attention(case)
    query = arguments["query"]
    return {
        "grad_out": torch.zeros_like(query, memory_format=torch.contiguous_format),
        "grad_lse": torch.zeros(query.shape[:2]) if case["grad_lse"] else None,
        "out": torch.zeros_like(query, memory_format=torch.contiguous_format),
        "lse": torch.zeros(query.shape[:2]),
        **arguments,
    }


def _without_values(case: Case) -> dict[str, Any]:
    arguments = _attention(case)
    return {name: x for name, x in arguments.items() if name not in ("value", "self_value")}


def _softmax_score(case: Case) -> dict[str, Any]:
    dtype, dim, sizes = DTYPES[case["dtype"]], case["head_dim"], _sizes(case)
    users, items = sizes["users"], sizes["candidates"]
    integers = torch.int32 if case["int32"] else torch.int64
    return {
        "users": _rows(users, dim, dtype=dtype, strided=case["strided"]),
        "items": _rows(users * items, dim, dtype=dtype, strided=case["strided"]),
        "offsets": torch.arange(0, users * items + 1, items, dtype=integers),
        "temperature": 0.5,
        "bias": torch.zeros(users * items) if case["bias"] else None,
    }


def _softmax_score_backward(case: Case) -> dict[str, Any]:
    arguments = _softmax_score(case)
    zeros = torch.zeros(arguments["items"].shape[0], dtype=arguments["items"].dtype)
    return {"grad": zeros, "probabilities": zeros, **arguments}


def _catalog_topk(case: Case) -> dict[str, Any]:
    dtype, dim, sizes = DTYPES[case["dtype"]], case["head_dim"], _sizes(case)
    users, items = sizes["many"] if case["users"] == "many" else sizes["users"], sizes["items"]
    return {
        "users": _rows(users, dim, dtype=dtype, strided=case["strided"]),
        "catalog": _rows(items, dim, dtype=dtype, strided=case["strided"]),
        "k": case["k"],
        "exclude_ids": torch.zeros(users, dtype=torch.int64) if case["exclude"] else None,
        "exclude_offsets": torch.arange(users + 1) if case["exclude"] else None,
        "bias": torch.zeros(items) if case["bias"] else None,
        "temperature": 0.5,
    }


def _catalog_cross_entropy(case: Case) -> dict[str, Any]:
    dtype, dim, sizes = DTYPES[case["dtype"]], case["head_dim"], _sizes(case)
    rows, items = sizes["rows"], sizes["items"]
    target = torch.zeros(rows, dtype=torch.int64)
    negatives = {"none": None, "ids": torch.zeros(sizes["negatives"], dtype=torch.int64), "in-batch": target}[
        case["negatives"]
    ]
    return {
        "users": _rows(rows, dim, dtype=dtype, strided=case["strided"]),
        "table": _rows(items, dim, dtype=dtype, strided=case["strided"]),
        "target": target,
        "temperature": 0.5,
        "bias": torch.zeros(items) if case["bias"] else None,
        "logq": torch.zeros(items) if case["logq"] else None,
        "label_smoothing": 0.1 if case["smoothing"] else 0.0,
        "negatives": negatives,
        "in_batch": case["negatives"] == "in-batch",
    }


def _catalog_cross_entropy_backward(case: Case) -> dict[str, Any]:
    arguments = _catalog_cross_entropy(case)
    rows = arguments["users"].shape[0]
    return {"grad_loss": torch.zeros(rows), "lse": torch.zeros(rows), **arguments}


_COMMON = {"dtype": tuple(DTYPES), "head_dim": HEAD_DIMS}
_OPTIONS = {
    "group": (1, 4),
    "kv_lengths": NO_YES,
    "visible": NO_YES,
    "self": NO_YES,
    "bias": ("none", "float32", "query's"),
    "history": ("short", "long"),
    "int32": NO_YES,
    "strided": NO_YES,
}
_LOSS = {
    "bias": NO_YES,
    "logq": NO_YES,
    "smoothing": NO_YES,
    "negatives": ("none", "ids", "in-batch"),
    "strided": NO_YES,
}


def _smoothing_needs_the_catalog(case: Case) -> bool:
    return not case["smoothing"] or case["negatives"] == "none"


OPS = {
    op.function: op
    for op in (
        OpCases(
            "target_attention",
            _COMMON | _OPTIONS | {"history": ("short", "short, full", "long", "long, full")},
            _attention,
        ),
        OpCases(
            "target_attention_backward",
            _COMMON | _OPTIONS | {"history": ("short", "short, full", "long"), "grad_lse": NO_YES},
            _attention_backward,
        ),
        OpCases("target_attention_weights", _COMMON | _OPTIONS, _without_values),
        OpCases(
            "target_attention_top",
            _COMMON | _OPTIONS | {"top": (5, 1, 100)},
            lambda case: _without_values(case) | {"top": case["top"]},
        ),
        OpCases(
            "softmax_score", _COMMON | {"bias": NO_YES, "int32": NO_YES, "strided": NO_YES}, _softmax_score
        ),
        OpCases(
            "softmax_score_backward",
            _COMMON | {"bias": NO_YES, "int32": NO_YES, "strided": NO_YES},
            _softmax_score_backward,
        ),
        OpCases(
            "catalog_topk",
            _COMMON
            | {
                "k": (10, 1, 100, 1000),
                "users": ("few", "many"),
                "exclude": NO_YES,
                "bias": NO_YES,
                "strided": NO_YES,
            },
            _catalog_topk,
        ),
        OpCases(
            "catalog_cross_entropy", _COMMON | _LOSS, _catalog_cross_entropy, _smoothing_needs_the_catalog
        ),
        OpCases(
            "catalog_cross_entropy_backward",
            _COMMON | _LOSS,
            _catalog_cross_entropy_backward,
            _smoothing_needs_the_catalog,
        ),
    )
}
