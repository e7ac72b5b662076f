"""The command line and the demo, end to end on a made-up data set."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import recommender_data

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from attnrec.recommender import cli, demo
from attnrec.recommender.data import load as load_data
from attnrec.recommender.data import ranking_split

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recommender_data.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run folder with both heads trained for two epochs."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main(["train", "--data", str(folder), "--run", str(out), "--epochs", "2"]) == 0
    return out


def test_data_says_what_is_there(folder, capsys):
    assert cli.main(["data", str(folder)]) == 0
    printed = capsys.readouterr().out
    for number in ("24", "40", "class", "gender"):
        assert number in printed


def test_train_leaves_checkpoints_and_goes_on(folder, run, capsys):
    files = {path.relative_to(run).as_posix() for path in run.rglob("*.safetensors")}
    assert files == {
        f"{head}/{name}.safetensors" for head in ("retrieval", "ranking") for name in ("best", "last")
    }
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert cli.main(["train", "--data", str(folder), "--run", str(run), "--epochs", "2", "--resume"]) == 0
    assert before == {path: path.read_bytes() for path in run.rglob("*.safetensors")}  # it had been finished


def test_evaluate(folder, run, capsys):
    assert cli.main(["evaluate", "--data", str(folder), "--run", str(run)]) == 0
    assert "gauc" in capsys.readouterr().out
    found = json.loads((run / "metrics.json").read_text())
    assert 0 <= found["retrieval"]["hr@10"] <= 1


def test_recommend(folder, run, capsys):
    data = load_data(folder)
    assert cli.main(["recommend", "--data", str(folder), "--run", str(run), "--user", "u3", "--k", "5"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "Title" in line]
    assert len(rows) == 5
    seen = {data.titles[item] for item in data.item[data.history(data.user_id("u3"))]}
    assert not any(f"{title} " in row for title in seen for row in rows)


def test_recommend_after_further_events(folder, run, capsys):
    command = ["recommend", "--data", str(folder), "--run", str(run), "--user", "u3", "--k", "40"]
    assert cli.main(command) == 0
    before = [line for line in capsys.readouterr().out.splitlines() if "Title" in line]
    item = before[0].split()[3]  # rank and item, in a frame
    assert cli.main([*command, "--event", f"{item}=5", "--catalog-dtype", "int8"]) == 0
    after = [line for line in capsys.readouterr().out.splitlines() if "Title" in line]
    assert len(after) == len(before) - 1
    assert not any(item in line.split() for line in after)


def test_explain(folder, run, tmp_path, capsys):
    out = tmp_path / "map.png"
    command = [
        "explain",
        "--data",
        str(folder),
        "--run",
        str(run),
        "--user",
        "u3",
        "--item",
        "i4",
        "--top",
        "3",
    ]
    assert cli.main([*command, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(PNG)
    assert sum("Title" in line for line in capsys.readouterr().out.splitlines()) == 3 + 1  # and the heading


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["recommend", "--user", "nobody"], "no user 'nobody'"),
        (["explain", "--user", "u1", "--item", "nothing"], "no item 'nothing'"),
        (["recommend", "--user", "u1", "--event", "i3"], "event 'i3': want ITEM=RATING"),
        (["recommend", "--user", "u1", "--event", "nothing=3"], "no item 'nothing'"),
        (["evaluate", "--run", "nowhere"], "no checkpoint"),
        (["recommend", "--user", "u1", "--event", "i3=inf"], "event 'i3=inf': want ITEM=RATING"),
        (["evaluate", "--data", "nowhere"], "want one .inter file"),
    ],
    ids=["user", "item", "event", "event item", "run", "event rating", "data"],
)
def test_mistakes_are_told_in_a_line(folder, run, capsys, command, message):
    places = [] if "--data" in command else ["--data", str(folder)]
    places += [] if "--run" in command else ["--run", str(run)]
    assert cli.main([*command, *places]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("head", "events", "message"), [("retrieval", 3, "no user has four events"), ("ranking", 9, "ten events")]
)
def test_users_with_too_few_events_to_train_on(head, events, message, tmp_path, capsys):
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{user}\ti{event}\t{event % 5}\t{event}" for user in range(5) for event in range(events)]
    (tmp_path / "few.inter").write_text("\n".join(lines))
    command = ["train", "--head", head, "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    assert cli.main(command) == 1
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("main", [lambda epochs: cli.main(["train", *epochs]), demo.main])
@pytest.mark.parametrize("epochs", ["0", "-1"])
def test_no_epochs_are_refused(main, epochs, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--epochs", epochs])
    assert f"--epochs: {epochs} is not positive" in capsys.readouterr().err


def test_demo_where_some_users_have_no_events(folder, tmp_path):
    """They are in the `.user` file, first and last."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    header, *users = (data / "tiny.user").read_text().splitlines()
    nobody = [f"{name}\t20\tM\tother" for name in ("first", "last")]
    (data / "tiny.user").write_text("\n".join([header, nobody[0], *users, nobody[1]]) + "\n")
    assert demo.main(["--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
    assert (tmp_path / "out" / "report.html").read_text().count("<section>") == 3


def test_every_command_has_help(capsys):
    for command in ([], ["data"], ["train"], ["update"], ["evaluate"], ["recommend"], ["explain"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*command, "--help"])
        assert "usage: python -m attnrec.recommender" in capsys.readouterr().out


def test_tensorboard_logs(folder, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra: pip install 'attnrec[tensorboard]'")
    command = ["train", "--data", str(folder), "--run", str(tmp_path), "--head", "ranking", "--epochs", "1"]
    assert cli.main([*command, "--tensorboard"]) == 0
    assert list((tmp_path / "ranking" / "tensorboard").glob("events*"))


def test_demo_writes_what_it_promises(folder, tmp_path):
    assert demo.main(["--data", str(folder), "--out", str(tmp_path), "--epochs", "1"]) == 0
    data = load_data(folder)

    found = json.loads((tmp_path / "metrics.json").read_text())
    assert set(found) == {"retrieval", "popularity", "ranking", "seconds", "environment"}
    names = ("hr", "ndcg", "mrr", "coverage", "gini", "diversity", "novelty", "arp", "lift")
    assert set(found["retrieval"]) == {f"{name}@{k}" for name in names for k in (5, 10, 20)}
    assert set(found["popularity"]) == set(found["retrieval"])
    assert set(found["ranking"]) == {"auc", "gauc", "logloss"}
    assert found["seconds"] > 0
    assert isinstance(found["environment"], dict)

    with (tmp_path / "recommendations.csv").open(newline="") as file:
        lists = list(csv.DictReader(file))
    assert list(lists[0]) == ["user", "rank", "item", "title", "probability"]
    hits = 0
    for name in data.user_names:
        mine = [row for row in lists if row["user"] == name]
        history = [data.item_names[item] for item in data.item[data.history(data.user_id(name))]]
        assert [int(row["rank"]) for row in mine] == list(range(1, 11))
        assert len({row["item"] for row in mine}) == 10
        assert not {row["item"] for row in mine} & set(history[:-1])
        assert all(row["title"] == data.titles[data.item_id(row["item"])] for row in mine)
        assert all(0 < float(row["probability"]) < 1 for row in mine)
        hits += history[-1] in {row["item"] for row in mine}
    assert found["retrieval"]["hr@10"] == pytest.approx(hits / len(data.user_names))

    with (tmp_path / "ranking.csv").open(newline="") as file:
        clicks = list(csv.DictReader(file))
    assert list(clicks[0]) == ["user", "item", "label", "probability"]
    test = ranking_split(data) == 2
    want = [
        (data.user_names[user], data.item_names[item], str(int(rating >= 4)))
        for user, item, rating in zip(data.user[test], data.item[test], data.rating[test], strict=True)
    ]
    assert [(row["user"], row["item"], row["label"]) for row in clicks] == want

    assert (tmp_path / "heatmap.png").read_bytes().startswith(PNG)
    before = {
        path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.suffix in (".safetensors", ".csv")
    }
    assert demo.main(["--data", str(folder), "--out", str(tmp_path), "--epochs", "1"]) == 0  # trains no more
    assert before == {path: path.read_bytes() for path in before}
    assert json.loads((tmp_path / "metrics.json").read_text())["seconds"] > 0.5 * found["seconds"]
    assert demo.main(["--data", str(folder), "--out", str(tmp_path), "--epochs", "1", "--seed", "1"]) == 0
    assert all(path.read_bytes() != content for path, content in before.items())  # other settings: afresh
    page = (tmp_path / "report.html").read_text()
    assert page.count("<section>") == 3
    for name in (*names, "retrieval @20"):
        assert f">{name}<" in page
    assert "gauc" in page
