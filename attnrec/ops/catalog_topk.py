"""`catalog_topk`: checks and shapes. Forward only."""

from typing import Any

import torch
from torch import Tensor

from attnrec import reference
from attnrec.ops.checks import INTEGERS, Check
from attnrec.ops.op import Arguments, Op, wide


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
) -> None:
    checked = Check("catalog_topk", ("users", users))
    checked.tensor("users", users, "[B, D]", (None, None))
    checked.tensor("catalog", catalog, "[N, D]", (None, users.shape[1]), (users.dtype,))
    items = catalog.shape[0]
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        checked.fail("k", "be an integer", type(k).__name__, TypeError)
    if isinstance(k, int) and isinstance(items, int) and not 0 <= k <= items:
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
    if values and exclude_ids is not None:
        checked.offsets("exclude_offsets", exclude_offsets, "exclude_ids", exclude_ids.shape[0])
        checked.within("exclude_ids", exclude_ids, 0, items - 1, "the last item of the catalogue")


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
