"""The models do not look ahead, learn, and go on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import recommender_data
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from attnrec.recommender import train
from attnrec.recommender.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from attnrec.recommender.data import TEST, TRAIN, load
from attnrec.recommender.model import History, RankingConfig, RetrievalConfig
from attnrec.recommender.tasks import RankingTask, RetrievalTask, encode_data, restore

CONFIG = train.TrainConfig(epochs=3, patience=9, batch_users=8, learning_rate=1e-2, warmup_steps=2)
SMALL = {"retrieval": RetrievalConfig(dim=16, window=12), "ranking": RankingConfig(dim=16, heads=2, layers=1)}
HEADS = ("retrieval", "ranking")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load(recommender_data.write(tmp_path_factory.mktemp("tiny")))


def make(head, data, **changes):
    torch.manual_seed(0)
    kind = RetrievalTask if head == "retrieval" else RankingTask
    return kind(encode_data(data), replace(SMALL[head], **changes))


def weights(folder, name="last"):
    return load_checkpoint(folder / f"{name}.safetensors")[0]


def assert_same(found, want):
    assert found.keys() == want.keys()
    for name in want:
        assert torch.equal(found[name], want[name]), name


@pytest.mark.parametrize("head", HEADS)
def test_a_killed_run_goes_on_to_the_same_weights(head, data, tmp_path):
    train.fit(make(head, data), CONFIG, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(row):
        if row["epoch"] == 0:
            raise Killed

    with pytest.raises(Killed):
        train.fit(make(head, data), CONFIG, tmp_path / "parts", on_epoch=kill)
    rows = train.fit(make(head, data), CONFIG, tmp_path / "parts", resume=True)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for name in ("last", "best"):
        assert_same(weights(tmp_path / "parts", name), weights(tmp_path / "whole", name))


def test_more_patience_is_no_other_configuration(data, tmp_path):
    short, long = replace(CONFIG, epochs=4, patience=0), replace(CONFIG, epochs=4)
    assert len(train.fit(make("ranking", data), short, tmp_path)) == 1
    assert len(train.fit(make("ranking", data), long, tmp_path, resume=True)) == 4


def test_another_configuration_cannot_go_on(data, tmp_path):
    train.fit(make("ranking", data), replace(CONFIG, epochs=1), tmp_path)
    with pytest.raises(CheckpointError, match="made with train"):
        train.fit(make("ranking", data), replace(CONFIG, epochs=1, seed=1), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="made with model"):
        train.fit(make("ranking", data, hidden=8), replace(CONFIG, epochs=1), tmp_path, resume=True)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"x": torch.ones(2)}, {"n": 1})

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("attnrec.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"x": torch.zeros(2)}, {"n": 2})
    tensors, description = load_checkpoint(path)
    assert tensors["x"].tolist() == [1, 1]
    assert description == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_damaged_checkpoint(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "b.safetensors")


def test_weights_of_another_model_are_refused(data, tmp_path):
    train.fit(make("ranking", data), replace(CONFIG, epochs=1), tmp_path / "ranking")
    restore(make("ranking", data), tmp_path)
    with pytest.raises(CheckpointError, match="made with model"):
        restore(make("ranking", data, dim=32), tmp_path)


def test_early_stopping_keeps_the_best_epoch(data, tmp_path):
    task = make("ranking", data)
    values = iter([0.5, 0.9, 0.7, 0.6, 0.8])
    task.validate = lambda model: {"auc": next(values)}
    seen = []
    inner = train._average

    def average(averaged, model, decay):
        inner(averaged, model, decay)
        seen.append(copy.deepcopy(averaged.state_dict()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_average", average)
        rows = train.fit(task, replace(CONFIG, epochs=9, patience=2), tmp_path)
    assert [row["auc"] for row in rows] == [0.5, 0.9, 0.7, 0.6]
    steps = len(seen) // 4
    assert_same(dict(task.model.state_dict()), seen[2 * steps - 1])


@pytest.mark.parametrize("head", HEADS)
def test_it_learns(head, data, tmp_path):
    task = make(head, data)
    rows = train.fit(task, replace(CONFIG, epochs=12), tmp_path)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    if head == "ranking":
        assert task.test()[0]["auc"] > 0.7


def changed(data, row, item=None):
    """The data set with one event's rating, and perhaps item, changed."""
    rating, items = data.rating.copy(), data.item.copy()
    rating[row] = 1.0 if rating[row] >= 4 else 5.0
    if item is not None:
        items[row] = item
    return replace(data, rating=rating, item=items)


