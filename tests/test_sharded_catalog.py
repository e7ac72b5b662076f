"""`ShardedCatalog` on one, two and four real processes: the checks are in sharded_worker.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
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
def folder(tmp_path_factory):
    """Where all of them find what one process, then two, then four saved."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded_worker.save_all(folder / "saved-1")
    return folder


@pytest.fixture(scope="module")
def launched(folder):
    """Runs the checks on so many ranks, once."""
    done: set[int] = set()

    def launch(ranks):
        if ranks not in done:
            if ranks == 4:
                launch(2)  # whose files they load
            ended = torchrun(ranks, TESTS / "sharded_worker.py", folder)
            assert ended.returncode == 0, ended.stderr[-4000:]
            findings = folder / f"ranks-{ranks}"
            findings.mkdir()
            for name in sharded_worker.CHECKS:
                for rank in range(ranks):
                    (folder / f"{name}.{rank}").rename(findings / f"{name}.{rank}")
            done.add(ranks)
        return folder / f"ranks-{ranks}"

    return launch


@pytest.mark.parametrize("name", sharded_worker.CHECKS)
def test_on_one_rank(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_worker, "FOLDER", tmp_path)
    sharded_worker.CHECKS[name]()


@pytest.mark.parametrize("name", sharded_worker.CHECKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_on_ranks(launched, ranks, name):
    for rank in range(ranks):
        said = (launched(ranks) / f"{name}.{rank}").read_text()
        assert said == "", f"rank {rank} of {ranks}:\n{said}"


def test_four_ranks_checkpoint_on_one(launched, folder):
    launched(2)  # whose checkpoint the four have loaded
    launched(4)
    sharded_worker.load_all(folder / "saved-4")


def test_a_killed_rank_ends_the_run_under_torchrun(tmp_path):
    started = time.monotonic()
    ended = torchrun(2, TESTS / "sharded_worker.py", tmp_path, "killed")
    assert ended.returncode != 0
    assert "Signal 9 (SIGKILL)" in ended.stderr
    assert time.monotonic() - started < 60  # of which the start takes the most


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_rank_is_an_error_on_the_others_within_the_timeout(how, tmp_path):
    """Without torchrun, which would end the others itself."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, TESTS / "sharded_worker.py", tmp_path, how],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
            },
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[0].wait(timeout=120) != 0
        waited, said = (tmp_path / f"{how}.0").read_text().split("\n", 1)
        assert float(waited) < 2 * sharded_worker.LOST_TIMEOUT
        assert said
    finally:
        for process in ranks:
            process.kill()
            process.wait()
