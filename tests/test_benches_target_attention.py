"""Counts and peers of the attention benchmarks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnrec
from benches import target_attention_options
from benches.case import Refused
from benches.jagged import CONTIGUOUS, PADDED, STRIDED, make_batch, other_orders, padding_mask
from benches.lengths import log_normal, offsets, zipf
from benches.peers import sdpa
from benches.target_attention import AttentionProblem, by_reference, count

CPU = torch.device("cpu")


def _batch(**options):
    return make_batch([3, 0, 5], [7, 2, 4], heads=4, dim=8, device=CPU, **options)


@pytest.mark.parametrize("train", [False, True])
def test_flops_are_those_that_torch_counts(train):
    batch = make_batch([3, 0, 5], [7, 2, 4], heads=2, dim=8, device=CPU, train=train)
    with FlopCounterMode(display=False) as counter:
        by_reference(batch)
    counted = AttentionProblem(batch).counts().flops
    # The reference keeps its scores, so its backward has four products where a fused one has five.
    assert counted == counter.get_total_flops() * (7 / 6 if train else 1)


def test_bytes_and_exponentials():
    # Written out: q, out [8, 4, 8] and k, v [13, 2, 8] in 2 bytes, lse [8, 4] in 4.
    counts = count(26 + 20 - 5, 8, 13, heads=4, kv_heads=2, dim=8, size=2, train=False)
    assert counts.bytes == 2 * (2 * 8 * 4 * 8 + 2 * 13 * 2 * 8) + 4 * 8 * 4
    assert counts.exps == 41 * 4


def test_pairs():
    assert _batch().pairs == 3 * 7 + 5 * 4
    assert _batch(causal=True).pairs == (1 + 2 + 3) + (1 + 2 + 3 + 4 + 4)
    assert int(_batch(causal=True).visible.sum()) == _batch(causal=True).pairs


@pytest.mark.parametrize("layout", [PADDED, STRIDED, CONTIGUOUS])
def test_layouts_come_back(layout):
    batch = make_batch([3, 3], [4, 4], heads=2, dim=8, device=CPU) if layout is not PADDED else _batch()
    assert torch.equal(layout.back(layout.to(batch.query, batch.candidates), batch.candidates), batch.query)


def test_dense_layouts_refuse_a_jagged_batch():
    with pytest.raises(Refused, match="dense"):
        sdpa.contiguous(_batch())


def test_padding_mask():
    assert padding_mask([2, 0, 3], CPU).tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert padding_mask([2, 2], CPU) is None


@pytest.mark.parametrize("prepare", [sdpa.loop, sdpa.padded, sdpa.nested])
@pytest.mark.parametrize(("train", "causal"), [(False, False), (True, False), (False, True)])
def test_jagged_peers_are_right(prepare, train, causal):
    if prepare is sdpa.nested and causal:
        pytest.skip("torch's nested attention has no causal mask of this kind on the CPU")
    counts = [3, 1, 5]
    batch = make_batch(
        counts, counts if causal else [7, 2, 4], heads=2, dim=8, device=CPU, train=train, causal=causal
    )
    problem, contender = AttentionProblem(batch), prepare(batch)
    verdict = problem.check(contender.read(contender.call()), ours=False)
    assert verdict.right, verdict


def test_lengths_have_a_tail_and_a_seed():
    drawn = log_normal(64, 120, 1.0, 2000)
    assert drawn == log_normal(64, 120, 1.0, 2000)
    assert min(drawn) >= 1
    assert max(drawn) > 5 * sorted(drawn)[32]
    assert sorted(zipf(4, 100), reverse=True) == [100, 50, 33, 25]
    assert offsets([2, 0, 3]).tolist() == [0, 2, 2, 5]


# --- the check: strict enough, and not a matter of luck -----------------------------------------------------


@pytest.fixture(scope="module")
def heads():
    """A case of few rows, some with one heavy event: where one order of summation is luck."""
    return AttentionProblem(make_batch([32] * 2, [512] * 2, heads=4, dim=32, device=CPU))


def _verdict(problem, change):
    contender = problem.ours()
    results = [x.clone() for x in contender.read(contender.call())]
    assert problem.check(results, ours=True).right
    change(results[0])
    return problem.check(results, ours=True)


@pytest.mark.parametrize("error", [1e-3, 3e-6])
def test_a_relative_error_is_seen(heads, error):
    assert not _verdict(heads, lambda out: out.mul_(1 + error)).right


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_lost_event_is_seen(dtype):
    """Every user's last event, one of 200; in bf16 too, where rounding is a hundredth."""
    batch = make_batch([256] * 2, [200] * 2, heads=2, dim=32, device=CPU, dtype=dtype)
    problem = AttentionProblem(batch)

    def lose(out):
        lengths = torch.tensor(batch.events) - 1
        of = batch.q_offsets, batch.kv_offsets
        out.copy_(attnrec.target_attention(batch.query, batch.key, batch.value, *of, kv_lengths=lengths))

    assert not _verdict(problem, lose).right


@pytest.mark.parametrize("causal", [False, True])
def test_other_orders_compute_the_same(causal):
    counts = [5, 3]
    batch = make_batch(
        counts, counts if causal else [7, 4], heads=2, dim=8, device=CPU, causal=causal, train=True
    )
    exact = by_reference(batch.double())
    plain = by_reference(batch)
    for shuffled, back in other_orders(batch, 3):
        again = back(by_reference(shuffled.double()))
        for mine, other in zip(again, exact, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
        # and not by the same sums
        assert any(not torch.equal(a, b) for a, b in zip(back(by_reference(shuffled)), plain, strict=True))


def test_options_are_held_against_the_reference_with_them():
    case = next(c for c in target_attention_options.CASES if c.suite == "smoke")
    problem = case.make(CPU)
    for name, prepare in case.peers.items():
        contender = prepare(problem)
        out = contender.call()
        assert contender.check([out]).right, name
        if name not in ("+visible", "+kv_lengths"):
            assert not problem.check([out], ours=True).right, f"{name} changes nothing"
        assert not contender.check([out * 1.001]).right, name


def test_one_thread_counts_threads():
    problem = AttentionProblem(_batch())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(Refused, match="one thread"):
            target_attention_options.one_thread(problem)
        torch.set_num_threads(2)
        contender = target_attention_options.one_thread(problem)
        assert problem.check(contender.read(contender.call()), ours=True).right
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