@pytest.mark.parametrize("part", [TRAIN, TEST], ids=["train", "test"])
def test_ranking_does_not_see_an_event_or_its_rating_before_its_time(data, part):
    """The events of one user up to the changed one keep their predictions; later ones do not."""
    before = make("ranking", data)
    before.model.eval()
    user = 5
    span = data.history(user)
    row = span.stop - 2  # the second to last, in the test part
    unused = np.setdiff1d(np.arange(len(data.item_names)), data.item[span])[0]
    for item in (None, int(unused)):
        after = make("ranking", changed(data, row, item))
        after.model.load_state_dict(before.model.state_dict())
        after.model.eval()
        found, rows = before.probabilities(before.model, part)
        again, _ = after.probabilities(after.model, part)
        # a changed item is another candidate, but only in its own row
        earlier = (rows <= row) if item is None else (rows != row) & ~((rows > row) & (rows < span.stop))
        assert torch.equal(found[earlier], again[earlier])
        if part == TEST:
            assert not torch.equal(found[rows == span.stop - 1], again[rows == span.stop - 1])


def test_ranking_statistics_do_not_see_later_ratings_of_others(data):
    """Another user's training rating counts from its timestamp on, not before."""
    task = make("ranking", data)
    row = data.history(0).start + 1
    other = make("ranking", changed(data, row))
    now, before = other.statistics.before_events(), task.statistics.before_events()
    differs = (now[:, 1] - before[:, 1]).abs() > 0.05
    allowed = torch.from_numpy((data.item == data.item[row]) & (data.time > data.time[row]))
    assert (differs & allowed).any()
    assert not (differs & ~allowed).any()


def test_retrieval_states_are_causal(data):
    task = make("retrieval", data)
    task.model.eval()
    history = task.encoded.history(np.array([0, 1]), np.array([10, 8]))
    other = History(history.items.clone(), history.levels.clone(), history.offsets)
    other.items[6] = (other.items[6] + 1) % len(data.item_names)
    other.levels[6] = (other.levels[6] + 1) % 3
    items = task.model.items()
    a, b = task.model._states(history, items), task.model._states(other, items)
    same = [row for row in range(18) if row not in range(6, 10)]
    assert torch.equal(a[same], b[same])
    assert (a[6:10] != b[6:10]).any(dim=1).all()


def test_retrieval_trains_on_training_events_only(data):
    task = make("retrieval", data)
    for history, targets in task.batches(8, torch.Generator().manual_seed(0)):
        assert len(history.items) == len(targets) == history.offsets[-1]
    marked = replace(data, item=data.item.copy())
    for user in range(len(data.user_names)):
        marked.item[data.history(user)] = np.minimum(np.arange(data.lengths[user]), 2)
    held_out = np.concatenate(
        [[data.offsets[u + 1] - 1, data.offsets[u + 1] - 2] for u in range(len(data.user_names))]
    )
    marked.item[held_out] = 7
    for history, targets in make("retrieval", marked).batches(8, torch.Generator().manual_seed(0)):
        assert not (history.items == 7).any()
        assert not (targets == 7).any()


def test_lists_hold_nothing_that_was_seen(data):
    task = make("retrieval", data)
    task.model.eval()
    batches = []
    task.test(lambda *batch: batches.append(batch))
    users, ids, probabilities = (
        np.concatenate([b[0] for b in batches]),
        *(torch.cat([b[i] for b in batches]) for i in (1, 2)),
    )
    assert ids.shape == (len(data.user_names), 20)
    for user, row in zip(users, ids.tolist(), strict=True):
        seen = set(data.item[data.history(user)][:-1].tolist())
        listed = [item for item in row if item >= 0]
        assert len(set(listed)) == len(listed)
        assert not seen & set(listed)
    assert (probabilities[:, :-1] >= probabilities[:, 1:]).all()
    assert (probabilities.sum(1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_lists_are_the_same_whatever_the_catalogue_reads_first(data, dtype):
    task = make("retrieval", data)
    task.model.eval()
    exact, filtered = [], []
    want = task.test(lambda *batch: exact.append(batch))
    assert task.test(lambda *batch: filtered.append(batch), dtype) == want
    for (_, ids, chances), (_, other_ids, other_chances) in zip(exact, filtered, strict=True):
        assert torch.equal(ids, other_ids)
        # their sum of exponentials is approximate, by a tenth at most
        torch.testing.assert_close(chances.log(), other_chances.log(), rtol=0, atol=0.1)


def test_a_user_without_events_gets_the_most_popular(data):
    task = make("retrieval", data)
    task.model.bias.data[3] = 10.0
    empty = History(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.tensor([0, 0]))
    nothing = (torch.empty(0, dtype=torch.long), torch.tensor([0, 0]))
    with torch.no_grad():
        _, ids, _ = task.model.recommend(empty, 5, nothing, task.model.catalog())
    assert ids[0, 0] == 3


def test_explanation_weights_add_up_to_one(data):
    task = make("ranking", data)
    task.model.eval()
    clicks, found = task.judge(2, np.array([1, 4]))
    assert clicks.shape == (2,)
    assert found.shape == (2, data.lengths[2], 2)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 2))
