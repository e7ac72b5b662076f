"""The retrieval head trained by several real processes: see sharded_training_worker.py."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import recommender_data
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

import sharded_training_worker as worker
from rich.console import Console
from test_sharded_catalog import TESTS, torchrun

from attnrec.catalog import sharded_checkpoint
from attnrec.catalog.sharded_group import Group
from attnrec.recommender import cli, data, runs
from attnrec.recommender.checkpoint import CheckpointError, load_checkpoint
from attnrec.recommender.distributed import Processes, ShardedRetrieval
from attnrec.recommender.tasks import encode_data
from attnrec.recommender.train import ProcessesError, fit

pytestmark = pytest.mark.cpu_only("processes over gloo")
CLI = ("-m", "attnrec.recommender", "--")  # or torchrun takes `--run` for one of its own options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes have trained there, and of another run one was killed in its second epoch."""
    folder = tmp_path_factory.mktemp("training")
    recommender_data.write(folder / "tiny")
    ended = torchrun(2, TESTS / "sharded_training_worker.py", folder)
    assert "Signal 9 (SIGKILL)" in ended.stderr, ended.stderr[-4000:]
    assert ended.returncode != 0
    return folder


@pytest.fixture(scope="module")
def encoded(folder):
    return encode_data(data.load(folder / "tiny"))


def weights(run):
    return load_checkpoint(run / "retrieval" / "best.safetensors")[0]


def last(run):
    """All that the next epoch would have started from, and the rows of the epochs without their seconds."""
    saved = sharded_checkpoint.load(run / "retrieval" / "last", Group())
    rows = [{name: x for name, x in row.items() if name != "seconds"} for row in saved.description["rows"]]
    return saved.shards | saved.others, rows


def test_gradients_are_those_of_one_process(folder):
    for rank in range(2):
        said = (folder / f"gradients.{rank}").read_text()
        assert said == "", f"rank {rank}:\n{said}"


def test_what_is_per_item_is_spread(folder):
    saved = sharded_checkpoint.load(folder / "whole" / "retrieval" / "last", Group())
    items = saved.sharding.total
    assert all(len(x) == items for x in saved.shards.values())
    names = {"model.items.identity", "averaged.bias", "optimizer.0.exp_avg"}
    assert names <= saved.shards.keys()
    assert not any(x.shape[:1] == (items,) for x in saved.others.values())


def test_a_killed_run_goes_on_to_the_same_weights(folder):
    assert len(last(folder / "killed")[1]) == 1
    shutil.copytree(folder / "killed", folder / "on-two")
    data_and_run = ("--data", folder / "tiny", "--run", folder / "on-two")
    options = ("--head", "retrieval", "--epochs", str(worker.EPOCHS), "--resume")
    ended = torchrun(2, *CLI, "train", *data_and_run, *options)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("retrieval epoch") == worker.EPOCHS - 1  # one process prints
    (tensors, rows), (want, want_rows) = last(folder / "on-two"), last(folder / "whole")
    assert rows == want_rows
    assert tensors.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(tensors[name], x), name
    best, want = weights(folder / "on-two"), weights(folder / "whole")
    assert all(torch.equal(best[name], x) for name, x in want.items())


def test_a_killed_run_goes_on_with_another_number_of_processes(folder, encoded):
    """With one: the same but for dropout, which each process draws itself."""
    shutil.copytree(folder / "killed", folder / "on-one")
    torch.manual_seed(0)
    task = runs.make_task("retrieval", encoded)
    task.model = ShardedRetrieval.of(task, Group())
    config = replace(runs.SETTINGS["retrieval"], epochs=worker.EPOCHS)
    rows = fit(task, config, folder / "on-one" / "retrieval", resume=True, processes=Processes(Group()))
    _, want = last(folder / "whole")
    assert len(rows) == worker.EPOCHS
    assert {name: x for name, x in rows[0].items() if name != "seconds"} == want[0]
    for got, row in zip(rows, want, strict=True):
        assert got["loss"] == pytest.approx(row["loss"], rel=0.02)
        assert got["log likelihood"] == pytest.approx(row["log likelihood"], rel=0.01)


def test_as_good_as_one_process(folder, encoded, tmp_path):
    _, rows = runs.train_head("retrieval", encoded, tmp_path, Console(quiet=True), epochs=worker.EPOCHS)
    for alone, together in zip(rows, last(folder / "whole")[1], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=0.02)
        assert together["log likelihood"] == pytest.approx(alone["log likelihood"], rel=0.01)


def test_one_process_serves_what_several_trained(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "run")
    arguments = ["--data", str(folder / "tiny"), "--run", str(tmp_path / "run")]
    assert cli.main(["train", "--head", "ranking", "--epochs", "1", *arguments]) == 0
    assert cli.main(["evaluate", *arguments]) == 0
    assert cli.main(["recommend", "--user", "u3", *arguments]) == 0


def test_runs_of_one_and_of_several_processes_do_not_mix(folder, encoded, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "run")
    with pytest.raises(CheckpointError, match="made under torchrun"):
        runs.train_head("retrieval", encoded, tmp_path / "run", Console(quiet=True), resume=True)
    runs.train_head("retrieval", encoded, tmp_path / "run", Console(quiet=True), epochs=1)  # afresh
    files = sorted(x.name for x in (tmp_path / "run" / "retrieval").iterdir())
    assert files == ["best.safetensors", "last.safetensors"]
    torch.manual_seed(0)
    task = runs.make_task("retrieval", encoded)
    task.model = ShardedRetrieval.of(task, Group())
    with pytest.raises(CheckpointError, match="made by one process"):
        fit(
            task, runs.SETTINGS["retrieval"], tmp_path / "run" / "retrieval", resume=True,
            processes=Processes(Group()),
        )  # fmt: skip


def test_the_ranking_head_is_refused(encoded, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")  # as under torchrun
    with pytest.raises(ProcessesError, match="trained by one process"):
        runs.train_head("ranking", encoded, tmp_path, Console(quiet=True), epochs=1)
