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

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_to_reference, make_offsets, outputs_and_grads
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import attnrec
from attnrec import ShardedCatalog, reference
from attnrec.catalog import sharded_checkpoint
from attnrec.catalog.sharded_group import Group, disconnect

RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
INF, NAN = float("inf"), float("nan")
IGNORED = -100
LOST_TIMEOUT = 5  # seconds
FOLDER = Path()  # where the checks write
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(*shape, seed=0, largest=3, dtype=torch.float32):
    """Products and sums of them are exact, and there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def uneven(total):
    """Where the ranks' rows start: a large share, none, the rest."""
    cuts = {1: [], 2: [total], 4: [total - total // 3, total - total // 3, total - total // 9]}[RANKS]
    return [0, *cuts, total]


def even(total):
    chunk = -(-total // RANKS)
    return [min(rank * chunk, total) for rank in range(RANKS + 1)]


def catalogues(table):
    """The same catalogue, made in every way."""
    yield ShardedCatalog(table)
    starts = uneven(len(table))
    yield ShardedCatalog.from_rows(table[starts[RANK] : starts[RANK + 1]])
    if RANKS > 1:
        yield ShardedCatalog(distribute_tensor(table, init_device_mesh("cpu", (RANKS,)), [Shard(0)]))


def own(x, starts=None):
    """This rank's part of the rows of x."""
    starts = even(len(x)) if starts is None else starts
    return x[starts[RANK] : starts[RANK + 1]]


def exclusions(batch, items, seed=0):
    counts = [0 if b % 3 == 2 else (7 * b + seed) % (2 * items + 1) for b in range(batch)]
    return torch.randint(
        0, items, (sum(counts),), generator=torch.Generator().manual_seed(seed)
    ), make_offsets(counts)


def assert_same_lists(got, want):
    for x, y, what in zip(got[:2], want[:2], ("scores", "ids"), strict=True):
        assert x.dtype == y.dtype, what
        assert torch.equal(x, y), f"{what}: {x} is not {y}"
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5, equal_nan=True)


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


def assert_raises(error, words, function, *args, **kwargs):
    with pytest.raises(error, match=words):
        function(*args, **kwargs)


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
                    assert_same_lists(catalog.topk(users, k, **options), want)


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
    assert_raises(ValueError, "ids must be from 0", catalog.lookup, torch.tensor([-1]))


# --- cross-entropy ------------------------------------------------------------------------------------------


def loss_arguments(rows, items, dim, dtype=torch.float32, names=(), ignore_index=IGNORED, seed=0):
    users = (normal(rows, dim, seed=seed, dtype=torch.float64) * 2 / dim**0.5).to(dtype)
    table = normal(items, dim, seed=seed + 1, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, items, (rows,), generator=generator)
    if "ignored" in names:
        target = target.masked_fill(torch.rand(rows, generator=generator) < 0.3, ignore_index)
    options = {"ignore_index": ignore_index}
    if "bias" in names:
        options["bias"] = normal(items, seed=seed + 2, dtype=torch.promote_types(dtype, torch.float32))
    if "hidden" in names:
        options["bias"] = options["bias"].masked_fill(torch.arange(items) % 5 == 0, -INF)
        target = torch.where((target % 5 == 0) & (target != ignore_index), target + 1, target)
        table[0] = NAN
    if "logq" in names:
        options["logq"] = normal(items, seed=seed + 3, dtype=dtype)
    if "temperature" in names:
        options["temperature"] = 0.4
    if "label_smoothing" in names:
        options["label_smoothing"] = 0.15
    return (users, table, target), options


def whole(x):
    """The ranks' parts of a gradient, which are zero elsewhere, put together."""
    return Group().gather(x).sum(0)


def of_whole_table(users, table, target, **options):
    return ShardedCatalog(table).cross_entropy(users, target, reduction="none", **options)


def of_rows(users, table, target, **options):
    rows = own(table, uneven(len(table)))
    return ShardedCatalog.from_rows(rows).cross_entropy(users, target, reduction="none", **options)


NAMES = (
    (),
    ("bias",),
    ("ignored", "logq"),
    ("bias", "hidden"),
    ("bias", "logq", "temperature", "ignored"),
    ("label_smoothing", "temperature"),
    ("label_smoothing", "bias", "logq", "ignored"),
)
SIZES = ((40, 1), (40, 7), (33, 130), (50, 1100))


def exact_and_plain(arguments, options):
    """Loss and gradients by the reference, in float64 and in the given dtype."""
    how = {"differentiate": (0,), "without_grad": ("logq",)}
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    wide_options = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    exact = outputs_and_grads(reference.catalog_cross_entropy, wide, wide_options, **how)
    plain = outputs_and_grads(reference.catalog_cross_entropy, arguments, options, **how)
    return exact, plain


@check
def loss_and_gradients_are_those_of_one_process():
    for (rows, items), names in ((size, names) for size in SIZES for names in NAMES):
        if items == 1 and {"hidden", "label_smoothing"} & set(names):  # nothing left, or a gradient of 0
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float64) if items == 130 else (torch.float32,):
            arguments, options = loss_arguments(rows, items, 12, dtype, names)
            exact, plain = exact_and_plain(arguments, options)
            for function in (of_whole_table, of_rows):
                how = {"differentiate": (0,), "without_grad": ("logq",)}
                got, grads = outputs_and_grads(function, arguments, options, **how)
                what = f"{function.__name__} {rows} x {items} {dtype} {names}"
                assert_close_to_reference(got[0], plain[0][0], exact[0][0], what=f"loss, {what}")
                for name, grad in grads.items():
                    grad = grad if name == "0" else whole(grad)
                    assert_close_to_reference(
                        grad, plain[1][name], exact[1][name], factor=3, what=f"gradient of {name}, {what}"
                    )


@check
def each_ranks_own_users():
    for names in NAMES:
        (users, table, target), options = loss_arguments(29, 130, 12, names=names)
        starts = uneven(29)
        for reduction in ("mean", "sum", "none"):
            leaves = [x.clone().requires_grad_() for x in (users, table)]
            want = attnrec.catalog_cross_entropy(*leaves, target, reduction=reduction, **options)
            want.sum().backward()
            mine = [x.clone().requires_grad_() for x in (own(users, starts), table)]
            got = ShardedCatalog(mine[1]).cross_entropy(
                mine[0], own(target, starts), reduction=reduction, own_users=True, **options
            )
            got.sum().backward()
            close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
            torch.testing.assert_close(got, own(want, starts) if reduction == "none" else want, **close)
            torch.testing.assert_close(mine[0].grad, own(leaves[0].grad, starts), **close)
            torch.testing.assert_close(whole(mine[1].grad), leaves[1].grad, **close)


@check
def ignored_rows_and_every_ignore_index():
    for ignore_index in (-1, 0, 3):
        arguments, options = loss_arguments(40, 30, 8, names=("ignored", "bias"), ignore_index=ignore_index)
        want = attnrec.catalog_cross_entropy(*arguments, **options)
        torch.testing.assert_close(
            ShardedCatalog(arguments[1]).cross_entropy(arguments[0], arguments[2], **options), want
        )
    users = normal(4, 8).requires_grad_()
    nothing = ShardedCatalog(normal(30, 8)).cross_entropy(users, torch.full((4,), IGNORED), reduction="sum")
    nothing.backward()
    assert nothing == 0
    assert (users.grad == 0).all()


@check
def only_the_gradients_that_are_asked_for():
    (users, table, target), options = loss_arguments(20, 50, 8, names=("bias",))
    full = [
        users.clone().requires_grad_(),
        table.clone().requires_grad_(),
        options["bias"].clone().requires_grad_(),
    ]
    ShardedCatalog(full[1]).cross_entropy(full[0], target, bias=full[2]).backward()
    for needed in range(3):
        some = [x.detach().clone().requires_grad_(i == needed) for i, x in enumerate(full)]
        ShardedCatalog(some[1]).cross_entropy(some[0], target, bias=some[2]).backward()
        for i, (x, y) in enumerate(zip(some, full, strict=True)):
            assert x.grad is None if i != needed else torch.equal(x.grad, y.grad)


@check
def two_runs_are_bitwise_equal():
    arguments, options = loss_arguments(64, 1100, 16, names=("bias", "logq", "label_smoothing"))
    found = []
    for _ in range(2):
        how = {"differentiate": (0,), "without_grad": ("logq",)}
        got, grads = outputs_and_grads(of_whole_table, arguments, options, **how)
        found.append([got[0], *grads.values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    for x in (found[0][0], found[0][1]):  # loss and the users' gradient: every rank has the same
        assert all(torch.equal(x, other) for other in Group().gather(x))


@check
def gradient_of_a_dtensor():
    (users, table, target), _ = loss_arguments(20, 50, 8)
    leaf = table.clone().requires_grad_()
    attnrec.catalog_cross_entropy(users, leaf, target).backward()
    if RANKS > 1:
        sharded = distribute_tensor(table, init_device_mesh("cpu", (RANKS,)), [Shard(0)]).requires_grad_()
        ShardedCatalog(sharded).cross_entropy(users, target).backward()
        assert isinstance(sharded.grad, DTensor)
        torch.testing.assert_close(sharded.grad.to_local(), own(leaf.grad), rtol=1e-5, atol=1e-6)


@check
def a_second_derivative_is_refused():
    (users, table, target), _ = loss_arguments(5, 20, 8)
    users.requires_grad_()
    loss = ShardedCatalog(table).cross_entropy(users, target)
    assert_raises(NotImplementedError, "second-order", torch.autograd.grad, loss, users, create_graph=True)


@check
def lookups_and_their_gradients():
    table = normal(30, 8)
    ids = torch.tensor([29, 0, 7, 7, 3, 0, 15, 22])
    weight = normal(8, 8, seed=1)
    leaf = table.clone().requires_grad_()
    (torch.nn.functional.embedding(ids, leaf) * weight).sum().backward()
    starts = uneven(8)
    for own_ids in (False, True):
        mine = table.clone().requires_grad_()
        some_ids, some_weight = (own(ids, starts), own(weight, starts)) if own_ids else (ids, weight)
        found = ShardedCatalog(mine).lookup(some_ids, own_ids=own_ids)
        assert torch.equal(found, table[some_ids])
        (found * some_weight).sum().backward()
        torch.testing.assert_close(whole(mine.grad), leaf.grad)


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
