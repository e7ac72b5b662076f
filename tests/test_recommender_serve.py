"""A session of a user absorbs events one by one, and answers as if all had been there from the start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import recommender_data
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from attnrec.nn import FusedMultiHeadAttention
from attnrec.recommender.cache import KeyValueCache
from attnrec.recommender.data import TRAIN, load, ranking_split
from attnrec.recommender.features import Statistics
from attnrec.recommender.model import RankingConfig, RetrievalConfig
from attnrec.recommender.serve import Recommender
from attnrec.recommender.tasks import RankingTask, RetrievalTask, encode_data

USER = 4
LATER = 6  # events of the user that come one by one


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load(recommender_data.write(tmp_path_factory.mktemp("tiny")))


def later(data, count):
    """Which rows are the last events of USER."""
    rows = np.zeros(len(data.user), dtype=bool)
    rows[data.history(USER).stop - count : data.history(USER).stop] = True
    return rows


def without_last(data, count):
    """The data set before the last events of USER."""
    keep = ~later(data, count)
    lengths = data.lengths.copy()
    lengths[USER] -= count
    return replace(
        data,
        **{name: getattr(data, name)[keep] for name in ("user", "item", "rating", "time")},
        offsets=np.concatenate(([0], np.cumsum(lengths))),
    )


def recommender(data, layers=1, window=200, like=None):
    """With random weights, or those of another one; item statistics are those of `like`, too."""
    torch.manual_seed(0)
    encoded = encode_data(data)
    retrieval = RetrievalTask(encoded, RetrievalConfig(dim=16, window=window))
    ranking = RankingTask(encoded, RankingConfig(dim=16, heads=2, layers=layers))
    with torch.no_grad():  # from the start weights all items score alike
        for parameter in (*retrieval.model.parameters(), *ranking.model.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    if like is not None:
        retrieval.model.load_state_dict(like.retrieval.model.state_dict())
        ranking.model.load_state_dict(like.ranking.model.state_dict())
        # other statistics than the user's own know what they knew there
        counted = np.zeros(len(data.user), dtype=bool)
        counted[~later(data, LATER)] = ranking_split(like.encoded.data) == TRAIN
        ranking.statistics = Statistics(data, ranking.likes, counted)
    for task in (retrieval, ranking):
        task.model.eval()
    return Recommender(encoded, retrieval, ranking)


def recomputed(whole, k):
    """The answers of the batched path, which encodes all events."""
    users, ends = np.array([USER]), whole.encoded.data.lengths[[USER]]
    _, ids, probabilities = next(whole.retrieval.lists(whole.retrieval.model, users, ends, k))
    clicks, _ = whole.ranking.judge(USER, ids[0].numpy())
    return ids[0].tolist(), probabilities[0], clicks


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("window", [200, 12, "all", "all but one"])
def test_absorbed_events_are_as_good_as_a_recomputation(data, layers, window):
    window = {"all": int(data.lengths[USER]), "all but one": int(data.lengths[USER]) - 1}.get(window, window)
    start = recommender(without_last(data, LATER), layers, window)
    session = start.follow(USER)
    before = [row.item for row in session.recommend(5)]
    span = data.history(USER)
    for row in range(span.stop - LATER, span.stop):
        session.add(int(data.item[row]), float(data.rating[row]))
    found = session.recommend(5)
    ids, probabilities, clicks = recomputed(recommender(data, layers, window, like=start), 5)
    assert [row.item for row in found] == ids != before
    torch.testing.assert_close(
        torch.tensor([row.probability for row in found]), probabilities, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(torch.tensor([row.click for row in found]), clicks, rtol=1e-4, atol=0)


def test_an_event_costs_its_own_rows(data):
    start = recommender(data, layers=2)
    session = start.follow(USER)
    rows = []
    heads = start.retrieval.model, start.ranking.model
    hooks = [
        layer.mlp.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
        for model in heads
        for layer in model.encoder.layers
    ]
    session.add(3, 5.0)
    session.add(7, 1.0)
    session.recommend(5)
    for hook in hooks:
        hook.remove()
    assert rows == [1] * 8  # two events, two layers, two heads


def test_a_user_without_events(data):
    start = recommender(without_last(data, int(data.lengths[USER])))
    session = start.follow(USER)
    want = start.retrieval.model.bias.topk(3).indices.tolist()
    assert [row.item for row in session.recommend(3)] == want
    session.add(want[0], 5.0)
    assert want[0] not in [row.item for row in session.recommend(len(data.item_names))]


def test_recommend_more_than_there_is(data):
    start = recommender(data)
    unseen = len(data.item_names) - len(set(data.item[data.history(USER)]))
    assert len(start.recommend(USER, 10_000)) == unseen


@pytest.mark.parametrize("parts", [[1] * 9, [4, 5], [9], [0, 2, 0, 7]])
def test_cache_attends_like_the_module(parts):
    torch.manual_seed(0)
    attention = FusedMultiHeadAttention(32, 4)
    torch.nn.init.normal_(attention.in_proj_bias)
    query, key, value = torch.randn(3, 32), torch.randn(9, 32), torch.randn(9, 32)
    offsets = torch.tensor([0, 3]), torch.tensor([0, 9])
    with torch.inference_mode():
        want, _ = attention(
            query, key, value, need_weights=False, q_offsets=offsets[0], kv_offsets=offsets[1]
        )
        causal, _ = attention(
            key, key, key, need_weights=False, is_causal=True, q_offsets=offsets[1], kv_offsets=offsets[1]
        )
        cache, causal_cache = KeyValueCache(attention), KeyValueCache(attention)
        found = []
        for keys, values in zip(key.split(parts), value.split(parts), strict=True):
            cache.append(keys, values)
            found.append(causal_cache.attend_causally(keys))
        torch.testing.assert_close(cache.attend(query), want)
        torch.testing.assert_close(torch.cat(found), causal)
    assert cache.length == 9


def test_a_heat_map_of_names_with_dollar_signs(data, tmp_path):
    """Which matplotlib would read as mathematics, and refuse."""
    from attnrec.recommender import report  # needs matplotlib

    count = len(data.user_names), len(data.item_names)
    named = replace(data, user_names=["$_$"] * count[0], titles=["$_$"] * count[1])
    report.heat_map(tmp_path / "map.png", named, recommender(named).explain(USER, 3))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
