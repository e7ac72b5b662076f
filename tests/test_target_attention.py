"""`target_attention`, forward: against the reference, and what its contract says beside the numbers."""

import pytest
import torch
from helpers import DTYPES, OPTIONS, assert_matches_reference, jagged_batches, make_jagged
from helpers_attention import (
    DIMS,
    EDGES,
    HEADS,
    INF,
    NAN,
    OPTION_SETS,
    attend,
    below_zero,
    layouts,
    mixed,
    of_rows,
    of_user,
    shuffled,
    together,
    without_self_slot,
)
from hypothesis import given
from runners import RUNNER

import attnrec


def check(batch, slack=1.0, **changes):
    def function(*args, **kwargs):
        return attnrec.target_attention(*args, return_lse=True, **kwargs)

    options = {**batch.options, **changes}
    assert_matches_reference("target_attention", *batch.args, function=function, slack=slack, **options)


class TestAgainstReference:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", OPTION_SETS, ids="+".join)
    def test_every_dtype_and_option(self, device, dtype, options):
        check(mixed(dtype=dtype, options=options).to(device))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", DIMS)
    def test_every_dim(self, device, dtype, dim):
        check(
            make_jagged([40, 3, 21], [70, 300, 9], heads=2, dim=dim, dtype=dtype, options=["self"]).to(device)
        )

    @pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
    @pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
    def test_grouped_heads(self, device, heads, kv_heads, options):
        check(mixed(heads=heads, kv_heads=kv_heads, options=options).to(device))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("candidates", "events"), EDGES)
    def test_sizes_around_tiles(self, device, candidates, events, dtype):
        batch = make_jagged([candidates, 40], [events, events + 1], heads=2, dim=24, dtype=dtype)
        check(batch.to(device), slack=2.0 if candidates < 10 else 1.0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nothing_beyond_a_history_counts(self, device, dtype):
        check(below_zero(dtype, options=["self"]).to(device))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_long_history(self, device, dtype):
        batch = make_jagged([20], [RUNNER.smaller(9000)], heads=2, dim=16, dtype=dtype)
        check(
            batch.to(device), slack=1.5
        )  # plain PyTorch is lucky here: baseline is at 1.16, compiled Triton at 1.19

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("deviation", [8, 50])
    def test_huge_logits(self, device, dtype, deviation):
        check(mixed(dtype=dtype, spread=deviation**0.5, options=["self", "key_bias"]).to(device), slack=1.5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_huge_values(self, device, dtype):
        """Their products with exponentials that no maximum was taken from are infinite."""
        batch = make_jagged([40, 3], [300, 9], heads=2, dim=16, dtype=dtype, options=["self"])
        for name in ("query", "key", "self_key"):
            getattr(batch, name)[..., 0] = 6.0
        huge = {name: getattr(batch, name) * 1e30 for name in ("value", "self_value")}
        check(batch.with_(**huge).to(device), scale=1.0)

    @pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 2])
    def test_scale(self, device, scale):
        check(mixed(options=["self", "key_bias"]).to(device), scale=scale)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_bias_in_the_query_s_dtype(self, device, dtype):
        batch = mixed(dtype=dtype, options=["key_bias"])
        check(batch.with_(key_bias=batch.key_bias.to(dtype)).to(device))

    def test_causal(self, device):
        batch = make_jagged([150, 20], [150, 20], dim=16)
        check(batch.with_(visible=torch.cat([torch.arange(1, 151), torch.arange(1, 21)])).to(device))

    @pytest.mark.parametrize(
        ("candidates", "events"), [([], []), ([0, 0], [3, 0]), ([2, 3], [0, 0]), ([0, 4, 0], [5, 0, 7])]
    )
    @pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
    def test_nothing_there(self, device, candidates, events, options):
        check(make_jagged(candidates, events, options=options).to(device), slack=3.0)

    @given(batch=jagged_batches(dtypes=DTYPES, dims=[8, 16, 20, 32, 64, 100]))
    def test_any_batch(self, device, batch):
        check(batch.to(device), slack=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_huge_logits_beside_others(device, dtype):
    """What a kernel does for the one kind must not reach the other."""
    batch = make_jagged([40], [300], heads=2, dim=16, dtype=dtype, options=["self"])
    query = batch.query.clone()
    query[::3] *= 30
    batch = batch.with_(query=query).to(device)
    check(batch, slack=4.0)
    for chosen in (torch.arange(0, 40, 3), torch.arange(1, 40, 3)):
        for x, y in zip(attend(of_rows(batch, chosen)), attend(batch), strict=True):
            assert torch.equal(x, y[chosen])


@pytest.mark.parametrize("logit", [89, 92, 104, 139, 347, 693])
def test_one_huge_logit_among_usual_ones(device, logit):
    """A power of e beyond the range of numbers may not come round to a small one."""
    batch = make_jagged([3], [40], heads=1, dim=16).to(device)
    query, key = batch.query.clone(), batch.key.clone()
    query[..., 0], key[..., 0], key[17, :, 0] = 1, 0, logit
    check(batch.with_(query=query, key=key), scale=1.0, slack=4.0)


def test_a_row_that_sees_nothing_has_zeros_and_minus_infinity(device):
    batch = mixed().to(device)
    hidden = torch.full(batch.key.shape[:1] + batch.query.shape[1:2], -INF, device=device)
    for blind in (
        {"visible": torch.zeros(batch.query.shape[0], dtype=torch.int32, device=device)},
        {"kv_lengths": torch.zeros(5, dtype=torch.int64, device=device)},
        {"key_bias": hidden},
    ):
        out, lse = attend(batch, **blind)
        assert (out == 0).all()
        assert (lse == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_self_slot_with_a_score_of_minus_infinity(device, dtype):
    """It has weight 0, and where a row sees nothing else it sees nothing."""
    batch = without_self_slot(dtype=dtype).to(device)
    check(batch)
    for user in (2, 3):
        part, _, _ = of_user(batch, user)
        out, lse = attend(part)
        assert (out[::2] == 0).all()
        assert (lse[::2] == -INF).all()
        assert lse[1::2].isfinite().all()


class TestNaN:
    """A NaN reaches only those who see it; for all others nothing changes, not a bit."""

    def test_of_another_user(self, device):
        batch = mixed(options=OPTIONS).to(device)
        clean = attend(batch)
        other = (
            slice(int(batch.q_offsets[3]), None),
            slice(int(batch.kv_offsets[3]), int(batch.kv_offsets[4])),
        )
        for name, where in [("query", 0), ("key", 1), ("value", 1), ("self_key", 0), ("self_value", 0)]:
            spoilt = getattr(batch, name).clone()
            spoilt[other[where]] = NAN
            batch = batch.with_(**{name: spoilt})
        for x, y in zip(attend(batch), clean, strict=True):
            assert torch.equal(x[: other[0].start], y[: other[0].start])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("by", ["kv_lengths", "key_bias", "visible"])
    def test_of_a_hidden_event(self, device, by, dtype):
        batch = make_jagged([20, 9], [150, 40], dtype=dtype).to(device)
        key, value = batch.key.clone(), batch.value.clone()
        hidden = torch.zeros(190, dtype=torch.bool, device=device)
        hidden[100:150] = hidden[189] = True
        if by == "kv_lengths":
            batch = batch.with_(kv_lengths=torch.tensor([100, 39], device=device))
        elif by == "visible":
            seen = torch.tensor([100] * 20 + [39] * 9, device=device)
            seen[3::4] -= 30
            batch = batch.with_(visible=seen)
        else:
            hidden[7:9] = True
            bias = torch.zeros(190, 4, device=device).masked_fill(hidden.unsqueeze(-1), -INF)
            batch = batch.with_(key_bias=bias)
        clean = attend(batch)
        key[hidden], value[hidden] = NAN, INF
        for x, y in zip(attend(batch.with_(key=key, value=value)), clean, strict=True):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_an_event_that_other_rows_see(self, device, dtype):
        batch = make_jagged([24], [40], dim=16, dtype=dtype)
        visible = torch.tensor([10, 40, 20] * 8)
        key, value = batch.key.clone(), batch.value.clone()
        key[25], value[30] = NAN, NAN
        batch = batch.with_(visible=visible).to(device)
        clean = attend(batch)
        out, lse = attend(batch.with_(key=key.to(device), value=value.to(device)))
        blind = (visible <= 25).to(device)
        assert torch.equal(out[blind], clean[0][blind])
        assert torch.equal(lse[blind], clean[1][blind])
        assert out[~blind].isnan().all()

    @pytest.mark.parametrize("name", ["query", "self_key", "self_value"])
    def test_of_another_candidate(self, device, name):
        batch = mixed(options=["self"]).to(device)
        clean = attend(batch)
        spoilt = getattr(batch, name).clone()
        spoilt[::3] = NAN
        out, lse = attend(batch.with_(**{name: spoilt}))
        kept = torch.arange(out.shape[0], device=device) % 3 != 0
        assert torch.equal(out[kept], clean[0][kept])
        assert torch.equal(lse[kept], clean[1][kept])
        assert out[~kept].isnan().all()


class TestBatchInvariance:
    """The same user and candidate: bitwise the same result, whatever is around it."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
    def test_users(self, device, dtype, options):
        batch = mixed(dtype=dtype, options=options).to(device)
        out, lse = attend(batch)
        parts = [of_user(batch, user) for user in range(5)]
        for part, rows, _ in parts:
            alone = attend(part)
            assert torch.equal(alone[0], out[rows])
            assert torch.equal(alone[1], lse[rows])
        order = shuffled(5)
        again = attend(together([parts[user][0] for user in order]))
        assert torch.equal(again[0], torch.cat([out[parts[user][1]] for user in order]))
        assert torch.equal(again[1], torch.cat([lse[parts[user][1]] for user in order]))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
    def test_candidates(self, device, dtype, options):
        batch = make_jagged([90], [300], kv_heads=2, dim=20, dtype=dtype, options=options, seed=3).to(device)
        out, lse = attend(batch)
        order = torch.randperm(90, device=device)
        for chosen in (order[:1], order[1:2], order[:7], order[:33], order):
            some = attend(of_rows(batch, chosen))
            assert torch.equal(some[0], out[chosen])
            assert torch.equal(some[1], lse[chosen])

    def test_threads_and_runs(self, device, threads):
        candidates, events = [RUNNER.smaller(700), 3, 90], [400, RUNNER.smaller(1200), 33]
        batch = make_jagged(candidates, events, kv_heads=2, options=OPTIONS).to(device)
        first = attend(batch)
        for n in RUNNER.threads:
            threads(n)
            for x, y in zip(attend(batch), first, strict=True):
                assert torch.equal(x, y)


@pytest.mark.cpu_only("the CPU kernels' order of work; other runners have the cases above")
def test_many_small_users_beside_a_large_one(device, threads):
    """Threads take small users several at a time."""
    batch = make_jagged([1, 2, 0, 3] * 80 + [90], [5, 0, 9, 3] * 80 + [2000])
    for n in (1, 2, 3):
        threads(n)
        check(batch)


@pytest.mark.cpu_only("the CPU kernels' order of work; other runners have the cases above")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
def test_few_candidates_and_more_events_than_caches_hold(device, dtype, options, threads):
    """Then a user's heads take turns, tile by tile; alone, its call is small and they do not."""
    candidates, events = [1, 3, 0, 32, 33] * 8, [700, 40, 300, 1100, 1300] * 8
    batch = make_jagged(candidates, events, dim=48, dtype=dtype, options=options)
    query = batch.query.clone()
    query[::3] *= 30  # these rows are done twice
    batch = batch.with_(query=query)
    assert 2 * batch.key.numel() * batch.key.element_size() > 16 << 20
    for n in (1, 2):
        threads(n)
        out, lse = attend(batch)
        for user in (0, 1, 3, 4):
            part, rows, _ = of_user(batch, user)
            alone = attend(part)
            assert torch.equal(alone[0], out[rows])
            assert torch.equal(alone[1], lse[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
def test_the_longest_history_as_the_caller_knows_it(device, dim, dtype, options):
    """Results are the same to the bit, with few candidates and many, and so are those of a user alone."""
    for candidates in ([3, 0, 1, 5, 2], [150, 0, 60, 70, 45]):
        events = [500, 7, 0, 129, 401]  # more than 1,024 together
        sizes = {"heads": 2, "kv_heads": 1, "dim": dim, "dtype": dtype, "options": options}
        batch = make_jagged(candidates, events, **sizes).to(device)
        unknown = attend(batch)
        for longest in (500, 1024, 1500):
            for x, y in zip(attend(batch, max_kv_length=longest), unknown, strict=True):
                assert torch.equal(x, y)
        for user in (0, 2):
            part, rows, _ = of_user(batch, user)
            for x, y in zip(attend(part), unknown, strict=True):
                assert torch.equal(x, y[rows])


@pytest.mark.skipif(RUNNER.backend != "triton", reason="other kernels do not heed it")
def test_a_history_longer_than_the_caller_says(device):
    """Where offsets are not looked at it goes unnoticed; nothing of the history is left out."""
    from attnrec.kernels import kernel

    batch = make_jagged([3, 70], [5, 1200], heads=2, dim=16).to(device)
    found = kernel("target_attention")(*batch.args, **batch.options, max_kv_length=900)
    for x, y in zip(found, attend(batch), strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(RUNNER.backend != "triton", reason="how the Triton kernels cut a history")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
def test_pieces_of_a_long_history_in_one_block_or_several(device, dtype, options, monkeypatch):
    """Histories of more than 1,024 events are cut; which blocks run the pieces depends on the whole batch."""
    from attnrec.kernels import target_attention as launching

    sizes = {"heads": 2, "kv_heads": 1, "dim": 16, "dtype": dtype, "options": options}
    # In the second batch the last user has the last piece of all, behind which is no memory.
    for candidates, events in (([3, 0, 18], [2100, 5, 1030]), ([18, 0, 3], [960, 5, 2100])):
        batch = make_jagged(candidates, events, **sizes)
        if options:
            batch.kv_lengths[-1] = batch.visible[-1] = events[-1]
        batch = batch.to(device)
        several = attend(batch)
        with monkeypatch.context() as patch:
            patch.setattr(launching, "PROCESSORS", 0)  # however few the rows are, they fill the chip
            check(batch)
            for x, y in zip(attend(batch), several, strict=True):
                assert torch.equal(x, y)


@pytest.mark.skipif(RUNNER.backend != "triton", reason="how the Triton kernels cut a history")
def test_pieces_of_a_long_history_where_heads_do_not_fill_a_tile(device, monkeypatch):
    """Three heads of 21 candidates are 63 of 64 rows: the last one is no other tile's first."""
    from attnrec.kernels import target_attention as launching

    batch = make_jagged([45, 2], [1030, 3], heads=3, kv_heads=1, dim=16).to(device)
    several = attend(batch)
    monkeypatch.setattr(launching, "PROCESSORS", 0)
    check(batch)
    for x, y in zip(attend(batch), several, strict=True):
        assert torch.equal(x, y)


class TestLayouts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strides(self, device, dtype):
        batch = mixed(dtype=dtype, options=OPTIONS).to(device)
        want = attend(batch)
        for what, other in layouts(batch):
            for x, y in zip(attend(other), want, strict=True):
                assert torch.equal(x, y), what

    def test_expanded(self, device):
        batch = make_jagged([9, 30], [140, 60], kv_heads=1).to(device)
        event, row = batch.key[:1].expand_as(batch.key), batch.query[:1].expand_as(batch.query)
        bias = torch.randn(200, 1, device=device).expand(200, 4)
        expanded = batch.with_(key=event, value=event, query=row, key_bias=bias)
        copied = {
            name: getattr(expanded, name).contiguous() for name in ("query", "key", "value", "key_bias")
        }
        for x, y in zip(attend(expanded), attend(batch.with_(**copied)), strict=True):
            assert torch.equal(x, y)

    def test_integer_dtypes(self, device):
        batch = mixed(options=OPTIONS)
        want = attend(batch.to(device))
        integers = {
            name: x.int() for name, x in vars(batch).items() if x is not None and x.dtype == torch.int64
        }
        assert len(integers) == 4
        for x, y in zip(attend(batch.with_(**integers).to(device)), want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.cpu_only("peak memory of the process")
def test_memory_is_not_that_of_all_scores(peak_memory):
    batch = make_jagged([3000], [10000], heads=1, dim=16)  # 120 MB of scores
    attend(batch)
    with peak_memory() as grown:
        attend(batch)
    assert grown() < 12e6


@pytest.mark.cpu_only("peak memory of the process")
def test_scratch_memory_does_not_grow_with_the_batch(peak_memory, threads):
    """After a call for one user, one for fifty such users takes what its results do."""
    threads(1)
    one, many = (make_jagged([300] * n, [900] * n, dim=64) for n in (1, 50))
    attend(one)
    with peak_memory() as grown:
        results = attend(many)
    assert grown() < 1.2 * sum(x.nbytes for x in results) + (1 << 20)  # sanitizers keep some
