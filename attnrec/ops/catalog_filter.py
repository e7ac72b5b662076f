"""`catalog_filter`: checks and shapes. Forward only."""

from typing import Any

import torch
from torch import Tensor

from attnrec import reference
from attnrec.ops.checks import FLOATS, Check
from attnrec.ops.op import Op
from attnrec.reference import FILTER_CODES, FILTER_PANEL


def check(values: bool, rows: Any, dtype: Any) -> None:
    checked = Check("catalog_filter", ("rows", rows))
    checked.tensor("rows", rows, "[N, D]", (None, None), FLOATS)
    if not isinstance(dtype, str):
        checked.fail("dtype", "be a string", type(dtype).__name__, TypeError)
    if dtype not in FILTER_CODES:
        checked.fail("dtype", "be " + " or ".join(map(repr, FILTER_CODES)), repr(dtype))


def fake(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    code, together = FILTER_CODES[dtype]
    items, dim = rows.shape
    panels, groups = -(-items // FILTER_PANEL), -(-dim // together)
    return (
        rows.new_empty(panels, groups, FILTER_PANEL, together, dtype=code),
        rows.new_empty(items if dtype == "int8" else 0, dtype=torch.float32),
        rows.new_empty(items, 2, dtype=torch.bfloat16),
    )


OPS = (Op("catalog_filter", reference.catalog_filter, check, fake),)
