"""One search of a catalogue: what `attnrec.catalog_topk` and `Catalog.topk` have in common."""

from torch import Tensor

from attnrec import ops
from attnrec.catalog.filters import Filter

Exclude = tuple[Tensor, Tensor]
Answer = tuple[Tensor, Tensor, Tensor]


def search(
    users: Tensor,
    rows: Tensor,
    k: int,
    *,
    exclude: Exclude | None,
    bias: Tensor | None,
    temperature: float,
    packed: Filter | None = None,
) -> Answer:
    if exclude is not None and not (isinstance(exclude, tuple | list) and len(exclude) == 2):
        raise TypeError(f"catalog_topk: exclude must be a pair (ids, offsets), got {type(exclude).__name__}")
    exclude_ids, exclude_offsets = (None, None) if exclude is None else exclude
    return ops.call(
        "catalog_topk",
        users,
        rows,
        k,
        exclude_ids=exclude_ids,
        exclude_offsets=exclude_offsets,
        bias=bias,
        temperature=temperature,
        **({} if packed is None else packed.arguments),
    )
