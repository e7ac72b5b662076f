"""Evaluation over a full catalogue, for any model that has vectors or lists; the other parts are not needed.

    lists = catalog_lists(users, catalog, 20, exclude=seen)          # a generator: a batch of users at a time
    evaluate(lists, relevant, ks=(5, 10, 20), catalog_size=len(catalog))

Memory does not grow with the number of users beyond what is passed in: a batch's lists, and sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from attnrec import catalog_topk

from .metrics import Jagged, ListMetrics

BATCH_USERS = 256


def evaluate(
    lists: Tensor | Iterable[Tensor],
    relevant: Jagged,
    ks: Sequence[int] = (5, 10, 20),
    *,
    history: Jagged | None = None,
    **catalog: Any,
) -> dict[str, float]:
    """The metrics of `ListMetrics`, which has the formulas, in one pass over all users' lists.

    Args:
        lists: int `[users, >= max(ks)]`, item ids, best first, -1 after the end of a list that is shorter; or
            batches of such rows, as `catalog_lists` and any loop over a model give them.
        relevant: `(ids, offsets [users + 1])`, the items that are right for each user, in the users' order.
            Users without any are left out of hr, ndcg, mrr, recall, precision and map.
        ks: the lengths to measure at.
        history: `(ids, offsets [users + 1])`, what each user had, for lift.
        catalog: `catalog_size`, `item_users`, `users` and `item_features` of `ListMetrics`: what is known
            of the items; each adds metrics.

    Returns:
        Values by names such as `ndcg@10`.

    Raises:
        ValueError: what does not fit, by the argument's name.
    """
    metrics = ListMetrics(ks, **catalog)
    batches = lists.split(BATCH_USERS) if isinstance(lists, Tensor) else lists
    users = len(relevant[1]) - 1
    start = 0
    for batch in batches:
        end = start + len(batch)
        if end > users:
            raise ValueError(f"lists: got more than the {users} users that relevant has")
        of_batch = None if history is None else _part("history", history, start, end)
        metrics.to(batch.device).update(batch, _part("relevant", relevant, start, end), of_batch)
        start = end
    if start != users:
        raise ValueError(f"lists: got {start} users, relevant has {users}")
    return {name: value.item() for name, value in metrics.compute().items()}


def catalog_lists(
    users: Tensor,
    catalog: Any,
    k: int,
    *,
    exclude: Jagged | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Iterator[Tensor]:
    """The ids of each user's k best items of the whole catalogue, `[<= 256, k]` a batch of users.

    Args: as of `attnrec.catalog_topk`. `users` `[users, D]` may be a memory-mapped tensor of any length; the
    offsets of `exclude` run over all of them.
    """
    for start in range(0, len(users), BATCH_USERS):
        end = min(start + BATCH_USERS, len(users))
        seen = None if exclude is None else _part("exclude", exclude, start, end)
        yield catalog_topk(users[start:end], catalog, k, exclude=seen, bias=bias, temperature=temperature)[1]


def _part(name: str, jagged: Jagged, start: int, end: int) -> Jagged:
    """Of the users from `start` to `end`."""
    ids, offsets = jagged
    if len(offsets) <= end:
        raise ValueError(f"{name}: offsets are of {len(offsets) - 1} users, there are {end} or more")
    first, last = int(offsets[start]), int(offsets[end])
    if not 0 <= first <= last <= len(ids):
        raise ValueError(f"{name}: offsets must rise from 0 to the number of ids, {len(ids)}")
    return ids[first:last], offsets[start : end + 1] - first
