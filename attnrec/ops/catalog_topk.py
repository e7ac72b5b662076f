"""`catalog_topk`: checks and shapes. Forward only."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from attnrec import reference
from attnrec.ops.checks import INTEGERS, Check
from attnrec.ops.op import Arguments, Op, wide
from attnrec.reference import FILTER_CODES, FILTER_PANEL


def check(
    values: bool,
    users: Any,
    catalog: Any,
    k: Any,
    *,
    exclude_ids: Any = None,
    exclude_offsets: Any = None,
    bias: Any = None,
    temperature: float = 1.0,
    filter: Any = None,
    filter_scale: Any = None,
    filter_error: Any = None,
) -> None:
    checked = Check("catalog_topk", ("users", users))
    checked.vectors("users", users, "[B, D]")
    checked.tensor("catalog", catalog, "[N, D]", (None, users.shape[1]), (users.dtype,))
    items = catalog.shape[0]
    checked.integer("k", k)
    if isinstance(k, Integral) and isinstance(items, int) and not 0 <= k <= items:
        checked.fail("k", f"be from 0 to the size of the catalogue N = {items}", k)
    if (exclude_ids is None) != (exclude_offsets is None):
        missing = "exclude_ids" if exclude_ids is None else "exclude_offsets"
        checked.fail(missing, "be given: exclude is a pair (ids, offsets)", None)
    if exclude_ids is not None:
        checked.tensor("exclude_ids", exclude_ids, "[X]", (None,), INTEGERS)
        checked.tensor("exclude_offsets", exclude_offsets, "[B + 1]", (users.shape[0] + 1,), INTEGERS)
    if bias is not None:
        checked.tensor("bias", bias, "[N]", (items,), (torch.float32, users.dtype))
    checked.number("temperature", temperature, above=0.0)
    _check_filter(checked, catalog, filter, filter_scale, filter_error)
    if values and exclude_ids is not None:
        checked.offsets("exclude_offsets", exclude_offsets, "exclude_ids", exclude_ids.shape[0])
        checked.within("exclude_ids", exclude_ids, 0, items - 1, "the last item of the catalogue")


def _check_filter(checked: Check, catalog: Tensor, filter: Any, scale: Any, error: Any) -> None:
    """The filter is one of the catalogue's present size: a stale one would hide items."""
    if filter is None:
        for name, given in (("filter_scale", scale), ("filter_error", error)):
            if given is not None:
                checked.fail(name, "be left out where there is no filter", type(given).__name__)
        return
    items, dim = catalog.shape
    kinds = dict(FILTER_CODES.values())
    together = kinds.get(getattr(filter, "dtype", None), 1)
    panels, groups = -(-items // FILTER_PANEL), -(-dim // together)
    checked.tensor(
        "filter", filter, "[N / 32, D / n, 32, n]", (panels, groups, FILTER_PANEL, together), tuple(kinds)
    )
    if not filter.is_contiguous():
        checked.fail("filter", "be contiguous", f"strides {filter.stride()}")
    if filter.dtype == FILTER_CODES["int8"][0]:
        checked.tensor("filter_scale", scale, "[N]", (items,), (torch.float32,))
    elif scale is not None and scale.numel() > 0:
        checked.fail("filter_scale", "be left out with a filter in bfloat16", list(scale.shape))
    checked.tensor("filter_error", error, "[N, 2]", (items, 2), (torch.bfloat16,))
    for name, x in (("filter_scale", scale), ("filter_error", error)):
        if x is not None and not x.is_contiguous():
            checked.fail(name, "be contiguous", f"strides {x.stride()}")


def fake(users: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, dtype = users.shape[0], wide(users.dtype)
    return (
        users.new_empty(batch, k, dtype=dtype),
        users.new_empty(batch, k, dtype=torch.int64),
        users.new_empty(batch, dtype=dtype),
    )


def autocast(arguments: Arguments, _: torch.dtype) -> Arguments:
    """The wider dtype of the two, not autocast's: a rounded catalogue would have other best items."""
    users, catalog = arguments["users"], arguments["catalog"]
    dtype = torch.promote_types(users.dtype, catalog.dtype)
    return arguments | {"users": users.to(dtype), "catalog": catalog.to(dtype)}


OPS = (Op("catalog_topk", reference.catalog_topk, check, fake, autocast),)
