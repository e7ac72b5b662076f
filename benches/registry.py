"""All cases, and how to choose from them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from benches.case import Case

# A module each, with `OP` and `CASES`; the order of the tables.
OPS = (
    "target_attention",
    "target_attention_weights",
    "softmax_score",
    "catalog_topk",
    "catalog_cross_entropy",
    "fused_multi_head_attention",
    "serving",
    "training",
)
MORE = ("target_attention_options", "growth")  # more cases of these ops


def all_cases() -> list[Case]:
    """Of every file, growth last."""
    modules = [importlib.import_module(f"benches.{name}") for name in (*OPS, *MORE)]
    cases = [case for module in modules for case in module.CASES]
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys), f"two cases of one name: {[k for k in keys if keys.count(k) > 1]}"
    return cases


def select(
    cases: Sequence[Case], *, ops: Sequence[str] = (), suite: str | None = None, names: Sequence[str] = ()
) -> list[Case]:
    """Those of the ops and the suite, with one of `names` in their name. Nothing given: nothing left out."""
    return [
        case
        for case in cases
        if (not ops or case.op in ops)
        and (suite is None or case.in_suite(suite))
        and (not names or any(name in case.name for name in names))
    ]
