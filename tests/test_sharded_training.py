"""The heads trained by several real processes: see sharded_training_worker.py."""

from __future__ import annotations

import json
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
from attnrec.recommender.distributed import Processes, ShardedProcesses, ShardedRetrieval
from attnrec.recommender.tasks import encode_data
from attnrec.recommender.train import fit

pytestmark = pytest.mark.cpu_only("processes over gloo")
LIKELIHOODS = {"log likelihood", "logloss"}
HEADS = pytest.mark.parametrize("head", runs.HEADS)
CLI = ("-m", "attnrec.recommender", "--")  # or torchrun takes `--run` for one of its own options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes have trained there, and of another run one was killed in its second epoch."""
    folder = tmp_path_factory.mktemp("training")
    recommender_data.write(folder / "tiny")
    for head in runs.HEADS:
        ended = torchrun(2, TESTS / "sharded_training_worker.py", folder, head)
        assert "Signal 9 (SIGKILL)" in ended.stderr, ended.stderr[-4000:]
        assert ended.returncode != 0
    return folder


@pytest.fixture(scope="module")
def encoded(folder):
    return encode_data(data.load(folder / "tiny"))


@pytest.fixture(scope="module")
def resumed(folder):
    """Two processes have gone on with both heads of the run that was killed."""
    shutil.copytree(folder / "killed", folder / "on-two")
    data_and_run = ("--data", folder / "tiny", "--run", folder / "on-two")
    ended = torchrun(2, *CLI, "train", *data_and_run, "--epochs", str(worker.EPOCHS), "--resume")
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


def weights(run, head):
    return load_checkpoint(run / head / "best.safetensors")[0]


def last(run, head):
    """All that the next epoch would have started from, and the rows of the epochs without their seconds."""
    saved = sharded_checkpoint.load(run / head / "last", Group())
    rows = [{name: x for name, x in row.items() if name != "seconds"} for row in saved.description["rows"]]
    return saved.shards | saved.others, rows


def on_one_process(head, encoded):
    """A task as several processes have it, when there is one of them."""
    torch.manual_seed(0)
    task = runs.make_task(head, encoded)
    if head == "retrieval":
        task.model, task.processes = ShardedRetrieval.of(task, Group()), ShardedProcesses(Group())
    else:
        task.processes = Processes(Group())
    return task


@HEADS
def test_gradients_are_those_of_one_process(folder, head):
    for rank in range(2):
        said = (folder / f"gradients.{head}.{rank}").read_text()
        assert said == "", f"rank {rank}:\n{said}"


@HEADS
def test_epochs_are_those_of_one_process(folder, head, encoded, tmp_path):
    """Loss and metrics, without dropout, on the same batches."""
    want = worker.rows_without_dropout(worker.task_without_dropout(head, encoded), tmp_path)
    found = [json.loads((folder / f"rows.{head}.{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1]  # or processes would part where one of them stops early
    for row, alone in zip(found[0], want, strict=True):
        assert row == pytest.approx(alone, rel=1e-4)


def test_what_is_per_item_is_spread(folder):
    saved = sharded_checkpoint.load(folder / "whole" / "retrieval" / "last", Group())
    items = saved.sharding.total
    assert all(len(x) == items for x in saved.shards.values())
    names = {"model.items.identity", "averaged.bias", "optimizer.0.exp_avg"}
    assert names <= saved.shards.keys()
    assert not any(x.shape[:1] == (items,) for x in saved.others.values())


@HEADS
def test_a_killed_run_goes_on_to_the_same_weights(folder, resumed, head):
    assert len(last(folder / "killed", head)[1]) == 1
    assert resumed.count(f"{head} epoch") == worker.EPOCHS - 1  # one process prints
    (tensors, rows), (want, want_rows) = last(folder / "on-two", head), last(folder / "whole", head)
    assert rows == want_rows
    assert tensors.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(tensors[name], x), name
    best, want = weights(folder / "on-two", head), weights(folder / "whole", head)
    assert all(torch.equal(best[name], x) for name, x in want.items())


@HEADS
def test_a_killed_run_goes_on_with_another_number_of_processes(folder, encoded, tmp_path, head):
    """With one: the same but for dropout, which each process draws itself."""
    shutil.copytree(folder / "killed", tmp_path / "on-one")
    task = on_one_process(head, encoded)
    config = replace(runs.SETTINGS[head], epochs=worker.EPOCHS)
    rows = fit(task, config, tmp_path / "on-one" / head, resume=True)
    _, want = last(folder / "whole", head)
    assert len(rows) == worker.EPOCHS
    assert {name: x for name, x in rows[0].items() if name != "seconds"} == want[0]
    for got, row in zip(rows, want, strict=True):
        assert alike(got, row)


@HEADS
def test_as_good_as_one_process(folder, encoded, tmp_path, head):
    _, rows = runs.train_head(head, encoded, tmp_path, Console(quiet=True), epochs=worker.EPOCHS)
    for alone, together in zip(rows, last(folder / "whole", head)[1], strict=True):
        assert alike(together, alone)


def alike(row, want):
    """But for dropout."""
    return row["loss"] == pytest.approx(want["loss"], rel=0.02) and all(
        row[name] == pytest.approx(want[name], rel=0.01) for name in LIKELIHOODS & want.keys()
    )


def test_one_process_serves_what_several_trained(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "run")
    arguments = ["--data", str(folder / "tiny"), "--run", str(tmp_path / "run")]
    assert cli.main(["evaluate", *arguments]) == 0
    assert cli.main(["recommend", "--user", "u3", *arguments]) == 0


@HEADS
def test_runs_of_one_and_of_several_processes_do_not_mix(folder, encoded, tmp_path, head):
    shutil.copytree(folder / "whole", tmp_path / "run")
    with pytest.raises(CheckpointError, match="made under torchrun"):
        runs.train_head(head, encoded, tmp_path / "run", Console(quiet=True), resume=True)
    runs.train_head(head, encoded, tmp_path / "run", Console(quiet=True), epochs=1)  # afresh
    files = sorted(x.name for x in (tmp_path / "run" / head).iterdir())
    assert files == ["best.safetensors", "last.safetensors"]
    with pytest.raises(CheckpointError, match="made by one process"):
        fit(on_one_process(head, encoded), runs.SETTINGS[head], tmp_path / "run" / head, resume=True)
