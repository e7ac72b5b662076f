"""Metrics against brute force, what they count and leave out, and that their memory does not grow."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from attnrec.recommender import ListMetrics, catalog_lists, click_metrics, evaluate
from attnrec.recommender.clicks import BinnedAUROC, GroupedAUC, LogLoss

ITEMS = 60
KS = (1, 3, 7)


def jagged(rows, dtype=torch.long):
    lengths = torch.tensor([0] + [len(row) for row in rows])
    return torch.tensor([x for row in rows for x in row], dtype=dtype), lengths.cumsum(0)


def sample_lists(users=50, k=8, most=12, seed=0):
    """Lists of which some are short, jagged relevant items (some users have none), histories."""
    random = torch.Generator().manual_seed(seed)
    lists = torch.stack([torch.randperm(ITEMS, generator=random)[:k] for _ in range(users)])
    lists[3, 4:] = -1
    lists[4, 1:] = -1
    lists[5] = -1
    counts = torch.randint(0, most, (users,), generator=random).tolist()
    relevant = [torch.randperm(ITEMS, generator=random)[:n].tolist() for n in counts]
    history = [torch.randint(0, ITEMS, (n,), generator=random).tolist() for n in reversed(counts)]
    assert 0 in counts
    return lists, relevant, history


def knowledge(features="categories"):
    random = torch.Generator().manual_seed(1)
    table = torch.rand(ITEMS, 5, generator=random) < 0.4
    table[:2] = False
    item_users = torch.randint(0, 90, (ITEMS,), generator=random)
    item_users[7] = 0
    vectors = torch.randn(ITEMS, 4, generator=random)
    return {
        "item_users": item_users,
        "users": 100,
        "item_features": table if features == "categories" else vectors,
    }


def brute_force(lists, relevant, history, item_users, users, item_features):
    """Each formula of `ListMetrics` as it stands there, user by user."""
    popularity = item_users.tolist()
    out = {}
    for k in KS:
        rows = [
            ([i for i in row[:k] if i >= 0], set(right)) for row, right in zip(lists, relevant, strict=True)
        ]
        per_user = {"hr": [], "ndcg": [], "mrr": [], "recall": [], "precision": [], "map": []}
        for row, right in rows:
            if not right:
                continue
            hit = [item in right for item in row]
            ranks = [rank for rank, is_hit in enumerate(hit, 1) if is_hit]
            best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(right)) + 1))
            per_user["hr"].append(float(any(hit)))
            per_user["ndcg"].append(sum(1 / math.log2(rank + 1) for rank in ranks) / best)
            per_user["mrr"].append(1 / ranks[0] if ranks else 0.0)
            per_user["recall"].append(sum(hit) / len(right))
            per_user["precision"].append(sum(hit) / k)
            per_user["map"].append(sum(sum(hit[:r]) / r for r in ranks) / min(k, len(right)))
        shown = [sum(item in row for row, _ in rows) for item in range(ITEMS)]
        there = [row for row, _ in rows if row]
        gaps = sum(abs(a - b) for a in shown for b in shown)  # the index by its definition
        lifted = [
            (fmean(popularity[i] for i in row), fmean(popularity[i] for i in had))
            for (row, _), had in zip(rows, history, strict=True)
            if row and had
        ]
        values = {name: fmean(of_users) for name, of_users in per_user.items()} | {
            "coverage": sum(n > 0 for n in shown) / ITEMS,
            "gini": gaps / (2 * ITEMS * sum(shown)),
            "novelty": fmean(fmean(math.log2(users / max(popularity[i], 1)) for i in row) for row in there),
            "arp": fmean(fmean(popularity[i] for i in row) for row in there),
            "lift": fmean(a for a, _ in lifted) / fmean(b for _, b in lifted) - 1,
        }
        pairs = [list(itertools.combinations(row, 2)) for row in there if len(row) > 1]
        if pairs:
            values["diversity"] = fmean(fmean(distance(item_features, *p) for p in row) for row in pairs)
        else:
            values["diversity"] = math.nan
        out |= {f"{name}@{k}": value for name, value in values.items()}
    return out


def distance(features, a, b):
    a, b = features[a], features[b]
    if features.dtype == torch.bool:
        return 1 - ((a & b).sum() / (a | b).sum()).item() if (a | b).any() else 0.0
    return 1 - torch.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("features", ["categories", "vectors"])
def test_every_list_metric_by_its_formula(features):
    lists, relevant, history = sample_lists()
    found = evaluate(lists, jagged(relevant), KS, history=jagged(history), **knowledge(features))
    want = brute_force(lists.tolist(), relevant, history, **knowledge(features))
    assert found.keys() == want.keys()
    assert found == pytest.approx(want, rel=1e-6, nan_ok=True)
    assert sum(value > 0 for value in want.values()) > 30


def test_one_relevant_item_each():
    lists, _, _ = sample_lists()
    target = torch.randint(0, ITEMS, (50,), generator=torch.Generator().manual_seed(3))
    found = evaluate(lists, (target, torch.arange(51)), (7,))
    places = [
        row.index(x) + 1 for row, x in zip(lists[:, :7].tolist(), target.tolist(), strict=True) if x in row
    ]
    assert places
    assert found["hr@7"] == found["recall@7"] == pytest.approx(len(places) / 50)
    assert found["ndcg@7"] == pytest.approx(sum(1 / math.log2(p + 1) for p in places) / 50)
    assert found["mrr@7"] == found["map@7"] == pytest.approx(sum(1 / p for p in places) / 50)


def test_batches_and_parts_add_up_to_the_whole():
    lists, relevant, history = sample_lists()
    whole = evaluate(lists, jagged(relevant), KS, history=jagged(history), **knowledge())
    in_parts = evaluate(lists.split(7), jagged(relevant), KS, history=jagged(history), **knowledge())
    assert in_parts == pytest.approx(whole, rel=1e-12, nan_ok=True)
    parts = [ListMetrics(KS, **knowledge()) for _ in range(2)]
    for part, metrics in enumerate(parts):
        mine = slice(25 * part, 25 * (part + 1))
        metrics.update(lists[mine], jagged(relevant[mine]), jagged(history[mine]))
    parts[0].merge_state(parts[1])
    assert numbers(parts[0].compute()) == pytest.approx(whole, rel=1e-12, nan_ok=True)


def one_of_two_ranks(rank, file, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    lists, relevant, history = sample_lists()
    metrics, clicks = ListMetrics(KS, **knowledge()), click_metrics()
    mine = slice(0, 20) if rank == 0 else slice(20, 50)
    metrics.update(lists[mine], jagged(relevant[mine]), jagged(history[mine]))
    probabilities, labels = sample_clicks()
    rows = slice(100 * rank, 100 + 200 * rank)
    clicks.update(probabilities[rows], labels[rows], groups=torch.arange(300)[rows] // 10)
    torch.save((metrics.compute(), clicks.compute()), f"{out}{rank}")
    torch.distributed.destroy_process_group()


def test_processes_add_up_to_the_whole(tmp_path):
    torch.multiprocessing.spawn(one_of_two_ranks, (tmp_path / "store", tmp_path / "rank"), nprocs=2)
    lists, relevant, history = sample_lists()
    whole = evaluate(lists, jagged(relevant), KS, history=jagged(history), **knowledge())
    probabilities, labels = sample_clicks()
    clicks = click_metrics()
    clicks.update(probabilities, labels, groups=torch.arange(300) // 10)
    for rank in range(2):
        of_lists, of_clicks = torch.load(tmp_path / f"rank{rank}")
        assert numbers(of_lists) == pytest.approx(whole, rel=1e-12, nan_ok=True)
        assert numbers(of_clicks) == pytest.approx(numbers(clicks.compute()), rel=1e-12)


def numbers(found):
    return {name: x.item() for name, x in found.items()}


def state_bytes(metric):
    states = [getattr(metric, name) for name in metric._defaults]
    assert all(isinstance(state, torch.Tensor) for state in states)  # no list that grows
    return sum(state.numel() * state.element_size() for state in states)


def test_memory_does_not_grow_with_the_users():
    lists, relevant, history = sample_lists()
    metrics = ListMetrics(KS, **knowledge())
    clicks = [BinnedAUROC(), GroupedAUC(), LogLoss()]
    before = state_bytes(metrics), [state_bytes(metric) for metric in clicks]
    for _ in range(5):
        metrics.update(lists, jagged(relevant), jagged(history))
        probabilities, labels = sample_clicks()
        for metric in clicks:
            metric.update(probabilities, labels, *([labels] if isinstance(metric, GroupedAUC) else []))
    assert before == (state_bytes(metrics), [state_bytes(metric) for metric in clicks])


def test_users_without_relevant_items_count_only_in_what_needs_none():
    lists = torch.tensor([[0, 1], [2, 3]])
    found = evaluate(lists, jagged([[0], []]), (2,), catalog_size=8)
    assert found["hr@2"] == found["recall@2"] == 1
    assert found["coverage@2"] == 4 / 8
    nobody = evaluate(lists, jagged([[], []]), (2,), catalog_size=8)
    assert math.isnan(nobody["ndcg@2"])
    assert nobody["coverage@2"] == 4 / 8


def test_what_is_missing_in_a_short_list_is_a_miss():
    found = evaluate(torch.tensor([[4, -1, -1]]), jagged([[4, 5]]), (3,), catalog_size=8)
    assert found["precision@3"] == pytest.approx(1 / 3)
    assert found["recall@3"] == 1 / 2
    assert found["map@3"] == 1 / 2
    assert found["ndcg@3"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert found["coverage@3"] == 1 / 8


def test_a_relevant_item_counts_once_however_often_it_is_named():
    assert evaluate(torch.tensor([[4, 1]]), jagged([[4, 4, 5, 4]]), (2,))["recall@2"] == 1 / 2


def test_gini_of_equal_and_of_one_item():
    same = [[], []]
    equal = evaluate(torch.tensor([[0, 1], [2, 3]]), jagged(same), (2,), catalog_size=4)
    assert equal["gini@2"] == pytest.approx(0)
    one = evaluate(torch.tensor([[3], [3]]), jagged(same), (1,), catalog_size=4)
    assert one["gini@1"] == pytest.approx(1 - 1 / 4)


def test_popularity_lift_of_lists_like_the_histories_is_none():
    lists, relevant, _ = sample_lists()
    lists[3:6] = lists[6]  # full ones
    found = evaluate(lists, jagged(relevant), (8,), history=jagged(lists.tolist()), **knowledge())
    assert found["lift@8"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lists": torch.tensor([[0, 1]])}, "lists: have 2 places, the largest k is 3"),
        ({"lists": torch.tensor([[0.0, 1.0, 2.0]])}, "lists: want ids"),
        ({"lists": torch.tensor([[0, -1, 2]])}, "lists: an id after a -1"),
        ({"lists": torch.tensor([[0, 2, 2]])}, "lists: an item is there twice"),
        ({"lists": torch.tensor([[0, 1, 9]])}, "lists: got the id 9, the catalogue has 9"),
        ({"lists": torch.tensor([[0, 1, 2], [3, 4, 5]])}, "lists: got more than the 1 users"),
        ({"lists": torch.zeros(0, 3, dtype=torch.long)}, "lists: got 0 users, relevant has 1"),
        ({"relevant": jagged([[9]])}, "relevant: got the id 9"),
        ({"relevant": jagged([[-2]])}, "relevant: got the id -2"),
        ({"relevant": (torch.tensor([1, 2]), torch.tensor([0, 3]))}, "relevant: offsets must rise"),
        ({"history": jagged([[9]]), "item_users": torch.ones(9)}, "history: got the id 9"),
        ({"history": jagged([[1]])}, "history: is used for lift only"),
        ({"history": jagged([]), "item_users": torch.ones(9)}, "history: offsets are of 0 users"),
        ({"item_users": torch.ones(5)}, "item_users: got 5 rows, the catalogue has 9"),
        ({"users": 5}, "users: says how many item_users counts"),
        ({"ks": (0, 3)}, r"ks: got \(0, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = {
        "lists": torch.tensor([[0, 1, 2]]),
        "relevant": jagged([[1]]),
        "ks": (1, 3),
        "catalog_size": 9,
    } | change
    with pytest.raises(ValueError, match=message):
        evaluate(arguments.pop("lists"), arguments.pop("relevant"), arguments.pop("ks"), **arguments)


def test_evaluation_over_a_full_catalogue_is_that_of_all_scores():
    random = torch.Generator().manual_seed(5)
    users, items = torch.randn(600, 8, generator=random), torch.randn(ITEMS, 8, generator=random)
    bias = torch.randn(ITEMS, generator=random)
    counts = torch.randint(0, 9, (600,), generator=random).tolist()
    seen = [torch.randperm(ITEMS, generator=random)[:n].tolist() for n in counts]
    relevant = [
        [item for item in torch.randperm(ITEMS, generator=random)[:6].tolist() if item not in had]
        for had in seen
    ]
    scores = users @ items.T + bias
    for row, had in zip(scores, seen, strict=True):
        row[had] = -torch.inf
    batches = list(catalog_lists(users, items, 10, exclude=jagged(seen), bias=bias))
    assert [len(batch) for batch in batches] == [256, 256, 88]
    assert torch.equal(torch.cat(batches), scores.topk(10).indices)
    found = evaluate(iter(batches), jagged(relevant), (10,), catalog_size=ITEMS)
    hits = scores.topk(10).indices
    recall = [
        len(set(row) & set(right)) / len(right)
        for row, right in zip(hits.tolist(), relevant, strict=True)
        if right
    ]
    assert found["recall@10"] == pytest.approx(fmean(recall))


def area(probabilities, labels):
    pairs = [
        1.0 if p > q else 0.5 if p == q else 0.0
        for p, a in zip(probabilities, labels, strict=True)
        if a
        for q, b in zip(probabilities, labels, strict=True)
        if not b
    ]
    return sum(pairs) / len(pairs)


def sample_clicks(rows=300):
    random = torch.Generator().manual_seed(4)
    # coarse probabilities, so that there are ties
    return torch.randint(0, 8, (rows,), generator=random) / 8, torch.rand(rows, generator=random) < 0.4


@pytest.mark.parametrize("exact", [False, True])
def test_auc_counts_ties_one_half(exact):
    probabilities, labels = sample_clicks()
    metrics = click_metrics(exact=exact)
    for part in range(0, 300, 70):
        rows = slice(part, part + 70)
        metrics.update(probabilities[rows], labels[rows], groups=torch.arange(300)[rows])
    want = area(probabilities.tolist(), labels.tolist())
    assert metrics.compute()["auc"].item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_binned_auc_is_off_by_no_more_than_it_says(spread):
    random = torch.Generator().manual_seed(2)
    labels = torch.rand(4000, generator=random) < 0.3
    scores = spread * (torch.randn(4000, generator=random) + labels)  # of both signs
    metric = BinnedAUROC()
    metric.update(scores, labels)
    below = (scores[labels][:, None] > scores[~labels]).double().mean()
    assert 0 < metric.error() < 1e-3
    assert abs(metric.compute() - below) <= metric.error()
    coarse = BinnedAUROC(bits=10)
    coarse.update(scores, labels)
    assert metric.error() < abs(coarse.compute() - below) <= coarse.error()


def test_binned_auc_knows_one_zero():
    metric = BinnedAUROC()
    metric.update(torch.tensor([0.0, -0.0]), torch.tensor([False, True]))
    assert metric.compute() == 0.5


def test_grouped_auc_weights_by_rows_and_leaves_out_one_class():
    probabilities, labels = sample_clicks()
    groups = torch.randint(0, 20, (300,)) * 10**12
    labels[groups == 3 * 10**12] = True
    total = rows = 0.0
    for group in groups.unique().tolist():
        mine = groups == group
        if 0 < labels[mine].sum() < mine.sum():
            total += area(probabilities[mine].tolist(), labels[mine].tolist()) * mine.sum().item()
            rows += mine.sum().item()
    assert rows < 300
    metric = GroupedAUC()
    for chosen in (groups < 5 * 10**12, groups >= 5 * 10**12):  # whole groups a batch
        metric.update(probabilities[chosen], labels[chosen], groups[chosen])
    assert metric.compute().item() == pytest.approx(total / rows)


def test_grouped_auc_of_one_class_is_nan():
    metric = GroupedAUC()
    metric.update(torch.tensor([0.1, 0.2]), torch.tensor([True, True]), torch.tensor([0, 0]))
    assert metric.compute().isnan()


def test_log_loss_is_in_nats():
    metric = LogLoss()
    metric.update(torch.tensor([0.5, 0.2]), torch.tensor([True, False]))
    metric.update(torch.tensor([0.9]), torch.tensor([1]))
    assert metric.compute().item() == pytest.approx(-(math.log(0.5) + math.log(0.8) + math.log(0.9)) / 3)


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (torch.tensor([0.5, math.nan]), torch.tensor([0, 1]), "preds: want numbers"),
        (torch.tensor([1, 0]), torch.tensor([0, 1]), "preds: want numbers"),
        (torch.tensor([0.5, 0.6]), torch.tensor([0, 1, 1]), "target: got"),
        (torch.tensor([0.5, 0.6]), torch.tensor([0, 2]), "target: want 0 and 1"),
    ],
)
def test_clicks_that_do_not_fit_are_refused(preds, target, message):
    for metric in (BinnedAUROC(), LogLoss()):
        with pytest.raises(ValueError, match=message):
            metric.update(preds, target)
    with pytest.raises(ValueError, match=message):
        GroupedAUC().update(preds, target, torch.zeros(2))
