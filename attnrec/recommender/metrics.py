"""Metrics of ranked lists and of click probabilities; torchmetrics computes what it has."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG


def list_metrics(lists: Tensor, targets: Tensor) -> dict[str, float]:
    """Hit rate, NDCG and reciprocal rank at k of lists with one right item each.

    Args:
        lists: ids `[users, k]`, best first.
        targets: ids `[users]`.
    """
    users, k = lists.shape
    scores = torch.arange(k, 0, -1.0).expand(users, k).flatten()
    hits = (lists == targets[:, None]).flatten()
    queries = torch.arange(users).repeat_interleave(k)
    metrics = {"hr": RetrievalHitRate, "ndcg": RetrievalNormalizedDCG, "mrr": RetrievalMRR}
    return {f"{name}@{k}": metric(top_k=k)(scores, hits, queries).item() for name, metric in metrics.items()}


def coverage(lists: Tensor, catalog_size: int) -> float:
    """Share of the catalogue that is in at least one list."""
    return lists[lists >= 0].unique().numel() / catalog_size


def diversity(lists: Tensor, categories: Tensor) -> float:
    """Intra-list diversity: the mean Jaccard distance of two items' categories over all pairs of a list.

    Ziegler et al., Improving Recommendation Lists Through Topic Diversification, WWW 2005. Two items without
    any category have distance 0.

    Args:
        lists: ids `[users, k]`, k >= 2; -1 where a list is shorter.
        categories: bool `[N, size]`.
    """
    sets = categories[lists.clamp(min=0)].float()  # [users, k, size]
    both = sets @ sets.transpose(1, 2)
    size = sets.sum(-1)
    either = size[:, :, None] + size[:, None, :] - both
    distance = torch.where(either > 0, 1 - both / either, 0.0)
    there = lists >= 0
    pair = (there[:, :, None] & there[:, None, :]).triu(diagonal=1)
    return distance[pair].mean().item()


def auc(probabilities: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve; ties count one half."""
    return binary_auroc(probabilities, labels.long()).item()


def grouped_auc(probabilities: Tensor, labels: Tensor, groups: Tensor) -> float:
    """GAUC: each group's AUC weighted by its rows; groups with one class are left out.

    Zhu et al., Optimized Cost per Click in Taobao Display Advertising, KDD 2017. NaN without any such group.

    Args:
        probabilities, labels, groups: `[rows]`; `groups` are ids from 0.
    """
    # The rank-sum form for all groups at once: a row's average rank within its group, ties shared.
    order = torch.argsort(probabilities, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    group, value, label = groups[order], probabilities[order], labels[order].bool()
    new = torch.ones(len(order), dtype=torch.bool)
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
    return ((area * rows[mixed]).sum() / rows[mixed].sum()).item()


def log_loss(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood, in nats."""
    return torch.nn.functional.binary_cross_entropy(probabilities.double(), labels.double()).item()
