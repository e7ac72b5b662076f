"""`catalog_topk` against sorting the scores, and what its contract says beside the numbers."""

import pytest
import torch
from helpers import DTYPES, assert_close_to_reference, make_offsets
from hypothesis import given
from hypothesis import strategies as st
from runners import RUNNER

import attnrec
from attnrec import reference

INF, NAN = float("inf"), float("nan")
BEYOND_GPU_KERNELS = pytest.param(300, marks=pytest.mark.cpu_only("head dims above 256"))


def by_sorting(users, catalog, k, *, exclude=None, bias=None, temperature=1.0):
    """The reference in float64."""
    ids, offsets = (None, None) if exclude is None else exclude
    bias = None if bias is None else bias.double()
    return reference.catalog_topk(
        users.double(),
        catalog.double(),
        k,
        exclude_ids=ids,
        exclude_offsets=offsets,
        bias=bias,
        temperature=temperature,
    )


def integers(*shape, dtype=torch.float32, seed=0, largest=3):
    """Small integers: every product and sum of them is exact, and there are many ties."""
    generator = torch.Generator(RUNNER.device).manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def exclusions(batch, items, most, seed=0, dtype=torch.int64):
    """Up to `most` ids a user, in any order, with repeats; every third user has none."""
    generator = torch.Generator(RUNNER.device).manual_seed(seed)
    most = most if items else 0
    drawn = torch.randint(0, most + 1, (batch,), generator=generator).tolist()
    counts = [0 if b % 3 == 2 else count for b, count in enumerate(drawn)]
    ids = torch.randint(0, max(items, 1), (sum(counts),), generator=generator)
    return ids.to(dtype), make_offsets(counts, dtype)


def options_for(names, batch, items, seed=0):
    """Options by name; a bias of integers, so that scores stay exact."""
    options = {}
    if "exclude" in names:
        options["exclude"] = exclusions(batch, items, 40, seed)
    if "bias" in names:
        hidden = torch.rand(items, generator=torch.Generator(RUNNER.device).manual_seed(seed)) < 0.1
        options["bias"] = integers(items, seed=seed + 1, largest=5).masked_fill(hidden, -INF)
    if "temperature" in names:
        options["temperature"] = 0.07
    return options


def check_exactly(users, catalog, k, **options):
    scores, ids, lse = attnrec.catalog_topk(users, catalog, k, **options)
    exact_scores, exact_ids, exact_lse = by_sorting(users, catalog, k, **options)
    wide = torch.float64 if users.dtype == torch.float64 else torch.float32
    assert (scores.dtype, ids.dtype, lse.dtype) == (wide, torch.int64, wide)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(scores, exact_scores.to(wide), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse.to(wide), rtol=1e-5, atol=1e-5)
    return scores, ids, lse


