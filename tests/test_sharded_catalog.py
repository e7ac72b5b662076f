"""`ShardedCatalog` on one, two and four real processes: the checks are in sharded_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_worker

pytestmark = pytest.mark.cpu_only("processes over gloo")
TESTS = Path(__file__).resolve().parent


def torchrun(ranks, *arguments, timeout=180):
    """Starts the processes on a free port and waits for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder with the findings of so many ranks."""
    folders: dict[int, Path] = {}

    def launch(ranks):
        if ranks not in folders:
            folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
            ended = torchrun(ranks, TESTS / "sharded_worker.py", folders[ranks])
            assert ended.returncode == 0, ended.stderr[-4000:]
        return folders[ranks]

    return launch


@pytest.mark.parametrize("name", sharded_worker.CHECKS)
def test_on_one_rank(name):
    sharded_worker.CHECKS[name]()


@pytest.mark.parametrize("name", sharded_worker.CHECKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_on_ranks(launched, ranks, name):
    for rank in range(ranks):
        said = (launched(ranks) / f"{name}.{rank}").read_text()
        assert said == "", f"rank {rank} of {ranks}:\n{said}"
