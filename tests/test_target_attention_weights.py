"""`target_attention_weights`, all of them and the heaviest."""

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
    below_zero,
    layouts,
    mixed,
    of_rows,
    of_user,
    without_self_slot,
)
from hypothesis import given
from hypothesis import strategies as st
from runners import RUNNER

import attnrec
from attnrec import reference


def weigh(batch, **changes):
    return attnrec.target_attention_weights(*batch.weights_args, **{**batch.weights_options, **changes})


def by_user(batch, weights, offsets):
    """The weights of each user, `[C_b, H, L_b]`."""
    for user in range(len(batch.q_offsets) - 1):
        candidates = int(batch.q_offsets[user + 1] - batch.q_offsets[user])
        room = int(batch.kv_offsets[user + 1] - batch.kv_offsets[user])
        own = weights[int(offsets[user]) : int(offsets[user + 1])]
        yield own.view(candidates, room, weights.shape[1]).transpose(1, 2)


def check(batch, slack=1.0, **changes):
    options = {**batch.weights_options, **changes}
    function = attnrec.target_attention_weights
    assert_matches_reference(
        "target_attention_weights", *batch.weights_args, function=function, slack=slack, **options
    )


def check_top(batch, top):
    """The top few are the first of all weights in order, with the same bits, and have the right events."""
    weights, events = weigh(batch, top=top)
    assert weights.shape == events.shape == (*batch.query.shape[:2], top)
    assert weights.dtype == batch.query.dtype
    assert events.dtype == torch.int64
    rows = 0
    for user, own in enumerate(by_user(batch, *weigh(batch))):
        here = slice(rows, rows := rows + own.shape[0])
        part, chosen = weights[here], events[here]
        none = chosen < 0
        assert (chosen[none] == -1).all()
        assert (part[none] == 0).all()
        assert torch.equal(none, none.sort(-1).values)  # the padding comes last
        if own.shape[2]:
            assert torch.equal(own.gather(-1, chosen.clamp(min=0)).masked_fill(none, 0), part)
            n = min(top, own.shape[2])
            assert torch.equal(own.sort(-1, descending=True).values[..., :n], part[..., :n])
        for repeated in (chosen.sort(-1).values.diff(dim=-1) == 0) & (chosen.sort(-1).values[..., 1:] >= 0):
            assert not repeated.any(), f"user {user} has an event twice"
        sees = seen(batch, user)
        assert torch.equal((~none).sum(-1), sees.sum(-1).clamp(max=top))
        if own.shape[2]:
            assert sees.gather(-1, chosen.clamp(min=0))[~none].all()


def seen(batch, user):
    """Bool `[C_b, H, L_b]`: the events that each row sees."""
    part, rows, events = of_user(batch, user)
    n, heads, room = rows.stop - rows.start, batch.query.shape[1], events.stop - events.start
    position = torch.arange(room, device=batch.query.device)
    sees = torch.ones(n, heads, room, dtype=torch.bool, device=batch.query.device)
    if part.kv_lengths is not None:
        sees &= position < part.kv_lengths
    if part.visible is not None:
        sees &= position < part.visible.view(-1, 1, 1)
    if part.key_bias is not None:
        sees &= (part.key_bias != -INF).T
    return sees


