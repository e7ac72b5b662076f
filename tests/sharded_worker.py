"""One rank of test_sharded_catalog.py: does every check and writes what it found as files.

    torchrun --nproc-per-node 2 tests/sharded_worker.py FOLDER [killed|stopped]

Each rank writes `FOLDER/<check>.<rank>`: empty where the check passed, else the traceback. Starting processes
takes seconds, so that one launch does them all. Imported, the checks run on one rank, without torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import make_offsets
from helpers_sharded import (
    CHECKS,
    RANK,
    RANKS,
    assert_raises,
    assert_same_lists,
    catalogues,
    check,
    even,
    exclusions,
    integers,
    normal,
    own,
    uneven,
)
from sharded_loss_checks import loss_arguments  # and its checks are among CHECKS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import attnrec
from attnrec import ShardedCatalog
from attnrec.catalog import sharded_checkpoint
from attnrec.catalog.sharded_group import disconnect

INF, NAN = float("inf"), float("nan")
LOST_TIMEOUT = 5  # seconds
FOLDER = Path()  # where the checks write


# --- making one ---------------------------------------------------------------------------------------------


@check
def rows_are_where_they_belong():
    for total in (0, 1, 3, 5, 64):
        table = normal(total, 8)
        for catalog, starts in zip(
            catalogues(table), (even(total), uneven(total), even(total)), strict=False
        ):
            assert len(catalog) == total
            assert list(catalog.starts) == starts
            assert torch.equal(catalog.rows, own(table, starts))
            assert f"rank {RANK} of {RANKS}" in repr(catalog)


@check
def bad_tables_are_refused():
    for wrong, error, words in (
        (torch.zeros(3), ValueError, r"table must have shape \[N, D\] = \[any, any\], got \[3\]"),
        (torch.zeros(3, 2, dtype=torch.long), TypeError, "table must be float32 or"),
        ([[1.0]], TypeError, "table must be a tensor, got list"),
    ):
        assert_raises(error, words, ShardedCatalog, wrong)
        assert_raises(error, words, ShardedCatalog.from_rows, wrong)
    assert_raises(
        ValueError, "dtype must be one of fp32, bf16, int8", ShardedCatalog, normal(4, 8), dtype="x"
    )
    if RANKS > 1:  # one rank's are wrong, and every rank says so
        assert_raises(
            ValueError,
            "one width and dtype, got rank 0 2 x 8",
            ShardedCatalog.from_rows,
            normal(2, 8 + RANK // 1),
        )
        mesh = init_device_mesh("cpu", (RANKS,))
        columns = distribute_tensor(normal(4, 8), mesh, [Shard(1)])
        assert_raises(ValueError, r"Shard\(0\)", ShardedCatalog, columns)


# --- top-k --------------------------------------------------------------------------------------------------


@check
def topk_is_bitwise_that_of_one_process():
    for total, dim, dtype in (
        (1, 8, torch.float32),
        (3, 16, torch.float32),
        (37, 16, torch.bfloat16),
        (700, 20, torch.float32),
        (5000, 64, torch.float32),
        (1030, 64, torch.bfloat16),
    ):
        table, users = normal(total, dim, dtype=dtype), normal(6, dim, seed=1, dtype=dtype)
        bias = normal(total, seed=2).masked_fill(torch.arange(total) % 7 == 3, -INF)
        for options in ({}, {"exclude": exclusions(6, total), "bias": bias, "temperature": 0.3}):
            for k in {0, 1, min(30, total), total if total < 1000 else 200}:
                want = attnrec.catalog_topk(users, table, k, **options)
                for catalog in catalogues(table):
                    assert_same_lists(catalog.topk(users, np.int64(k), **options), want)


@check
def filters_change_nothing_but_the_lse():
    table, users = normal(3000, 32), normal(6, 32, seed=1)
    scores, ids, lse = attnrec.catalog_topk(users, table, 40)
    for dtype in ("bf16", "int8"):
        got = ShardedCatalog(table, dtype=dtype).topk(users, 40)
        assert torch.equal(got[0], scores)
        assert torch.equal(got[1], ids)
        assert (got[2] - lse).abs().max() <= 0.1


@check
def rows_that_an_optimizer_changes_are_filtered_anew():
    """A filter of the old rows would hide the new ones."""
    old, new, users = normal(20_000, 32), normal(20_000, 32, seed=2), normal(6, 32, seed=1)
    want = attnrec.catalog_topk(users, new, 40)
    for dtype in ("fp32", "bf16", "int8"):
        rows = own(old).clone().requires_grad_()
        catalog = ShardedCatalog.from_rows(rows, dtype=dtype)
        catalog.topk(users, 40)
        with torch.no_grad():
            rows.copy_(own(new))
        got = catalog.topk(users, 40)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@check
def equal_scores_come_by_the_lower_id():
    table, users = integers(300, 4, largest=1), integers(5, 4, seed=1, largest=1)
    table[150:] = table[:150]
    for options in ({}, {"exclude": exclusions(5, 300)}):
        want = attnrec.catalog_topk(users, table, 120, **options)
        for catalog in catalogues(table):
            assert_same_lists(catalog.topk(users, 120, **options), want)


@check
def nan_and_infinite_rows():
    table, users = normal(50, 8), normal(4, 8, seed=1)
    table[[3, 30, 49]] = NAN
    table[7, 0] = INF
    want = attnrec.catalog_topk(users, table, 50)
    for catalog in catalogues(table):
        assert_same_lists(catalog.topk(users, 50), want)
    everything = (torch.arange(50).repeat(4), make_offsets([50] * 4))
    for catalog in catalogues(table):
        scores, ids, lse = catalog.topk(users, 3, exclude=everything)
        assert (scores == -INF).all()
        assert (ids == -1).all()
        assert (lse == -INF).all()


@check
def topk_of_each_ranks_own_users():
    table = normal(90, 8)
    users = normal(11, 8, seed=1)
    ids, offsets = exclusions(11, 90)
    starts = uneven(11)
    first, last = starts[RANK], starts[RANK + 1]
    mine = (ids[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first])
    want = attnrec.catalog_topk(users, table, 12, exclude=(ids, offsets))
    plain = attnrec.catalog_topk(users, table, 12)
    for catalog in catalogues(table):
        got = catalog.topk(users[first:last], 12, exclude=mine, own_users=True)
        assert_same_lists(got, [x[first:last] for x in want])
        assert_same_lists(catalog.topk(users[first:last], 12, own_users=True), [x[first:last] for x in plain])


@check
def a_bias_may_be_whole_or_a_part():
    table, users, bias = normal(40, 8), normal(3, 8, seed=1), normal(40, seed=2)
    want = attnrec.catalog_topk(users, table, 9, bias=bias)
    catalog = ShardedCatalog(table)
    assert_same_lists(catalog.topk(users, 9, bias=own(bias)), want)
    if RANKS > 1:
        sharded = distribute_tensor(bias, init_device_mesh("cpu", (RANKS,)), [Shard(0)])
        assert_same_lists(catalog.topk(users, 9, bias=sharded), want)


@check
def bad_questions_are_refused():
    catalog, users = ShardedCatalog(normal(20, 8)), normal(3, 8)
    assert_raises(
        ValueError, "k must be from 0 to the size of the catalogue N = 20, got 21", catalog.topk, users, 21
    )
    assert_raises(TypeError, "k must be an integer", catalog.topk, users, 2.0)
    assert_raises(ValueError, r"users must have shape \[B, D\] = \[any, 8\]", catalog.topk, users[:, :4], 2)
    assert_raises(TypeError, "users must be float32", catalog.topk, users.double(), 2)
    assert_raises(ValueError, r"bias must have shape \[N\] = \[20\]", catalog.topk, users, 2, bias=normal(21))
    outside = (torch.tensor([20]), make_offsets([1, 0, 0]))
    assert_raises(
        ValueError, "exclude ids must be from 0 to the last item", catalog.topk, users, 2, exclude=outside
    )
    assert_raises(TypeError, "exclude must be a pair", catalog.topk, users, 2, exclude=torch.tensor([1]))
    target = torch.tensor([0, 20, 1])
    loss = catalog.cross_entropy
    assert_raises(ValueError, r"target must be from 0 .*\(19\), got 20 at position 1", loss, users, target)
    assert_raises(ValueError, "negatives must be None.*lookup", loss, users, target, negatives="in-batch")
    assert_raises(ValueError, "reduction must be", loss, users, target, reduction="median")
    assert_raises(
        ValueError, "temperature must be finite and above 0", loss, users, target - 1, temperature=0.0
    )
    assert_raises(ValueError, "logq must not require", loss, users, target, logq=normal(20).requires_grad_())
    assert_raises(ValueError, "label_smoothing must be from 0 to 1", loss, users, target, label_smoothing=2.0)
    assert_raises(TypeError, "ignore_index must be an integer", loss, users, target, ignore_index=None)
    assert_raises(ValueError, "ids must be from 0", catalog.lookup, torch.tensor([-1]))


# --- changing, files ----------------------------------------------------------------------------------------


def assert_answers_as(catalog, table):
    users, k = normal(5, table.shape[1], seed=9).to(table.dtype), min(20, len(table))
    assert len(catalog) == len(table)
    assert_same_lists(catalog.topk(users, k), attnrec.catalog_topk(users, table, k))


@check
def update_append_and_balance():
    table = normal(40, 8)
    for catalog in catalogues(table):
        now = table.clone()
        ids = torch.tensor([39, 0, 13, 0, 27])
        now[ids[1:]] = new = normal(5, 8, seed=1)[1:]
        now[39] = normal(5, 8, seed=1)[0]
        now[0] = new[2]  # the last of the repeated ones
        catalog.update(ids, normal(5, 8, seed=1))
        assert_answers_as(catalog, now)
        assert torch.equal(catalog.lookup(torch.arange(40)), now)
        for count in (1, 30, 0):
            more = normal(count, 8, seed=2)
            assert catalog.append(more) == range(len(now), len(now) + count)
            now = torch.cat([now, more])
            assert_answers_as(catalog, now)
        assert catalog.starts[:-1] == (catalog.starts[0], *catalog.starts[1:-1])
        catalog.balance()
        assert list(catalog.starts) == even(71)
        assert torch.equal(catalog.rows, own(now))
        assert_answers_as(catalog, now)
    assert torch.equal(table, normal(40, 8))  # what was given is not written
    trained = ShardedCatalog(table.clone().requires_grad_())
    if len(trained.rows):
        assert_raises(ValueError, "have a gradient", trained.append, normal(1, 8))
    assert_raises(
        ValueError, "ids must be from 0", ShardedCatalog(table).update, torch.tensor([40]), normal(1, 8)
    )


def tables():
    return {
        "a": normal(37, 16, dtype=torch.bfloat16),
        "b": normal(5, 8, dtype=torch.float64),
        "c": normal(0, 8),
    }


def save_all(folder):
    for name, table in tables().items():
        ShardedCatalog(table).save(folder / name)


def load_all(folder):
    for name, table in tables().items():
        catalog = ShardedCatalog.load(folder / name)
        assert list(catalog.starts) == even(len(table))
        assert torch.equal(catalog.rows, own(table))
        assert catalog.rows.dtype == table.dtype


@check
def saved_and_loaded():
    assert_raises(FileNotFoundError, "no checkpoint", ShardedCatalog.load, FOLDER / "nothing")
    save_all(FOLDER / f"saved-{RANKS}")
    load_all(FOLDER / f"saved-{RANKS}")
    from_ranks = FOLDER / f"saved-{RANKS // 2}"  # 1 to 2, 2 to 4
    if RANKS > 1:
        load_all(from_ranks)


@check
def saved_with_uneven_rows():
    table, more = normal(30, 8), normal(17, 8, seed=1)
    for number, catalog in enumerate(catalogues(table)):
        catalog.append(more)
        catalog.save(FOLDER / f"uneven-{RANKS}-{number}")
        loaded = ShardedCatalog.load(FOLDER / f"uneven-{RANKS}-{number}")
        assert torch.equal(loaded.rows, own(torch.cat([table, more])))


@check
def a_failed_write_leaves_the_old_checkpoint():
    folder, old, new = FOLDER / f"failed-{RANKS}", normal(20, 8), normal(24, 8, seed=1)
    ShardedCatalog(old).save(folder)

    def full(*_, **__):
        raise OSError("No space left on device")

    for place, name, rank in (
        (torch.distributed.checkpoint.HuggingFaceStorageWriter, "write_data", RANKS - 1),
        (sharded_checkpoint, "write_file", 0),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if rank == RANK:
                patch.setattr(place, name, full)
            assert_raises(
                RuntimeError, f"could not be written: on rank {rank}", ShardedCatalog(new).save, folder
            )
        assert torch.equal(ShardedCatalog.load(folder).rows, own(old))
    ShardedCatalog(new).save(folder)  # over what the failed ones left
    assert torch.equal(ShardedCatalog.load(folder).rows, own(new))
    assert sorted(x.name for x in folder.iterdir()) == ["000001", "current"]


# --- processes ----------------------------------------------------------------------------------------------


def run_checks() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, function in CHECKS.items():
        dist.barrier()
        try:
            function()
            said = ""
        except Exception:
            said = traceback.format_exc()
        (FOLDER / f"{name}.{RANK}").write_text(said)
    disconnect()


def lose_a_rank(how: str) -> None:
    """The last rank ends in the middle of a loop; the others write how long they waited, and the error."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=LOST_TIMEOUT))
    (users, table, target), _ = loss_arguments(30, 40, 8)
    catalog = ShardedCatalog(table.requires_grad_())
    for step in range(1000):
        if step == 5 and RANK == RANKS - 1:
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
        started = time.monotonic()
        try:
            catalog.cross_entropy(users, target).backward()
        except Exception as error:
            (FOLDER / f"{how}.{RANK}").write_text(f"{time.monotonic() - started}\n{error}")
            raise


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)  # and poisoned memory, as in conftest.py
    torch.utils.deterministic.fill_uninitialized_memory = True
    FOLDER = Path(sys.argv[1])
    run_checks() if len(sys.argv) == 2 else lose_a_rank(sys.argv[2])
