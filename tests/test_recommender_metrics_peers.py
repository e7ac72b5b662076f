"""The numbers of other libraries on the same lists: torchmetrics, trec_eval (pytrec_eval) and RecBole.

Where a convention differs, the test says which and by what factor.
"""

from __future__ import annotations

import importlib
from statistics import fmean

import numpy as np
import pytest
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from torchmetrics import retrieval
from torchmetrics.functional.classification import binary_auroc

from attnrec.recommender import click_metrics, evaluate

ITEMS = 80
K = 10


def sample(users=60, seed=0):
    """Lists of ten, and relevant items of each user: one to more than a list holds, half of them listed."""
    random = torch.Generator().manual_seed(seed)
    lists = torch.stack([torch.randperm(ITEMS, generator=random)[:K] for _ in range(users)])
    counts = torch.randint(1, 16, (users,), generator=random).tolist()
    relevant = []
    for row, count in zip(lists, counts, strict=True):
        listed = row[torch.randperm(K, generator=random)[: count // 2]].tolist()
        others = [item for item in torch.randperm(ITEMS, generator=random).tolist() if item not in listed]
        relevant.append(sorted([*listed, *others[: count - len(listed)]]))
    assert max(counts) > K
    return lists, relevant


def ours(lists, relevant, ks=(1, 5, K), **catalog):
    offsets = torch.tensor([0] + [len(items) for items in relevant]).cumsum(0)
    return evaluate(lists, (torch.tensor([x for items in relevant for x in items]), offsets), ks, **catalog)


def clicks(rows=500):
    random = torch.Generator().manual_seed(0)
    probabilities = torch.randint(1, 32, (rows,), generator=random) / 32  # with ties
    labels = torch.rand(rows, generator=random) < probabilities
    return probabilities, labels, torch.randint(0, 20, (rows,), generator=random)


@pytest.mark.parametrize("k", [1, 5, K])
def test_torchmetrics(k):
    lists, relevant = sample()
    scores, hits, queries = [], [], []
    for user, (row, right) in enumerate(zip(lists.tolist(), relevant, strict=True)):
        # torchmetrics knows of a relevant item only where it is ranked: the missed ones come last
        ranked = [*row, *(item for item in right if item not in row)]
        scores += [1 / rank for rank in range(1, len(ranked) + 1)]
        hits += [item in right for item in ranked]
        queries += [user] * len(ranked)
    kinds = {
        "hr": retrieval.RetrievalHitRate,
        "ndcg": retrieval.RetrievalNormalizedDCG,
        "mrr": retrieval.RetrievalMRR,
        "recall": retrieval.RetrievalRecall,
        "precision": retrieval.RetrievalPrecision,
    }
    found = ours(lists, relevant)
    for name, kind in kinds.items():
        want = kind(top_k=k)(torch.tensor(scores), torch.tensor(hits), torch.tensor(queries)).item()
        assert found[f"{name}@{k}"] == pytest.approx(want, rel=1e-5), name


def test_torchmetrics_average_precision_of_lists_with_all_that_is_relevant():
    """Elsewhere it divides by the hits of the list, so that a list of one hit in front is perfect."""
    lists, relevant = sample()
    relevant = [
        [item for item in row if item in right] for row, right in zip(lists.tolist(), relevant, strict=True)
    ]
    lists = lists[[bool(right) for right in relevant]]
    relevant = [right for right in relevant if right]
    hits = torch.stack(
        [torch.isin(row, torch.tensor(right)) for row, right in zip(lists, relevant, strict=True)]
    )
    scores = (1 / torch.arange(1.0, K + 1)).expand(len(lists), K)
    queries = torch.arange(len(lists))[:, None].expand(-1, K)
    want = retrieval.RetrievalMAP(top_k=K)(scores, hits, queries).item()
    assert ours(lists, relevant)[f"map@{K}"] == pytest.approx(want, rel=1e-5)


def test_trec_eval():
    pytrec_eval = pytest.importorskip(
        "pytrec_eval", reason="trec_eval's numbers need: pip install 'attnrec[test]' (pytrec-eval-terrier)"
    )
    lists, relevant = sample()
    lists[4, 6:] = -1  # a short list
    lists[5] = -1
    runs = {
        f"u{user}": {str(item): float(K - place) for place, item in enumerate(row) if item >= 0}
        for user, row in enumerate(lists.tolist())
    }
    truth = {f"u{user}": {str(item): 1 for item in right} for user, right in enumerate(relevant)}
    wanted = {"success", "ndcg_cut", "recall", "P", "map_cut"}
    measures = {f"{name}.1,5,10" for name in wanted} | {"recip_rank"}
    scores = pytrec_eval.RelevanceEvaluator(truth, measures).evaluate(runs)

    def mean(name, weight=lambda right: 1.0):
        # a user without a list has no scores there: 0 (trec_eval's option -c)
        return fmean(
            scores.get(f"u{user}", {}).get(name, 0.0) * weight(right) for user, right in enumerate(relevant)
        )

    found = ours(lists, relevant)
    for k in (1, 5, K):
        assert found[f"hr@{k}"] == pytest.approx(mean(f"success_{k}"))
        assert found[f"ndcg@{k}"] == pytest.approx(mean(f"ndcg_cut_{k}"))
        assert found[f"recall@{k}"] == pytest.approx(mean(f"recall_{k}"))
        assert found[f"precision@{k}"] == pytest.approx(mean(f"P_{k}"))
        # there over all relevant items, here over those that a list of k can hold
        want = mean(f"map_cut_{k}", lambda right, k=k: len(right) / min(k, len(right)))
        assert found[f"map@{k}"] == pytest.approx(want)
    assert found[f"mrr@{K}"] == pytest.approx(mean("recip_rank"))


@pytest.fixture
def recbole(monkeypatch):
    # RecBole up to 1.2.1 uses names that numpy has dropped
    monkeypatch.setattr(np, "float", float, raising=False)
    try:
        return importlib.import_module("recbole.evaluator.metrics")
    except ImportError as error:
        pytest.skip(f"RecBole's numbers need: pip install recbole ({error})")


def recbole_metric(recbole, name, **values):
    """A metric of RecBole on what its collector would have put together."""
    config = {"topk": [1, 5, K], "metric_decimal_place": 15}

    class Collected(dict):
        def get(self, key):
            return self[key]

    config["eval_args"] = {"mode": "full"}
    return getattr(recbole, name)(config).calculate_metric(Collected(values))


def test_recbole_lists(recbole):
    lists, relevant = sample()
    random = torch.Generator().manual_seed(9)
    item_users = torch.randint(1, 50, (ITEMS,), generator=random)
    found = ours(lists, relevant, item_users=item_users)
    hits = torch.stack(
        [torch.isin(row, torch.tensor(right)) for row, right in zip(lists, relevant, strict=True)]
    )
    topk = torch.cat((hits.int(), torch.tensor([[len(right)] for right in relevant])), dim=1)
    names = {
        "hr": "Hit",
        "ndcg": "NDCG",
        "mrr": "MRR",
        "recall": "Recall",
        "precision": "Precision",
        "map": "MAP",
    }
    for name, theirs in names.items():
        want = recbole_metric(recbole, theirs, **{"rec.topk": topk})
        for k in (1, 5, K):
            assert found[f"{name}@{k}"] == pytest.approx(want[f"{theirs.lower()}@{k}"]), name
    whole = {
        "rec.items": lists,
        "data.num_items": ITEMS,
        "data.count_items": dict(enumerate(item_users.tolist())),
    }
    for name, theirs in {"coverage": "ItemCoverage", "gini": "GiniIndex", "arp": "AveragePopularity"}.items():
        want = recbole_metric(recbole, theirs, **whole)
        for k in (1, 5, K):
            assert found[f"{name}@{k}"] == pytest.approx(want[f"{theirs.lower()}@{k}"]), name


def test_recbole_clicks(recbole):
    probabilities, labels, users = clicks()
    metrics = click_metrics()
    metrics.update(probabilities, labels, groups=users)
    found = metrics.compute()
    values = {"rec.score": probabilities.double(), "data.label": labels.double()}
    assert found["auc"].item() == pytest.approx(recbole_metric(recbole, "AUC", **values)["auc"])
    assert found["logloss"].item() == pytest.approx(recbole_metric(recbole, "LogLoss", **values)["logloss"])


def test_torchmetrics_clicks():
    probabilities, labels, _ = clicks()
    found = click_metrics()
    found.update(probabilities, labels, groups=torch.zeros(len(labels)))
    want = binary_auroc(probabilities, labels.long()).item()
    assert found.compute()["auc"].item() == pytest.approx(want, rel=1e-6)
    assert found.compute()["gauc"].item() == pytest.approx(want, rel=1e-6)  # of one group