class TestAll:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", OPTION_SETS, ids="+".join)
    def test_every_dtype_and_option(self, device, dtype, options):
        check(mixed(dtype=dtype, options=options).to(device), slack=1.3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_histories_as_long_as_their_room(self, device, dtype):
        batch = mixed(dtype=dtype, options=OPTIONS)
        room = batch.kv_offsets.diff()
        whole = batch.with_(kv_lengths=room, visible=room.repeat_interleave(batch.q_offsets.diff()))
        check(whole.to(device), slack=1.3)

    @pytest.mark.parametrize("dim", DIMS)
    def test_every_dim(self, device, dim):
        check(make_jagged([40, 3, 21], [70, 300, 9], heads=2, dim=dim).to(device), slack=1.5)

    @pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "all options"])
    @pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
    def test_grouped_heads(self, device, heads, kv_heads, options):
        check(mixed(heads=heads, kv_heads=kv_heads, options=options).to(device), slack=1.3)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("heads", [2, 5, 12, 16])
    def test_numbers_of_heads(self, device, heads, dtype):
        """In the result they are the innermost dimension, whose stores are made for some numbers of them."""
        check(make_jagged([3, 1], [37, 130], heads=heads, dim=8, dtype=dtype).to(device), slack=1.5)

    @pytest.mark.parametrize(("candidates", "events"), EDGES)
    def test_sizes_around_tiles(self, device, candidates, events):
        check(make_jagged([candidates, 40], [events, events + 1], heads=2, dim=24).to(device), slack=2.0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nothing_beyond_a_history_counts(self, device, dtype):
        batch = below_zero(dtype).to(device)
        check(batch)
        check_top(batch, 10)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_huge_logits(self, device, dtype):
        check(mixed(dtype=dtype, spread=50**0.5, options=["self", "key_bias"]).to(device), slack=1.5)

    @pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
    def test_scale(self, device, scale):
        check(mixed().to(device), slack=1.5, scale=scale)

    @given(batch=jagged_batches(dtypes=DTYPES, dims=[8, 16, 20, 64]))
    def test_any_batch(self, device, batch):
        check(batch.to(device), slack=4.0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_self_slot_with_a_score_of_minus_infinity(self, device, dtype):
        batch = without_self_slot(dtype=dtype).to(device)
        check(batch)
        check_top(batch, 12)

    def test_they_add_up(self, device):
        batch = mixed(options=["kv_lengths", "visible", "key_bias"]).to(device)
        for user, own in enumerate(by_user(batch, *weigh(batch))):
            sees = seen(batch, user)
            assert (own[~sees] == 0).all()
            torch.testing.assert_close(own.sum(-1), sees.any(-1).float())

    def test_the_self_slot_has_the_rest(self, device):
        batch = mixed(options=["self"]).to(device)
        scores = torch.einsum("chd,chd->ch", batch.query, batch.self_key.repeat_interleave(2, 1)) * 32**-0.5
        _, lse = attnrec.target_attention(*batch.args, return_lse=True, **batch.options)
        rest = (scores - lse).exp()
        sums = torch.cat([own.sum(-1) for own in by_user(batch, *weigh(batch))])
        torch.testing.assert_close(sums, 1 - rest, rtol=1e-5, atol=1e-6)


class TestTop:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", OPTION_SETS, ids="+".join)
    def test_every_dtype_and_option(self, device, dtype, options):
        check_top(mixed(dtype=dtype, options=options).to(device), top=10)

    @pytest.mark.parametrize("top", [0, 1, 2, 3, 16, 17, 128, 300])
    def test_any_number(self, device, top):
        check_top(mixed(kv_heads=4, options=["kv_lengths", "visible"]).to(device), top)

    @given(batch=jagged_batches(dtypes=[torch.float32, torch.bfloat16]), top=st.integers(1, 140))
    def test_any_batch(self, device, batch, top):
        check_top(batch.to(device), top)

    @pytest.mark.cpu_only("float64")
    @pytest.mark.parametrize("top", [1, 5, 200])
    def test_same_events_as_the_reference(self, device, top):
        batch = mixed(dtype=torch.float64, options=["visible", "self", "key_bias"]).to(device)
        weights, events = weigh(batch, top=top)
        want, chosen = reference.target_attention_top(*batch.weights_args, top, **batch.weights_options)
        assert torch.equal(events, chosen)
        torch.testing.assert_close(weights, want)

    @pytest.mark.parametrize("top", [1, 4, 30, 100])
    def test_ties_go_to_the_earlier_event(self, device, top):
        batch = make_jagged([22], [300], heads=1, dim=16).to(device)
        batch = batch.with_(key=batch.key[torch.arange(300, device=device) % 3])
        check_top(batch, top)
        _, events = weigh(batch, top=top)
        order = (batch.query[:, 0] @ batch.key[:3, 0].T).argsort(-1, descending=True)
        for row in range(22):
            want = torch.cat([torch.arange(int(first), 300, 3, device=device) for first in order[row]])
            assert torch.equal(events[row, 0], want[:top])

    def test_rising_and_falling_scores(self, device):
        key = torch.zeros(400, 1, 8, device=device)
        key[:, 0, 0] = torch.arange(400, device=device) * 0.05
        query = torch.zeros(2, 1, 8, device=device)
        query[:, 0, 0] = torch.tensor([1.0, -1.0], device=device)
        offsets = torch.tensor([0, 2], device=device), torch.tensor([0, 400], device=device)
        _, events = attnrec.target_attention_weights(query, key, *offsets, top=50)
        assert torch.equal(events[0, 0], torch.arange(399, 349, -1, device=device))
        assert torch.equal(events[1, 0], torch.arange(50, device=device))

    def test_weights_that_underflow_keep_their_order(self, device):
        key = torch.zeros(6, 1, 8, device=device)
        key[:, 0, 0] = torch.tensor([0.0, -200, 100, -150, -300, -250], device=device)
        query = torch.ones(1, 1, 8, device=device)
        offsets = torch.tensor([0, 1], device=device), torch.tensor([0, 6], device=device)
        weights, events = attnrec.target_attention_weights(query, key, *offsets, scale=2.0, top=6)
        assert events.flatten().tolist() == [2, 0, 3, 1, 5, 4]
        assert weights.flatten().tolist() == [1, 0, 0, 0, 0, 0]

    @pytest.mark.cpu_only("peak memory of the process")
    def test_memory_is_not_that_of_all_weights(self, peak_memory):
        batch = make_jagged([3000], [10000], heads=1, dim=16)  # 120 MB of weights
        weigh(batch, top=20)
        with peak_memory() as grown:
            weigh(batch, top=20)
        assert grown() < 12e6


@pytest.mark.parametrize("top", [None, 7])
class TestInvariance:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_users_and_candidates(self, device, dtype, top):
        batch = mixed(dtype=dtype, options=OPTIONS).to(device)
        results = weigh(batch, top=top)
        users = list(by_user(batch, *results)) if top is None else None
        for user in range(5):
            part, rows, _ = of_user(batch, user)
            order = torch.randperm(rows.stop - rows.start, device=device)
            for chosen in (order, order[:1], order[:9]):
                some = of_rows(part, chosen)
                alone = weigh(some, top=top)
                if top is None:
                    assert torch.equal(next(by_user(some, *alone)), users[user][chosen])
                else:
                    assert torch.equal(alone[0], results[0][rows][chosen])
                    assert torch.equal(alone[1], results[1][rows][chosen])

    def test_threads_and_runs(self, device, threads, top):
        candidates, events = [RUNNER.smaller(700), 3, 90], [200, RUNNER.smaller(1200), 33]
        batch = make_jagged(candidates, events, kv_heads=2, options=OPTIONS).to(device)
        first = weigh(batch, top=top)
        for n in RUNNER.threads:
            threads(n)
            for x, y in zip(weigh(batch, top=top), first, strict=True):
                assert torch.equal(x, y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strides(self, device, dtype, top):
        batch = mixed(dtype=dtype, options=OPTIONS).to(device)
        want = weigh(batch, top=top)
        for what, other in layouts(batch):
            for x, y in zip(weigh(other, top=top), want, strict=True):
                assert torch.equal(x, y), what

    def test_nan_of_a_hidden_event(self, device, top):
        batch = mixed(options=["kv_lengths", "key_bias"])
        batch = batch.with_(kv_lengths=torch.tensor([100, 3, 0, 200, 30]))
        hidden = batch.hidden() | (batch.key_bias == -INF).all(1)
        hidden[5], batch.key_bias[5] = True, -INF
        spoilt = batch.key.masked_fill(hidden.view(-1, 1, 1), NAN)
        for x, y in zip(
            weigh(batch.with_(key=spoilt).to(device), top=top), weigh(batch.to(device), top=top), strict=True
        ):
            assert torch.equal(x, y)

    @pytest.mark.parametrize(
        ("candidates", "events"), [([], []), ([0, 0], [3, 0]), ([2, 3], [0, 0]), ([0, 4, 0], [5, 0, 7])]
    )
    def test_nothing_there(self, device, candidates, events, top):
        batch = make_jagged(candidates, events).to(device)
        if top is None:
            check(batch)
        else:
            check_top(batch, top)
