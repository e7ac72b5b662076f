"""`catalog_filter`, and `catalog_topk` through a filter: the same ids and scores, bit for bit."""

import pytest
import torch
from helpers import make_offsets
from hypothesis import given, settings
from hypothesis import strategies as st
from runners import RUNNER

import attnrec
from attnrec import ops, reference
from attnrec._extension import extension

INF, NAN = float("inf"), float("nan")
LSE_ERROR = 0.1  # the contract's
ITEMS = 20_000  # above that a filter is used at all

pytestmark = pytest.mark.cpu_only("filters are the CPU's")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["bf16", "int8"]
# Other tiers read the rows.
READS_FILTERS = extension is not None and extension.tier_name() in ("avx512_bf16", "amx_bf16")


def made(rows, kind):
    """A filter as `catalog_topk` takes it."""
    codes, scale, error = ops.call("catalog_filter", rows, kind)
    return {"filter": codes, "filter_scale": scale if kind == "int8" else None, "filter_error": error}


def rounded(codes, scale, rows):
    """What the codes stand for, [N, D] in float64."""
    items, dim = rows.shape
    x = codes.transpose(1, 2).flatten(2).flatten(0, 1)[:items, :dim].double()
    return x if codes.dtype == torch.bfloat16 else (x - 128) * scale.double().unsqueeze(1)


