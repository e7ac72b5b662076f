"""Checks of a sharded catalogue's cross-entropy and look-ups, for sharded_worker.py."""

from __future__ import annotations

import torch
from helpers import assert_close_to_reference, outputs_and_grads
from helpers_sharded import IGNORED, RANKS, assert_raises, check, normal, own, uneven
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import attnrec
from attnrec import ShardedCatalog, reference
from attnrec.catalog.sharded_group import Group

INF, NAN = float("inf"), float("nan")


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
def ignored_rows_are_not_computed_with():
    """A NaN in them reaches nothing, and one in an item does not reach them."""
    for names in (("ignored", "bias"), ("ignored", "label_smoothing")):
        (users, table, target), options = loss_arguments(20, 50, 8, names=names)
        ignored = target == IGNORED
        assert ignored.any()
        want, got = table.clone().requires_grad_(), table.clone().requires_grad_()
        attnrec.catalog_cross_entropy(users, want, target, **options).backward()
        spoilt = users.masked_fill(ignored.unsqueeze(-1), NAN).requires_grad_()
        ShardedCatalog(got).cross_entropy(spoilt, target, **options).backward()
        assert spoilt.grad.isfinite().all()
        torch.testing.assert_close(own(got.grad), own(want.grad))
        table[0] = NAN
        users.requires_grad_()
        ShardedCatalog(table).cross_entropy(users, target, **options).backward()
        assert (users.grad[ignored] == 0).all()
        assert users.grad[~ignored].isnan().any()


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
