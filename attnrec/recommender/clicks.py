"""Metrics of click probabilities, over batches of rows and in bounded memory, as torchmetrics `Metric`s."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC


def click_metrics(*, exact: bool = False) -> MetricCollection:
    """`auc`, `gauc` and `logloss` together: `.update(probabilities, labels, groups=users)`, `.compute()`.

    Args:
        exact: `auc` by torchmetrics, which keeps every row, in place of `BinnedAUROC`.
    """
    auc = BinaryAUROC() if exact else BinnedAUROC()
    return MetricCollection({"auc": auc, "gauc": GroupedAUC(), "logloss": LogLoss()}, compute_groups=False)


class BinnedAUROC(Metric):
    """Area under the ROC curve in bounded memory: scores are counted by the upper bits of their float32.

    Scores of one bin are taken for equal, and ties count one half. With the 20 bits of sign, exponent and
    11 of the mantissa that is a relative width of 1/2048, wherever the scores lie. (torchmetrics' bounded
    form has evenly spaced thresholds from 0 to 1, too few of them where click probabilities are small, and
    compares each score with each.)

    Args:
        bits: of a score that count; the state has 2^(bits + 1) integers.
    """

    full_state_update = False

    def __init__(self, bits: int = 20) -> None:
        super().__init__()
        if not 10 <= bits <= 26:
            raise ValueError(f"bits: got {bits}, want 10 to 26 (all of the exponent, and a table that fits)")
        self.bits = bits
        self.add_state("counts", torch.zeros(2, 2**bits, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """`preds [rows]` are scores or probabilities, `target [rows]` 0 and 1."""
        labels = _check_rows(preds, target)
        # sign and magnitude, as the bits of a float are, in the order of its values; + 0.0: one zero of two
        bits = (preds.float() + 0.0).view(torch.int32).long()
        key = torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits) + 2**31
        place = (key >> (32 - self.bits)) + labels.long() * 2**self.bits
        self.counts.view(-1).scatter_add_(0, place, torch.ones_like(place))

    def compute(self) -> Tensor:
        negative, positive = self.counts.double()
        below = negative.cumsum(0) - negative
        return (positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum())

    def error(self) -> Tensor:
        """The exact area is at most so far from `compute()`: half of the pairs that share a bin."""
        negative, positive = self.counts.double()
        return (positive * negative).sum() / (2 * positive.sum() * negative.sum())


class GroupedAUC(Metric):
    """GAUC: each group's AUC weighted by its rows; groups with one class are left out, NaN without any other.

    Zhu et al., Optimized Cost per Click in Taobao Display Advertising, KDD 2017, with impressions as
    weights (RecBole weights by the positive rows).
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("area", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, groups: Tensor) -> None:
        """`groups [rows]` int: the user, say. All rows of a group must come in one batch."""
        labels = _check_rows(preds, target)
        if groups.shape != preds.shape:
            raise ValueError(f"groups: got {list(groups.shape)}, preds have {list(preds.shape)}")
        if not len(preds):
            return
        # The rank-sum form for all groups at once: a row's average rank within its group, ties shared.
        _, groups = torch.unique(groups, return_inverse=True)
        order = torch.argsort(preds, stable=True)
        order = order[torch.argsort(groups[order], stable=True)]
        group, value, label = groups[order], preds[order], labels[order]
        new = torch.ones_like(label)
        new[1:] = (group[1:] != group[:-1]) | (value[1:] != value[:-1])
        tie = new.cumsum(0) - 1
        count = torch.bincount(tie)
        last = count.cumsum(0)
        rank = (last - (count - 1) / 2)[tie].double()  # within all rows
        rows = torch.bincount(group)
        rank -= (rows.cumsum(0) - rows)[group]
        positive = torch.bincount(group, weights=label.double())
        negative = rows - positive
        rank_sum = torch.bincount(group, weights=rank * label)
        mixed = (positive > 0) & (negative > 0)
        area = (rank_sum - positive * (positive + 1) / 2)[mixed] / (positive * negative)[mixed]
        self.area += (area * rows[mixed]).sum()
        self.rows += rows[mixed].sum()

    def compute(self) -> Tensor:
        return self.area / self.rows


class LogLoss(Metric):
    """Mean negative log-likelihood of probabilities, in nats; one that is 0 or 1 and wrong costs 100."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        labels = _check_rows(preds, target)
        self.total += F.binary_cross_entropy(preds.double(), labels.double(), reduction="sum")
        self.rows += len(preds)

    def compute(self) -> Tensor:
        return self.total / self.rows


def _check_rows(preds: Tensor, target: Tensor) -> Tensor:
    """The labels as bool."""
    if preds.dim() != 1 or not preds.is_floating_point() or preds.isnan().any():
        raise ValueError(f"preds: want numbers [rows], no NaN, got {preds.dtype} {list(preds.shape)}")
    if target.shape != preds.shape:
        raise ValueError(f"target: got {list(target.shape)}, preds have {list(preds.shape)}")
    if not ((target == 0) | (target == 1)).all():
        raise ValueError("target: want 0 and 1 only")
    return target.bool()