OPTIONS = [
    (),
    ("exclude",),
    ("bias",),
    ("temperature",),
    ("exclude", "bias"),
    ("exclude", "bias", "temperature"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", OPTIONS, ids=lambda names: "+".join(names) or "plain")
def test_exact_with_many_ties(dtype, names):
    users, catalog = integers(7, 12, dtype=dtype), integers(700, 12, dtype=dtype, seed=1)
    check_exactly(users, catalog, 50, **options_for(names, 7, 700))


@pytest.mark.parametrize("items", [1, 2, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("batch", [1, 17])
def test_sizes_around_tiles_and_chunks(items, batch):
    users, catalog = integers(batch, 8, seed=2), integers(items, 8, seed=3)
    for k in {0, 1, min(10, items), items}:
        check_exactly(users, catalog, k, **options_for(("exclude", "bias", "temperature"), batch, items))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_the_catalog_counts(dtype):
    """Scores far below 0, which is that of a row of zeros, with which nothing else would count."""
    for n in (19, 37, 56):
        users, catalog = (
            integers(n, 4, dtype=dtype, largest=1),
            integers(n, 4, dtype=dtype, seed=1, largest=1),
        )
        users[:, 0], catalog[:, 0] = 5, -5
        check_exactly(users, catalog, 1)


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 255, 256, 257, 600])
def test_batches_around_groups_of_rows(batch):
    batch, items = min(batch, RUNNER.smaller(600)), max(1000, RUNNER.smaller(3000))
    users, catalog = integers(batch, 8, seed=4), integers(items, 8, seed=5)
    exclude = exclusions(batch, items, 40)
    check_exactly(users, catalog, 20, exclude=exclude, temperature=5.0)  # all scores count in lse


@pytest.mark.parametrize("dim", [1, 3, 8, 15, 16, 17, 33, 64, 100, 128, 256, BEYOND_GPU_KERNELS])
def test_every_dim(dim):
    check_exactly(integers(5, dim, seed=6), integers(1100, dim, seed=7), 30)


@given(
    batch=st.integers(0, 20),
    items=st.integers(0, 400),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    names=st.sampled_from(OPTIONS),
    seed=st.integers(0, 2**31),
)
def test_random_sizes(batch, items, share, dtype, names, seed):
    users, catalog = (
        integers(batch, 8, dtype=dtype, seed=seed),
        integers(items, 8, dtype=dtype, seed=seed + 1),
    )
    check_exactly(users, catalog, round(share * items), **options_for(names, batch, items, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_lse_of_real_numbers(dtype):
    generator = torch.Generator(RUNNER.device).manual_seed(0)
    users = torch.randn(20, 48, generator=generator).to(dtype)
    items = max(1000, RUNNER.smaller(3000))
    catalog = torch.randn(items, 48, generator=generator).to(dtype)
    bias = torch.randn(items, generator=generator)
    scores, ids, lse = attnrec.catalog_topk(users, catalog, 100, bias=bias, temperature=3.0)
    plain = reference.catalog_topk(users, catalog, 100, bias=bias, temperature=3.0)
    exact = by_sorting(users, catalog, 100, bias=bias, temperature=3.0)
    assert_close_to_reference(scores, plain[0], exact[0], what="scores")
    assert_close_to_reference(lse, plain[2], exact[2], what="lse")
    # Where the order differs from float64's, the two scores are nearer than a rounding error.
    logits = (users.double() @ catalog.double().T) / 3.0 + bias.double()
    of_ids = logits.gather(1, ids)
    assert (of_ids - exact[0]).abs().max() <= 1e-5
    assert all(len(set(row)) == 100 for row in ids.tolist())
    probabilities = (scores.double() - lse.double().unsqueeze(1)).exp()
    torch.testing.assert_close(probabilities, logits.softmax(1).gather(1, ids), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("order", ["rising", "falling", "all equal", "two values"])
def test_adversarial_orders(order):
    items = max(1000, RUNNER.smaller(5000))
    rising = torch.arange(float(items))
    values = {
        "rising": rising,
        "falling": rising.flip(0),
        "all equal": torch.ones(items),
        "two values": rising % 2,
    }[order]
    users = torch.tensor([[1.0], [0.0], [-1.0]]).repeat(6, 1) / items
    check_exactly(users, values.unsqueeze(1), items * 3 // 50)


@pytest.mark.parametrize("names", [(), ("exclude", "bias")], ids=str)
def test_more_ties_than_are_kept_and_then_higher_scores(names):
    items = max(1000, RUNNER.smaller(5000))
    users, catalog = torch.zeros(18, 8), torch.zeros(items, 8)
    users[:, 0], catalog[:, 0] = torch.tensor([1.0, 0.0, -1.0] * 6), torch.arange(items) // 256
    options = options_for(names, 18, items)
    if "bias" in names:
        options["bias"] = options["bias"].where(options["bias"] == -INF, 0.0)
    check_exactly(users, catalog, 60, **options)


@pytest.mark.parametrize("k", [1, 20])
def test_one_rounding_step_above_all_others(k):
    """For each user one item, at any place; it has to be found after any number of the others, who tie."""
    items = max(1000, RUNNER.smaller(5000))
    places, d = torch.arange(8) * (items - 1) // 7, torch.arange(8)
    catalog = torch.ones(items, 8)
    catalog[places, d] += 2.0**-23
    catalog[items - 1 - places, d] -= 2.0**-24
    _, ids, _ = check_exactly(torch.cat([torch.eye(8), -torch.eye(8)]), catalog, k)
    assert torch.equal(ids[:, 0], torch.cat([places, items - 1 - places]))


def test_ties_go_to_the_lower_id_at_every_temperature():
    """Equal products of different factors: scaling the users first would round them apart."""
    catalog = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 1.0]] * max(60, RUNNER.smaller(300)))
    users, items = torch.full((2, 2), 3.0), catalog.shape[0]
    for temperature in (1.0, 0.07, 0.3, 11.0):
        _, ids, _ = attnrec.catalog_topk(users, catalog, items, temperature=temperature)
        assert torch.equal(ids, torch.arange(items).expand(2, items))


def test_fewer_than_k_are_left():
    users, catalog = integers(3, 4, seed=8), integers(6, 4, seed=9)
    exclude = (torch.tensor([5, 0, 0, 1, 2, 3, 4, 5, 2]), make_offsets([3, 5, 1]))
    scores, ids, lse = check_exactly(users, catalog, 6, exclude=exclude)
    assert ids[0, 4:].tolist() == [-1, -1]
    assert scores[0, 4:].tolist() == [-INF, -INF]
    assert ids[1, 1:].tolist() == [-1] * 5
    assert lse[1] == scores[1, 0]


def test_all_excluded_or_hidden():
    users, catalog = integers(2, 4), integers(5, 4, seed=1)
    everything = (torch.arange(5).repeat(2).flip(0), make_offsets([5, 5]))
    for options in ({"exclude": everything}, {"bias": torch.full((5,), -INF)}):
        scores, ids, lse = attnrec.catalog_topk(users, catalog, 3, **options)
        assert torch.equal(scores, torch.full((2, 3), -INF))
        assert torch.equal(ids, torch.full((2, 3), -1))
        assert torch.equal(lse, torch.full((2,), -INF))


@pytest.mark.parametrize(("batch", "items", "k"), [(0, 5, 3), (3, 0, 0), (0, 0, 0), (3, 5, 0)])
def test_empty(batch, items, k):
    scores, ids, lse = attnrec.catalog_topk(torch.ones(batch, 4), torch.ones(items, 4), k)
    assert scores.shape == ids.shape == (batch, k)
    assert lse.shape == (batch,)
    if items == 0:
        assert torch.equal(lse, torch.full((batch,), -INF))


def test_nan_stays_with_its_user():
    users, catalog = integers(4, 8), integers(600, 8, seed=1)
    expected = attnrec.catalog_topk(users, catalog, 9)
    users[2] = NAN
    got = attnrec.catalog_topk(users, catalog, 9)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x[[0, 1, 3]], y[[0, 1, 3]])


def test_lse_of_infinite_scores():
    """inf where a score is, whatever the others are; but a NaN makes NaN of it."""
    users, catalog = integers(4, 8), integers(600, 8, seed=1)
    users[:, 0] = torch.tensor([2.0, 0.0, -1.0, INF])
    catalog[:, 0] = catalog[:, 0].clamp(min=1)
    catalog[[5, 300], 0], catalog[400, 0] = INF, -INF
    for k in (0, 3):
        _, _, lse = attnrec.catalog_topk(users, catalog, k)
        assert torch.equal(lse[[0, 2, 3]], torch.full((3,), INF))
        assert lse[1].isnan()  # 0 · inf
        torch.testing.assert_close(lse, reference.catalog_topk(users, catalog, k)[2], equal_nan=True)
    bias = torch.zeros(600)
    bias[[5, 300, 400]], bias[7] = -INF, INF
    lse = attnrec.catalog_topk(users[:3], catalog, 3, bias=bias)[2]
    assert torch.equal(lse, torch.full((3,), INF))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_score_comes_last(dtype):
    users, catalog = integers(2, 8, dtype=dtype), integers(600, 8, dtype=dtype, seed=1)
    broken = torch.tensor([0, 17, 130, 131, 599])
    scores, ids, _ = attnrec.catalog_topk(users, catalog, 600)
    catalog[broken] = NAN
    got_scores, got_ids, lse = attnrec.catalog_topk(users, catalog, 600)
    whole = ~torch.isin(ids, broken)
    assert torch.equal(got_ids[:, :595], ids[whole].view(2, 595))
    assert torch.equal(got_scores[:, :595], scores[whole].view(2, 595))
    assert torch.equal(got_ids[:, 595:], torch.full((2, 5), -1))
    assert torch.equal(got_scores[:, 595:], torch.full((2, 5), -INF, dtype=scores.dtype))
    assert lse.isnan().all()


def test_what_is_hidden_or_excluded_is_not_computed_with():
    users, catalog = integers(2, 8), integers(600, 8, seed=1)
    bias = torch.zeros(600)
    bias[130] = -INF
    exclude = (torch.tensor([77, 77]), make_offsets([1, 1]))
    expected = attnrec.catalog_topk(users, catalog, 9, bias=bias, exclude=exclude)
    catalog[77] = NAN
    catalog[130] = INF
    for x, y in zip(
        attnrec.catalog_topk(users, catalog, 9, bias=bias, exclude=exclude), expected, strict=True
    ):
        assert torch.equal(x, y)


def test_huge_logits():
    users = torch.tensor([[1e20], [-1e20]])
    catalog = torch.tensor([[1.0], [-2.0], [3.0]])
    scores, ids, lse = attnrec.catalog_topk(users, catalog, 3)
    assert ids.tolist() == [[2, 0, 1], [1, 0, 2]]
    assert torch.equal(lse, scores[:, 0])


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "rows of a wider tensor": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    users, catalog, bias = integers(5, 16), integers(600, 16, seed=1), integers(600, seed=2)
    change = LAYOUTS[layout]
    check_exactly(change(users), change(catalog), 40, bias=bias.repeat_interleave(3)[::3])


def test_one_item_expanded_to_all():
    _, ids, _ = attnrec.catalog_topk(integers(3, 16), integers(1, 16, seed=1).expand(400, 16), 400)
    assert torch.equal(ids, torch.arange(400).expand(3, 400))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_exclude_of_either_integer(dtype):
    users, catalog = integers(6, 8), integers(600, 8, seed=1)
    ids, offsets = exclusions(6, 600, 200)
    strided = (ids.to(dtype).repeat_interleave(2)[::2], offsets.to(dtype).repeat_interleave(2)[::2])
    check_exactly(users, catalog, 100, exclude=strided)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_user_alone_gets_the_same_bits(dtype):
    generator = torch.Generator(RUNNER.device).manual_seed(0)
    count, items = max(60, RUNNER.smaller(300)), max(1500, RUNNER.smaller(5000))
    users = torch.randn(count, 24, generator=generator).to(dtype)
    catalog = torch.randn(items, 24, generator=generator).to(dtype)
    ids, offsets = exclusions(count, items, 50)
    together = attnrec.catalog_topk(users, catalog, 33, exclude=(ids, offsets))
    for rows in ([0], [count - 1], [50, 7], [*range(40, 57)]):
        own = [ids[offsets[b] : offsets[b + 1]] for b in rows]
        exclude = (torch.cat(own), make_offsets([len(x) for x in own]))
        scores, best, lse = attnrec.catalog_topk(users[rows], catalog, 33, exclude=exclude)
        assert torch.equal(scores, together[0][rows])
        assert torch.equal(best, together[1][rows])
        torch.testing.assert_close(lse, together[2][rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 70])
def test_the_same_bits_again_and_on_any_number_of_threads(batch, threads):
    users, catalog = torch.randn(batch, 24), torch.randn(RUNNER.smaller(9000), 24)
    results = []
    for n in RUNNER.threads:
        threads(n)
        results.append(attnrec.catalog_topk(users, catalog, 50, temperature=0.7))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def test_half_precision_is_not_rounded_before_the_order():
    """Products that float16 would round to the same number."""
    users = torch.tensor([[1.0, 1.0]], dtype=torch.float16)
    catalog = torch.tensor([[2048.0, 0.0], [2048.0, 1.0], [2048.0, -1.0]], dtype=torch.float16)
    scores, ids, _ = attnrec.catalog_topk(users, catalog, 3)
    assert ids.tolist() == [[1, 0, 2]]
    assert scores.tolist() == [[2049.0, 2048.0, 2047.0]]


@pytest.mark.cpu_only("peak memory of the process")
def test_memory_is_not_that_of_all_scores(peak_memory):
    """500 users by 200,000 items would be 400 MB of scores."""
    users, catalog = torch.randn(500, 2), torch.randn(200_000, 2)
    with peak_memory() as grown:
        attnrec.catalog_topk(users, catalog, 5)
    assert grown() < 100 << 20
