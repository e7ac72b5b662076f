"""A trained head goes on from its weights on a data set that has grown: rows by name, and only who is new."""

from __future__ import annotations

import numpy as np
import pytest
import recommender_data
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from attnrec.recommender import cli, runs
from attnrec.recommender.checkpoint import CheckpointError, load_checkpoint
from attnrec.recommender.data import load
from attnrec.recommender.model import RankingConfig, RetrievalConfig
from attnrec.recommender.tasks import RankingTask, RetrievalTask, encode_data

HEADS = ("retrieval", "ranking")
GONE = ("i39",)  # an item that only the old data set has
NEW = ("i7", "i8")  # items that only the new one has


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set, and how it has grown: another order, new users, items and events, a new genre."""
    root = tmp_path_factory.mktemp("data")
    whole = recommender_data.write(root / "whole")
    kept = load(whole)
    last = {
        (name, kept.item_names[kept.item[kept.history(user).stop - 1]])
        for user, name in enumerate(kept.user_names)
        if user % 2
    }
    for name, fresh in (("before", False), ("after", True)):
        (root / name).mkdir()
        for path in whole.iterdir():
            header, *rows = path.read_text().splitlines()
            fields = [row.split("\t") for row in rows]
            if path.suffix == ".inter":
                fields = [f for f in fields if f[1] not in (GONE if fresh else NEW)]
                fields = [f for f in fields if fresh or ((f[0], f[1]) not in last and f[0] != "u0")]
            elif path.suffix == ".item":
                fields = [f for f in fields if f[0] not in (GONE if fresh else NEW)]
                fields = [[*f[:3], f"{f[3]} Animation"] if fresh and f[0] == "i3" else f for f in fields]
            else:
                fields = [f for f in fields if fresh or f[0] != "u0"]
            fields = fields[::-1] if fresh else fields
            (root / name / path.name).write_text("\n".join([header, *("\t".join(f) for f in fields)]) + "\n")
    return root / "before", root / "after"


def make(head, folder, seed):
    torch.manual_seed(seed)
    encoded = encode_data(load(folder))
    if head == "retrieval":
        return RetrievalTask(encoded, RetrievalConfig(dim=16))
    return RankingTask(encoded, RankingConfig(dim=16, heads=2))


@pytest.mark.parametrize("head", HEADS)
def test_rows_go_by_name(head, folders):
    old, new = make(head, folders[0], 0), make(head, folders[1], 1)
    with torch.no_grad():
        for parameter in old.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    start = {name: tensor.clone() for name, tensor in new.model.state_dict().items()}
    before, now = old.encoded.vocabulary(), new.encoded.vocabulary()
    new.model.load_state_dict(before.carry(old.model.state_dict(), start, now))

    both = [name for name in now.items if name in before.items and name != "i3"]  # which has one more genre
    assert len(both) == 40 - 1 - 3
    where = [before.items.index(name) for name in both], [now.items.index(name) for name in both]
    assert where[0] != where[1]
    torch.testing.assert_close(new.model.items()[where[1]], old.model.items()[where[0]])
    bias = "bias" if head == "retrieval" else "item_bias"
    assert torch.equal(getattr(new.model, bias)[where[1]], getattr(old.model, bias)[where[0]])
    for name in NEW:
        row = now.items.index(name)
        assert torch.equal(new.model.items.identity[row], start["items.identity"][row])
    if head == "ranking":
        same = [before.users.index("u5")], [now.users.index("u5")]
        torch.testing.assert_close(new.model.users()[same[1]], old.model.users()[same[0]])
        assert torch.equal(new.model.user_bias[same[1]], old.model.user_bias[same[0]])
        assert torch.equal(
            new.model.user_bias[now.users.index("u0")], start["user_bias"][now.users.index("u0")]
        )


def test_who_has_more_events(folders):
    before, now = (encode_data(load(folder)).vocabulary() for folder in folders)
    more = {now.users[number] for number in before.users_with_more(now)}
    counts = [dict(zip(v.users, v.events, strict=True)) for v in (before, now)]
    assert more == {name for name, count in counts[1].items() if count > counts[0].get(name, 0)}
    assert "u0" in more
    assert len(more) < 24
    assert now.users_with_more(now) == []


@pytest.mark.parametrize("head", HEADS)
def test_training_reads_the_chosen_users_only(head, folders):
    task = make(head, folders[1], 0)
    task.training_users = np.array([3, 5])
    items = {
        int(task.encoded.data.item[row])
        for u in (3, 5)
        for row in range(*task.encoded.data.offsets[u : u + 2])
    }
    batches = list(task.batches(8, torch.Generator().manual_seed(0)))
    assert len(batches) == 1
    history = batches[0][0] if head == "retrieval" else batches[0].history
    assert len(history.offsets) == 3
    assert set(history.items.tolist()) <= items


@pytest.mark.parametrize("head", HEADS)
def test_what_cannot_be_carried_is_refused(head, folders):
    old, new = make(head, folders[0], 0), make(head, folders[1], 1)
    before, now = vars(old.encoded.vocabulary()), new.encoded.vocabulary()
    weights, start = old.model.state_dict(), new.model.state_dict()
    kind = type(now)
    with pytest.raises(CheckpointError, match="rating levels were"):
        kind(**before | {"thresholds": [2.0]}).carry(weights, start, now)
    with pytest.raises(CheckpointError, match="the item features are others"):
        kind(**before | {"item_words": [None, *before["item_words"][1:]]}).carry(weights, start, now)
    weights["encoder.gate.weight"] = weights["encoder.gate.weight"][:1]
    with pytest.raises(CheckpointError, match=r"encoder\.gate\.weight was"):
        kind(**before).carry(weights, start, now)


def test_update_trains_on_who_has_more_events(folders, tmp_path, monkeypatch):
    run = ["--run", str(tmp_path), "--head", "ranking"]
    assert cli.main(["train", "--data", str(folders[0]), *run, "--epochs", "1"]) == 0
    trained = []
    monkeypatch.setattr(runs, "fit", lambda task, *_, **__: trained.append(task))
    assert cli.main(["update", "--data", str(folders[1]), *run]) == 0
    before, now = (encode_data(load(folder)).vocabulary() for folder in folders)
    assert trained[0].training_users.tolist() == before.users_with_more(now)


def test_update_goes_on_and_train_would_not(folders, tmp_path, capsys):
    before, after = map(str, folders)
    run = ["--run", str(tmp_path)]
    assert cli.main(["train", "--data", before, *run, "--epochs", "6"]) == 0
    assert cli.main(["evaluate", "--data", after, *run]) == 1  # made with other data
    assert cli.main(["update", "--data", before, *run]) == 1
    assert "nobody has more events" in " ".join(capsys.readouterr().out.split())
    rows = {head: load_checkpoint(tmp_path / head / "best.safetensors")[1]["row"] for head in HEADS}
    assert cli.main(["update", "--data", after, *run, "--epochs", "2"]) == 0
    for head, metric in (("retrieval", "log likelihood"), ("ranking", "auc")):
        _, saved = load_checkpoint(tmp_path / head / "best.safetensors")
        assert saved["description"]["data"]["users"] == 24
        # it starts where it was and not from the start weights, whose likelihood is that of 1 of 39 items
        assert saved["row"][metric] > rows[head][metric] - 0.1
    assert cli.main(["evaluate", "--data", after, *run]) == 0
    assert cli.main(["recommend", "--data", after, *run, "--user", "u0", "--k", "3"]) == 0
    assert cli.main(["update", "--data", after, *run]) == 1  # all of it is known now
