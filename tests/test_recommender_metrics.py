"""Metrics against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from attnrec.recommender import metrics


def test_list_metrics():
    lists = torch.stack([torch.randperm(50)[:10] for _ in range(40)])
    targets = torch.randint(0, 50, (40,))
    hits = ndcg = mrr = 0.0
    for row, target in zip(lists.tolist(), targets.tolist(), strict=True):
        if target in row:
            place = row.index(target)
            hits, ndcg, mrr = hits + 1, ndcg + 1 / math.log2(place + 2), mrr + 1 / (place + 1)
    assert hits > 0
    found = metrics.list_metrics(lists, targets)
    assert found == pytest.approx({"hr@10": hits / 40, "ndcg@10": ndcg / 40, "mrr@10": mrr / 40})


def test_coverage_does_not_count_the_padding():
    assert metrics.coverage(torch.tensor([[0, 1], [1, -1]]), 8) == 2 / 8


def test_diversity_is_the_mean_jaccard_distance_of_pairs():
    genres = torch.rand(12, 5) < 0.4
    genres[0] = genres[1] = False
    lists = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, -1]])
    distances = []
    for row in lists.tolist():
        for a, b in itertools.combinations([item for item in row if item >= 0], 2):
            both, either = (genres[a] & genres[b]).sum(), (genres[a] | genres[b]).sum()
            distances.append(1 - both / either if either else 0.0)
    assert metrics.diversity(lists, genres) == pytest.approx(sum(distances) / len(distances))


def area(probabilities, labels):
    pairs = [
        1.0 if p > q else 0.5 if p == q else 0.0
        for p, a in zip(probabilities, labels, strict=True)
        if a
        for q, b in zip(probabilities, labels, strict=True)
        if not b
    ]
    return sum(pairs) / len(pairs)


def sample(rows=300):
    # coarse probabilities, so that there are ties
    return torch.randint(0, 8, (rows,)) / 8, torch.rand(rows) < 0.4


def test_auc_counts_ties_one_half():
    probabilities, labels = sample()
    assert metrics.auc(probabilities, labels) == pytest.approx(area(probabilities.tolist(), labels.tolist()))


def test_grouped_auc_weights_by_rows_and_leaves_out_one_class():
    probabilities, labels = sample()
    groups = torch.randint(0, 20, (300,))
    groups[groups == 7] = 8  # a group without rows
    labels[groups == 3] = True
    total = rows = 0.0
    for group in groups.unique().tolist():
        mine = groups == group
        if 0 < labels[mine].sum() < mine.sum():
            total += area(probabilities[mine].tolist(), labels[mine].tolist()) * mine.sum().item()
            rows += mine.sum().item()
    assert rows < 300
    assert metrics.grouped_auc(probabilities, labels, groups) == pytest.approx(total / rows)


def test_log_loss_is_in_nats():
    found = metrics.log_loss(torch.tensor([0.5, 0.9]), torch.tensor([True, True]))
    assert found == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2)