def check(users, rows, k, filters, **options):
    """With and without: all bits of scores and ids, lse within its bound."""
    plain = ops.call("catalog_topk", users, rows, k, **options)
    found = ops.call("catalog_topk", users, rows, k, **filters, **options)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    torch.testing.assert_close(found[2], plain[2], rtol=0, atol=LSE_ERROR, equal_nan=True)
    return found


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exclusions(batch, items, each, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = [0 if b % 3 == 2 else each for b in range(batch)]
    ids = torch.randint(0, items, (sum(counts),), generator=generator)
    return ids, make_offsets(counts)


# --- the filter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("items", "dim"), [(1, 1), (31, 3), (32, 4), (33, 17), (100, 64), (0, 5)])
def test_the_filter_is_the_references(kind, dtype, items, dim):
    rows = normal(items, dim, dtype=dtype)
    found, expected = ops.call("catalog_filter", rows, kind), reference.catalog_filter(rows, kind)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(scale=st.sampled_from([1e-38, 1e-30, 1e-3, 1.0, 1e10, 1e17]), seed=st.integers(0, 1000))
def test_its_errors_are_never_too_small(kind, scale, seed):
    rows = normal(70, 9, seed=seed) * scale
    codes, scales, error = ops.call("catalog_filter", rows, kind)
    lost = (rows.double() - rounded(codes, scales, rows)).norm(dim=1)
    norm = rows.double().norm(dim=1)
    assert (error[:, 0].double() >= lost * (1 - 1e-12)).all()
    assert (error[:, 1].double() >= norm * (1 - 1e-12)).all()
    assert (error[:, 0].double() <= lost * 1.01 + 1e-37).all()
    if scale >= 1e-3:
        assert (lost <= norm * (2**-8 if kind == "bf16" else 0.03)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_bounded_says_so(kind):
    rows = normal(5, 8)
    rows[1, 2], rows[2, 0], rows[3] = NAN, -INF, 1e19
    codes, scales, error = ops.call("catalog_filter", rows, kind)
    assert error[1:4].isinf().all()
    assert not error[[0, 4]].isinf().any()
    assert (rounded(codes, scales, rows)[1:4] == 0).all()


# --- exact through it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 100])
def test_random_catalogues(kind, dtype, k):
    users, rows = normal(11, 48, dtype=dtype), normal(ITEMS + 13, 48, dtype=dtype, seed=1)
    check(users, rows, k, made(rows, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_k_of_thousands(kind):
    items = 150_000
    users, rows = normal(3, 16), normal(items, 16, seed=1)
    check(users, rows, 4096, made(rows, kind))
    check(users, rows[:ITEMS], ITEMS, made(rows[:ITEMS], kind))


@settings(deadline=None)
@given(
    batch=st.integers(0, 20),
    dim=st.sampled_from([1, 3, 8, 17, 64, 100]),
    extra=st.integers(0, 70),
    k=st.integers(0, 300),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    names=st.sets(st.sampled_from(["exclude", "bias", "temperature"])),
    seed=st.integers(0, 2**31),
)
def test_random_sizes(batch, dim, extra, k, kind, dtype, ties, names, seed):
    items = ITEMS + extra
    users, rows = normal(batch, dim, dtype=dtype, seed=seed), normal(items, dim, dtype=dtype, seed=seed + 1)
    options = {}
    if ties:
        users, rows = users.round(), (rows * 2).round()
    if "exclude" in names:
        options["exclude_ids"], options["exclude_offsets"] = exclusions(batch, items, 50, seed)
    if "bias" in names:
        options["bias"] = normal(items, seed=seed + 2)
        options["bias"][:: 7 + extra] = -INF
    if "temperature" in names:
        options["temperature"] = 0.3
    check(users, rows, k, made(rows, kind), **options)


def orders(name, items, dim):
    """Catalogues that make it hard: users of them are positive."""
    place = torch.arange(1.0, items + 1).unsqueeze(1) / items
    rows = normal(items, dim, seed=3)
    return {
        "rising": place.expand(items, dim).contiguous(),
        "falling": place.flip(0).expand(items, dim).contiguous(),
        "all equal": rows[:1].expand(items, dim).contiguous(),
        "clustered norms": rows * (4 * place).ceil(),
        "duplicates": rows[torch.arange(items) % 400],
        "the best in one place": torch.where((place > 0.5) & (place < 0.51), rows.abs() * 4, rows),
        "tiny": rows * 1e-35,
        "zeros": rows * 0,
        "of two sizes": torch.where(torch.arange(items).unsqueeze(1) % 32 == 0, rows * 1e8, rows),
    }[name]


ORDERS = [
    "rising",
    "falling",
    "all equal",
    "clustered norms",
    "duplicates",
    "the best in one place",
    "tiny",
    "zeros",
    "of two sizes",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_adversarial_catalogues(kind, order):
    rows = orders(order, 2 * ITEMS, 24)
    users = normal(9, 24).abs()
    users[4] = 0
    check(users, rows, 70, made(rows, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 2.0, 5.0])
def test_lse_is_within_its_bound_whatever_the_spread(kind, spread):
    rows, users = normal(ITEMS, 64, seed=1), normal(9, 64) * spread
    check(users, rows, 10, made(rows, kind))


@pytest.mark.parametrize("length", [0.6, 1.0, 1.5, 2.0, 3.0, 4.0])
def test_flat_scores_are_served(length):
    """Users in two parts, for whom each panel counts with an error of its own. (A standard deviation of 1 to
    2: with the largest error for all of them the log-sum-exp was beyond its bound.)"""
    rows, users = normal(ITEMS, 64, seed=1), normal(9, 64)
    users = users / users.norm(dim=1, keepdim=True) * length
    found = check(users, rows, 10, made(rows, "int8"))
    if READS_FILTERS:
        plain = ops.call("catalog_topk", users, rows, 10)
        assert (found[2] != plain[2]).sum() >= 8  # the filter's own


@pytest.mark.parametrize("length", [2.0, 2.5])
def test_who_was_promised_too_much_is_served(length):
    """The runs of 4,096 items that go first are better than the others: second parts make up for it."""
    rows, users = normal(ITEMS, 64, seed=1), normal(64, 64)
    rows[torch.arange(ITEMS) // 4096 % 4 == 0] *= 1.3
    users = users / users.norm(dim=1, keepdim=True) * length
    found = check(users, rows, 10, made(rows, "int8"))
    if READS_FILTERS:
        plain = ops.call("catalog_topk", users, rows, 10)
        assert (found[2] != plain[2]).sum() >= 63


@pytest.mark.parametrize("error", [0.06, 0.09, 0.11, 0.15, 0.3])
def test_lse_where_all_errors_add_up(error):
    """Every item is rounded the same way, and against the user: no score is better than its bound."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-20, 21, (ITEMS, 32), generator=generator) + 0.49
    rows[:, 0] = 127
    users = torch.full((1, 32), error / (31 * 0.49))
    found = check(users, rows, 10, made(rows, "int8"))
    if READS_FILTERS and error < 0.1:
        wrong = ops.call("catalog_topk", users, rows, 10)[2] - found[2]
        assert 0.9 * error < wrong.item() < 1.1 * error


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_has_the_users_rounding(kind):
    """Items that the codes hold exactly, so that the users' rounding alone can exchange them: it would, for
    some of these users."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-127, 128, (ITEMS, 32), generator=generator).float()
    rows[:, 0] = 127
    filters, users = made(rows, kind), normal(64, 32)
    assert (filters["filter_error"][:, 0] == 0).all()
    step = users.abs().amax(1, keepdim=True) / 127
    near = users.bfloat16().float() if kind == "bf16" else (users / step).round() * step
    best = check(users, rows, 50, filters)[1].sort(1).values
    assert not torch.equal((near @ rows.T).topk(50).indices.sort(1).values, best)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_has_the_items_rounding(kind):
    """Users that the codes hold exactly, and items that do not differ once they are rounded."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(-127, 128, (16, 32), generator=generator).float()
    users[:, 0] = 127
    rows = normal(100, 32, seed=1).repeat(ITEMS // 100, 1)
    rows += normal(ITEMS, 32, seed=2) * 1e-4
    rows[:, 0] = 4
    filters = made(rows, kind)
    near = rounded(filters["filter"], filters["filter_scale"], rows).float()
    best = check(users, rows, 50, filters)[1].sort(1).values
    assert not torch.equal((users @ near.T).topk(50).indices.sort(1).values, best)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_user_in_two_parts(kind, dtype):
    """Items that the codes hold exactly, and long because of what all have in common: one part of a user
    leaves the log-sum-exp unknown."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-1, 2, (ITEMS, 32), generator=generator).to(dtype)
    rows[:, 0] = 127
    rows, users = rows / 4, normal(64, 32)
    users[:, 0] *= 3
    filters = made(rows, kind)
    assert (filters["filter_error"][:, 0] == 0).all()
    exclude_ids, exclude_offsets = exclusions(64, ITEMS, 500)
    for options in ({}, {"exclude_ids": exclude_ids, "exclude_offsets": exclude_offsets}):
        plain = ops.call("catalog_topk", users.to(dtype), rows, 50, **options)
        found = check(users.to(dtype), rows, 50, filters, **options)
        if dtype == torch.float32 and READS_FILTERS:  # numbers of bf16 need no second part in bf16
            assert (found[2] != plain[2]).sum() > 50  # the filter's own, from rough exponentials
            torch.testing.assert_close(found[2], plain[2], rtol=0, atol=0.035)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinite_rows(kind):
    users, rows = normal(5, 16), normal(ITEMS, 16, seed=1)
    rows[7], rows[9_000, 3], rows[19_999] = NAN, NAN, NAN
    found = check(users, rows, 40, made(rows, kind))
    assert found[2].isnan().all()
    rows = normal(ITEMS, 16, seed=1)
    rows[300, 2], rows[400, 2] = INF, -INF
    check(users, rows, 40, made(rows, kind))
    users[2, 1], users[3, 0] = NAN, INF
    check(users, rows, 40, made(rows, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rubbish", [0, 1, 2])
def test_an_unbounded_item_is_scored_from_its_row_alone(kind, rubbish):
    """Whatever its codes hold, and those behind the last item: room that was never written."""
    users, rows = normal(6, 20), normal(ITEMS + 5, 20, seed=1)
    rows[77] = users[0] * 9
    filters = made(rows, kind)
    filters["filter_error"][[77, 4_000]] = INF
    codes = filters["filter"]
    fill = [NAN, INF, -3.0][rubbish] if kind == "bf16" else [255, 0, 1][rubbish]
    for item in (77, 4_000):
        codes[item // 32, :, item % 32] = fill
        if kind == "int8":
            filters["filter_scale"][item] = [NAN, INF, -1.0][rubbish]
    codes[-1, :, (ITEMS + 5) % 32 :] = fill
    found = check(users, rows, 30, filters)
    assert found[1][0, 0] == 77


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_are_not_returned_whatever_their_codes(kind):
    users, rows = normal(4, 16), normal(ITEMS, 16, seed=1)
    best = attnrec.catalog_topk(users, rows, 200)[1]
    rows[best[1, 0]] = NAN
    ids = torch.cat([best[0, :50].repeat(2).flip(0), best[1, :200], best[2, :0], best[3, ::2]])
    options = {"exclude_ids": ids, "exclude_offsets": make_offsets([100, 200, 0, 100])}
    check(users, rows, 64, made(rows, kind), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_hides_and_lifts(kind):
    users, rows = normal(6, 16), normal(ITEMS, 16, seed=1)
    for bias in (
        torch.full((ITEMS,), -INF),
        torch.where(torch.arange(ITEMS) % 500 == 0, 0.0, -INF),
        torch.where(torch.arange(ITEMS) == 12_345, INF, 0.0),
        torch.where(torch.arange(ITEMS) == 12_345, NAN, 0.0),
        normal(ITEMS) * 1e6,
    ):
        check(users, rows, 60, made(rows, kind), bias=bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_alone_gets_the_same_bits(kind):
    users, rows = normal(300, 24), normal(ITEMS, 24, seed=1)
    filters = made(rows, kind)
    together = ops.call("catalog_topk", users, rows, 33, **filters)
    for some in ([0], [299], [50, 7], [*range(40, 57)]):
        scores, ids, lse = ops.call("catalog_topk", users[some], rows, 33, **filters)
        assert torch.equal(scores, together[0][some])
        assert torch.equal(ids, together[1][some])
        torch.testing.assert_close(lse, together[2][some], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_any_number_of_threads(kind, threads):
    users, rows = normal(40, 24), normal(ITEMS, 24, seed=1)
    filters, results = made(rows, kind), []
    for n in RUNNER.threads:
        threads(n)
        results.append(ops.call("catalog_topk", users, rows, 50, **filters))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_replaced_and_appended_in_place(kind):
    users, rows = normal(6, 20), normal(ITEMS, 20, seed=1)
    filters = made(rows, kind)
    ids = torch.tensor([0, 31, 32, 9_999, ITEMS - 1])
    new = users[:5] * 3
    rows[ids] = new
    codes, scale, error = ops.call("catalog_filter", new, kind)
    for j, i in enumerate(ids.tolist()):
        filters["filter"][i // 32, :, i % 32] = codes[j // 32, :, j % 32]
        filters["filter_error"][i] = error[j]
        if kind == "int8":
            filters["filter_scale"][i] = scale[j]
    found = check(users, rows, 20, filters)
    assert set(ids.tolist()) <= set(found[1].flatten().tolist())


BAD = [
    ("filter", lambda f: f["filter"][:-1], "filter must have shape"),
    ("filter", lambda f: f["filter"].transpose(1, 2).contiguous(), "filter must have shape"),
    ("filter", lambda f: f["filter"].float(), "filter must be"),
    (
        "filter",
        lambda f: f["filter"].transpose(1, 2).contiguous().transpose(1, 2),
        "filter must be contiguous",
    ),
    ("filter_scale", lambda f: None, "filter_scale must be"),
    ("filter_scale", lambda f: f["filter_scale"][:-1], "filter_scale must"),
    ("filter_error", lambda f: None, "filter_error must be"),
    ("filter_error", lambda f: f["filter_error"][:-1], "filter_error must"),
    ("filter_error", lambda f: f["filter_error"].float(), "filter_error must be"),
    ("filter", lambda f: None, "filter_scale must be left out"),
]


@pytest.mark.parametrize(("name", "change", "words"), BAD)
def test_a_filter_of_another_catalogue_is_refused(name, change, words):
    users, rows = normal(2, 8), normal(100, 8)
    filters = made(rows, "int8")
    with pytest.raises((ValueError, TypeError), match=words):
        ops.call("catalog_topk", users, rows, 3, **(filters | {name: change(filters)}))
    with pytest.raises(RuntimeError, match=name):
        torch.ops.attnrec.catalog_topk(users, rows, 3, **(filters | {name: change(filters)}))


def test_catalog_filter_refuses():
    with pytest.raises(ValueError, match="dtype must be 'bf16' or 'int8', got 'int4'"):
        ops.call("catalog_filter", normal(3, 4), "int4")
    with pytest.raises(ValueError, match="rows must have shape"):
        ops.call("catalog_filter", normal(3), "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    rows = normal(40, 6)
    torch.library.opcheck(torch.ops.attnrec.catalog_filter.default, (rows, kind))
    torch.library.opcheck(torch.ops.attnrec.catalog_topk.default, (normal(2, 6), rows, 3), made(rows, kind))
