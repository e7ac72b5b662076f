"""examples/serve_cpp: exported, built and run as its README says; its scores against Python's."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import recommender_data
import torch
from helpers import assert_close_to_reference

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

import attnrec
from attnrec._extension import OPS_LIBRARY, extension
from attnrec.recommender.data import load
from attnrec.recommender.model import RankingConfig
from attnrec.recommender.tasks import RankingTask, encode_data

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serve_cpp"

pytestmark = pytest.mark.skipif(
    extension is None or shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="needs the compiled ops, and a C++ compiler",
)


def example(name):
    spec = importlib.util.spec_from_file_location(f"serve_cpp_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exporter():
    return example("export")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    torch.manual_seed(0)
    data = load(recommender_data.write(tmp_path_factory.mktemp("data")))
    task = RankingTask(encode_data(data), RankingConfig(dim=16, heads=2, layers=1))
    with torch.no_grad():  # from the start weights all items score alike
        for parameter in task.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    task.model.eval()
    return task


@pytest.fixture(scope="module")
def batch(exporter, task):
    return exporter.make_batch(task, np.array([3, 0, 7]), [np.arange(5), np.arange(30, 33), np.arange(11)])


@pytest.fixture(scope="module")
def out(exporter, task, batch, tmp_path_factory):
    """The folder with the package and the program."""
    out = tmp_path_factory.mktemp("serve")
    make = ["make", "-s", "-C", EXAMPLE, f"PYTHON={sys.executable}", f"OUT={out}"]
    with subprocess.Popen(make) as building:  # beside the export, which compiles too
        exporter.export(task, batch, out / "ranking.pt2")
    assert building.returncode == 0
    return out


def run(out, batch, *, library=OPS_LIBRARY, package="ranking.pt2", environment=()):
    """The program's process, ended; without a variable of this one's environment, so without PATH."""
    file = out / "batch.pt"
    if batch is not None:
        torch.save(batch, file)
    command = [out / "serve", library, out / package, file]
    return subprocess.run(["env", "-i", *environment, *command], text=True, capture_output=True, timeout=120)


def ranked(out, batch):
    """`(users, ranks, items, probabilities)`, a row a line that was printed."""
    done = run(out, batch)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [[kind(row[i]) for row in rows] for i, kind in enumerate((int, int, int, float))]


def clicks(exporter, task, batch, dtype):
    """By the reference, in a dtype."""
    model = exporter.Clicks(task).to(dtype)
    given = [
        batch[name].to(dtype) if batch[name].is_floating_point() else batch[name] for name in exporter.INPUTS
    ]
    with attnrec.use_backend("reference"), torch.inference_mode():
        return model(*given)


def lists(users, counts, task):
    """Random candidates, and what they are asked for."""
    random = np.random.default_rng(len(users))
    return np.array(users), [
        random.choice(len(task.encoded.data.item_names), n, replace=False) for n in counts
    ]


@pytest.mark.parametrize(
    ("users", "counts"),
    [([5, 1, 5, 20], [7, 0, 12, 33]), ([2], [1]), ([9, 4], [40, 40])],
    ids=["several", "one candidate", "as many"],
)
def test_the_scores_are_pythons(users, counts, exporter, task, out):
    users, items = lists(users, counts, task)
    batch = exporter.make_batch(task, users, items)
    of_user, rank, item, probability = ranked(out, batch)
    assert of_user == [user for user, asked in zip(users, items, strict=True) for _ in asked]
    assert rank == [n + 1 for asked in items for n in range(len(asked))]
    # as they were asked: for each user the printed rows back in the candidates' order
    bounds = batch["offsets"].tolist()
    got = torch.empty(len(item))
    for first, end in pairwise(bounds):
        places = {n: row for row, n in enumerate(batch["items"][first:end].tolist(), start=first)}
        assert probability[first:end] == sorted(probability[first:end], reverse=True)
        for row in range(first, end):
            got[places.pop(item[row])] = probability[row]
        assert not places
    plain, exact = (clicks(exporter, task, batch, dtype) for dtype in (torch.float32, torch.float64))
    assert_close_to_reference(got, plain, exact)


def test_a_user_without_events(exporter, task, batch, out):
    nobody = {**batch, "events": batch["events"][:0], "levels": batch["levels"][:0]}
    nobody["event_offsets"] = torch.zeros_like(batch["event_offsets"])
    probability = ranked(out, nobody)[3]
    exact = clicks(exporter, task, nobody, torch.float64)
    torch.testing.assert_close(
        torch.tensor(sorted(probability)), exact.float().sort().values, rtol=1e-5, atol=1e-6
    )


def test_no_python_is_loaded(batch, out):
    done = run(out, batch, environment=["LD_DEBUG=files"])
    assert done.returncode == 0
    loaded = {Path(path).name for path in re.findall(r"calling init: (\S+)", done.stderr)}
    assert {OPS_LIBRARY.name, "libtorch_cpu.so"} <= loaded
    assert any(name.endswith(".wrapper.so") for name in loaded), loaded  # the model's own code
    assert not [name for name in loaded if "python" in name]
    for path in (out / "serve", OPS_LIBRARY):
        said = subprocess.run(["ldd", path], check=True, text=True, capture_output=True).stdout
        assert "libtorch_cpu.so" in said
        assert not re.search(r"^\s*lib\w*python", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"users": lambda x: x.int()}, 'int32 [19], the model takes "users int64 candidates below 24"'),
        ({"statistics": lambda x: x.double()}, "the batch's statistics is float64 [19, 7]"),
        ({"statistics": lambda x: x[:, 1:]}, 'the model takes "statistics float32 candidates 7"'),
        ({"items": lambda x: x[1:]}, 'the model takes "items int64 candidates below 40", candidates = 19'),
        ({"offsets": lambda x: x.flip(0)}, "offsets must"),
        ({"items": lambda x: x + 20}, 'from 20 to 52, the model takes "items int64 candidates below 40"'),
        ({"levels": lambda x: x - 1}, "levels are from -1 to "),
        ({"levels": None}, 'the batch has no "levels"'),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused(changes, words, batch, out):
    changed = {name: changes.get(name, torch.clone) for name in batch}
    done = run(out, {name: change(batch[name]) for name, change in changed.items() if change is not None})
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stdout == ""


def test_files_that_are_not_there_or_something_else(batch, out):
    assert "No such file" in run(out, batch, library="/nowhere/libattnrec_ops.so").stderr
    assert "nothing.pt2: No such file or directory" in run(out, batch, package="nothing.pt2").stderr
    (out / "batch.pt").unlink()
    assert "batch.pt: No such file or directory" in run(out, None).stderr
    (out / "batch.pt").write_text("no tensors")
    assert "batch.pt: want a dict of tensors, as torch.save writes it" in run(out, None).stderr
    assert "batch.pt: want a dict of tensors, as torch.save writes it" in run(out, [torch.ones(2)]).stderr


def test_the_script_and_what_it_says_without_a_run(exporter, tmp_path, capsys):
    data = recommender_data.write(tmp_path / "data")
    with pytest.raises(SystemExit):
        exporter.main(["--data", str(data), "--run", str(tmp_path / "nothing")])
    assert "nothing/ranking/best.safetensors" in capsys.readouterr().err
