"""Metrics of ranked lists, over batches of users and in bounded memory.

torchmetrics' retrieval metrics keep every list, want each missed item ranked, and loop over the users in
Python. Here are all of them for all users of a batch and all k at once, as a torchmetrics `Metric` whose
states are sums: it resets, moves between devices, and adds up over the ranks of `torch.distributed`. Tested
against torchmetrics, trec_eval and RecBole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

Jagged = tuple[Tensor, Tensor]  # ids, and offsets [B + 1]: user b's are ids[offsets[b] : offsets[b + 1]]

ACCURACY = ("hr", "ndcg", "mrr", "recall", "precision", "map")


class ListMetrics(Metric):
    """Metrics at several k of ranked lists, of what is in them and how far they reach into the catalogue.

    For a user with the relevant items R, `hit(i)` being 1 where the list's i-th item is in R and else 0,
    and hits(i) their number among the first i:

    - `hr@k`: 1 where hits(k) > 0. `recall@k`: hits(k) / |R|. `precision@k`: hits(k) / k.
    - `mrr@k`: 1 / rank of the first hit, 0 without one among the first k.
    - `ndcg@k`: sum of hit(i) / log2(i + 1), divided by what the best list has (min(k, |R|) hits in front).
      Järvelin and Kekäläinen, ACM TOIS 20(4), 2002, with gains 0 and 1.
    - `map@k`: sum of hit(i) · hits(i) / i, divided by min(k, |R|). trec_eval and ranx divide by |R|;
      torchmetrics by hits(k).

    Their mean is over the users with at least one relevant item. The rest is over all users with a list,
    whether or not there is something relevant for them:

    - `coverage@k`: share of the catalogue that is in at least one list.
    - `gini@k`: Gini index of how often the items are listed, sum of (2i − N − 1) · n_i / (N · sum of n_i),
      n_i rising: 0 where all are listed equally often, 1 − 1/N where one item fills all lists. As
      RecBole's; Gunawardana and Shani, Recommender Systems Handbook, 2015, divide by N − 1 in place of N.
    - `diversity@k`: intra-list diversity, the mean distance of two items over all pairs of a list. Ziegler
      et al., WWW 2005.
    - `novelty@k`: mean self-information of the list's items in bits, log2(users / users who had the item);
      an item that nobody had counts as one that one user had. Zhou et al., PNAS 107(10), 2010; Vargas and
      Castells, RecSys 2011.
    - `arp@k`: average recommendation popularity, the mean number of users who had the list's items. Yin et
      al., PVLDB 5(9), 2012; Abdollahpouri et al., FLAIRS 2019.
    - `lift@k`: popularity lift, by how much more popular the lists are than what their users had: (mean of
      the lists' popularity − mean of the histories') / mean of the histories'. 0 is none. Abdollahpouri et
      al., RecSys 2020, over users with a history.

    Where a list is shorter than k, what is missing counts as a miss, and the means over a list's items are
    over those that are there. Without any user to count, a metric is NaN.

    Args:
        ks: the lengths to measure at.
        catalog_size: N; gives coverage and gini.
        item_users: `[N]`, how many users had each item; gives arp, and lift where `update` gets histories.
        users: how many users `item_users` counts; gives novelty.
        item_features: `[N, S]`; gives diversity. bool: the items' categories, with Jaccard's distance, 1 −
            shared / all of the two (0 for two without any); floating: vectors, with the cosine distance.
    """

    full_state_update = False

    def __init__(
        self,
        ks: Sequence[int] = (5, 10, 20),
        *,
        catalog_size: int | None = None,
        item_users: Tensor | None = None,
        users: int | None = None,
        item_features: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ks = sorted(set(ks))
        if not self.ks or self.ks[0] < 1:
            raise ValueError(f"ks: got {tuple(ks)}, want one positive length or more")
        if users is not None and item_users is None:
            raise ValueError("users: says how many item_users counts, which is missing")
        for name, table in (("item_users", item_users), ("item_features", item_features)):
            if table is None:
                continue
            if catalog_size is None:
                catalog_size = len(table)
            elif len(table) != catalog_size:
                raise ValueError(f"{name}: got {len(table)} rows, the catalogue has {catalog_size} items")
        self.catalog_size = catalog_size
        self.user_count = users
        self.register_buffer("item_users", None if item_users is None else item_users.double(), False)
        if item_features is not None and item_features.is_floating_point():
            item_features = F.normalize(item_features, dim=1)
        self.register_buffer("item_features", item_features, False)

        def add_sum(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

        columns = len(self.ks)
        add_sum("accuracy", len(ACCURACY), columns)
        add_sum("judged", dtype=torch.int64)  # users with something relevant
        add_sum("with_list", dtype=torch.int64)
        if catalog_size is not None:
            # how often an item is at a place after one k up to the next, so that an item counts once
            add_sum("listed", columns, catalog_size, dtype=torch.int64)
        if item_users is not None:
            add_sum("popularity", columns)
            add_sum("lifted", columns)  # popularity of lists with a history
            add_sum("history_popularity")
            add_sum("with_history", dtype=torch.int64)
        if users is not None:
            add_sum("information", columns)
        if item_features is not None:
            add_sum("distances", columns)
            add_sum("with_pairs", columns, dtype=torch.int64)

    def update(self, lists: Tensor, relevant: Jagged, history: Jagged | None = None) -> None:
        """Adds a batch of users.

        Args:
            lists: int `[B, >= max(ks)]`, item ids, best first, none twice in a list; −1 after its end.
            relevant: the items that are right for each user; repeats count once.
            history: what each user had, for lift; repeats count as often as they are there.

        Raises:
            ValueError: by the argument's name; nothing has been added then.
        """
        lists = self._check_lists(lists)
        relevant = self._check_jagged("relevant", relevant, len(lists))
        if history is not None:
            if self.item_users is None:
                raise ValueError("history: is used for lift only, which needs item_users")
            history = self._check_jagged("history", history, len(lists))
        self._add_accuracy(lists, relevant)
        there = lists >= 0
        self.with_list += there[:, 0].sum()
        if self.catalog_size is not None:
            self._add_listed(lists, there)
        if self.item_users is not None:
            self._add_popularity(lists, there, history)
        if self.item_features is not None:
            self._add_distances(lists, there)

    def compute(self) -> dict[str, Tensor]:
        """The metrics so far, by names such as `ndcg@10`; float64 scalars."""
        found = dict(zip(ACCURACY, self.accuracy / self.judged, strict=True))
        if self.catalog_size is not None:
            listed = self.listed.cumsum(0)
            found["coverage"] = (listed > 0).double().mean(1)
            found["gini"] = torch.stack([_gini(row) for row in listed])
        if self.item_features is not None:
            found["diversity"] = self.distances / self.with_pairs
        if self.user_count is not None:
            found["novelty"] = self.information / self.with_list
        if self.item_users is not None:
            found["arp"] = self.popularity / self.with_list
            if self.with_history > 0:
                found["lift"] = self.lifted / self.history_popularity - 1
        return {
            f"{name}@{k}": value for name, row in found.items() for k, value in zip(self.ks, row, strict=True)
        }

    def _add_accuracy(self, lists: Tensor, relevant: Jagged) -> None:
        hit, count = _hits(lists, relevant)
        judged = count > 0
        hit, count = hit[judged].double(), count[judged]
        ks = torch.tensor(self.ks, device=lists.device)
        at = ks - 1
        rank = torch.arange(1, lists.shape[1] + 1, device=lists.device, dtype=torch.float64)
        discount = 1 / torch.log2(rank + 1)
        most = torch.minimum(count[:, None], ks)  # hits of the best list
        hits = hit.cumsum(1)
        found = hits[:, at]
        values = (
            (found > 0).double(),
            (hit * discount).cumsum(1)[:, at] / discount.cumsum(0)[most - 1],
            (hit * (hits == 1) / rank).cumsum(1)[:, at],
            found / count[:, None],
            found / ks,
            (hit * hits / rank).cumsum(1)[:, at] / most,
        )
        self.accuracy += torch.stack([value.sum(0) for value in values])
        self.judged += judged.sum()

    def _add_listed(self, lists: Tensor, there: Tensor) -> None:
        edges = torch.tensor(self.ks, device=lists.device)
        column = torch.bucketize(torch.arange(lists.shape[1], device=lists.device), edges, right=True)
        place = (column * self.catalog_size + lists)[there]
        self.listed.view(-1).scatter_add_(0, place, torch.ones_like(place))

    def _add_popularity(self, lists: Tensor, there: Tensor, history: Jagged | None) -> None:
        users = self.item_users[lists.clamp(min=0)]
        means = self._list_means(users, there)
        self.popularity += means.sum(0)
        if self.user_count is not None:
            information = torch.log2(self.user_count / users.clamp(min=1))
            self.information += self._list_means(information, there).sum(0)
        if history is not None:
            ids, offsets = history
            length = offsets.diff()
            total = torch.segment_reduce(self.item_users[ids], "sum", lengths=length, initial=0)
            known = (length > 0) & there[:, 0]
            self.lifted += means[known].sum(0)
            self.history_popularity += (total / length)[known].sum()
            self.with_history += known.sum()

    def _add_distances(self, lists: Tensor, there: Tensor) -> None:
        features = self.item_features[lists.clamp(min=0)]  # [B, k, S]
        if features.dtype == torch.bool:
            sets = features.float()
            both = sets @ sets.transpose(1, 2)
            size = sets.sum(-1)
            either = size[:, :, None] + size[:, None, :] - both
            distance = torch.where(either > 0, 1 - both / either, 0.0)
        else:
            distance = 1 - features @ features.transpose(1, 2)
        pair = (there[:, :, None] & there[:, None, :]).triu(diagonal=1)
        at = torch.tensor(self.ks, device=lists.device) - 1
        # a place adds its pairs with the places before it
        sums = distance.double().masked_fill(~pair, 0).sum(1).cumsum(1)[:, at]
        pairs = pair.sum(1).cumsum(1)[:, at]
        self.distances += (sums / pairs.clamp(min=1)).sum(0)
        self.with_pairs += (pairs > 0).sum(0)

    def _list_means(self, values: Tensor, there: Tensor) -> Tensor:
        """`values [B, L]` averaged over the items of the first k places, `[B, ks]`; 0 without any."""
        at = torch.tensor(self.ks, device=values.device) - 1
        sums = values.masked_fill(~there, 0).cumsum(1)
        return sums[:, at] / there.cumsum(1)[:, at].clamp(min=1)

    def _check_lists(self, lists: Tensor) -> Tensor:
        if lists.dim() != 2 or lists.is_floating_point() or lists.is_complex() or lists.dtype == torch.bool:
            raise ValueError(f"lists: want ids [B, k], got {lists.dtype} {list(lists.shape)}")
        longest = self.ks[-1]
        if lists.shape[1] < longest:
            raise ValueError(
                f"lists: have {lists.shape[1]} places, the largest k is {longest}; "
                "fill lists that are shorter with -1"
            )
        lists = lists[:, :longest].long()
        if (lists[:, 1:] >= 0).logical_and(lists[:, :-1] < 0).any():
            raise ValueError("lists: an id after a -1; the list ends at its first -1")
        ordered = lists.sort(1).values
        if (ordered[:, 1:] == ordered[:, :-1]).logical_and(ordered[:, 1:] >= 0).any():
            raise ValueError("lists: an item is there twice in one list")
        self._check_ids("lists", lists)
        return lists

    def _check_jagged(self, name: str, jagged: Jagged, users: int) -> Jagged:
        ids, offsets = jagged
        if offsets.shape != (users + 1,):
            raise ValueError(
                f"{name}: offsets have shape {list(offsets.shape)}, {users} lists need [{users + 1}]"
            )
        if offsets[0] != 0 or offsets[-1] != len(ids) or (offsets.diff() < 0).any():
            raise ValueError(f"{name}: offsets must rise from 0 to the number of ids, {len(ids)}")
        if (ids < 0).any():
            raise ValueError(f"{name}: got the id {int(ids.min())}")
        self._check_ids(name, ids)
        return ids.long(), offsets.long()

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if self.catalog_size is not None and ids.numel() and ids.max() >= self.catalog_size:
            raise ValueError(
                f"{name}: got the id {int(ids.max())}, the catalogue has {self.catalog_size} items"
            )


def _hits(lists: Tensor, relevant: Jagged) -> tuple[Tensor, Tensor]:
    """Which places of the lists are relevant, bool `[B, k]`, and how many items are, `[B]`."""
    ids, offsets = relevant
    users = torch.arange(len(lists), device=lists.device)
    span = max(int(x.max()) if x.numel() else 0 for x in (lists, ids)) + 1
    # (user, item) as one number: all users are looked up in one sorted row
    wanted = torch.unique(torch.repeat_interleave(users, offsets.diff()) * span + ids)
    count = torch.bincount(wanted // span, minlength=len(lists))
    asked = users[:, None] * span + lists.clamp(min=0)
    after = F.pad(wanted, (0, 1), value=-1)  # for what would come after the last
    return (after[torch.searchsorted(wanted, asked)] == asked) & (lists >= 0), count


def _gini(counts: Tensor) -> Tensor:
    n = len(counts)
    ordered = counts.sort().values.double()
    weights = 2 * torch.arange(1, n + 1, device=counts.device, dtype=torch.float64) - n - 1
    return (weights * ordered).sum() / (n * ordered.sum())
