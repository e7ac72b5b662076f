"""`FusedMultiHeadAttention` against `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_close_to_reference, make_offsets
from helpers_nn import DIM, HEADS, assert_same, causal, forced_plan, make_pair, results
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnrec.nn import FusedMultiHeadAttention, masks
from attnrec.nn.projections import (
    CALLS_OF_RAW_HISTORY,
    cost_of_projected_history,
    cost_of_raw_history,
    prefers_raw_history,
)

USERS, CANDIDATES, EVENTS = 3, 5, 7
INF = float("inf")


@pytest.fixture
def raw_history(request: pytest.FixtureRequest) -> Iterator[bool]:
    with forced_plan(request.param):
        yield request.param


both_plans = pytest.mark.parametrize("raw_history", [False, True], indirect=True, ids=["projected", "raw"])


# --- the grid of torch's arguments --------------------------------------------------------------------------


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -INF)


def make_masks(kind: str, users: int, candidates: int, events: int) -> dict[str, Any]:
    """Masks that show every query something, each of them with its own kind of tail, hole or value."""
    padding = torch.zeros(users, events, dtype=torch.bool)
    padding[0, 3:], padding[-1, 1:3] = True, True
    anything = torch.rand(users * HEADS, candidates, events) < 0.3
    anything[..., 0] = False
    heads_alike = causal(candidates, events).repeat(users * HEADS, 1, 1)
    heads_alike[:HEADS, :, 2:] = True
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "padding_none_hidden": {"key_padding_mask": torch.zeros_like(padding)},
        "padding_float": {"key_padding_mask": as_float(padding)},
        "padding_bias": {"key_padding_mask": as_float(padding) + torch.randn(users, events).double()},
        "causal": {"attn_mask": causal(candidates, events)},
        "causal_float_hint": {"attn_mask": as_float(causal(candidates, events)), "is_causal": True},
        "causal_padding": {
            "attn_mask": as_float(causal(candidates, events)),
            "key_padding_mask": as_float(padding),
        },
        "prefixes_3d": {"attn_mask": heads_alike},
        "any_2d": {"attn_mask": anything[0]},
        "any_3d": {"attn_mask": anything},
        "bias_2d": {"attn_mask": torch.randn(candidates, events).double()},
        "bias_3d_padding": {
            "attn_mask": torch.randn(anything.shape).double(),
            "key_padding_mask": as_float(padding),
        },
    }[kind]


MASKS = [
    "none",
    "padding",
    "padding_none_hidden",
    "padding_float",
    "padding_bias",
    "causal",
    "causal_float_hint",
    "causal_padding",
    "prefixes_3d",
]
MASKS_OF_PYTORCH = ["any_2d", "any_3d", "bias_2d", "bias_3d_padding"]


@pytest.mark.parametrize("batch", ["batch_first", "sequence_first", "unbatched"])
@pytest.mark.parametrize("same", ["self", "shared", "apart"])
@pytest.mark.parametrize("kind", MASKS + MASKS_OF_PYTORCH)
@pytest.mark.filterwarnings("ignore:FusedMultiHeadAttention computes with PyTorch")
def test_grid(kind: str, same: str, batch: str, fused_calls: list) -> None:
    """Results and gradients for every combination of torch's arguments, in float64."""
    users = 1 if batch == "unbatched" else USERS
    candidates, events = (EVENTS, EVENTS) if same == "self" else (CANDIDATES, EVENTS)
    widths = [{}] if same == "self" else [{}, {"kdim": 24, "vdim": 24}]
    if same == "apart":
        widths.append({"kdim": 12, "vdim": 20})
    call = make_masks(kind, users, candidates, events)
    runs = 0
    for width, bias, bias_kv, zero, (need, average) in itertools.product(
        widths,
        [True, False],
        [False, True],
        [False, True],
        [(True, True), (True, False), (False, True)],
    ):
        arguments = {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero, **width}
        arguments |= {"batch_first": batch == "batch_first", "dtype": torch.float64}
        ours, theirs = make_pair(**arguments)
        ours.train(runs % 2 == 0), theirs.train(runs % 2 == 0)
        shapes = [(users, n, d) for n, d in ((candidates, DIM), (events, ours.kdim), (events, ours.vdim))]
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        if batch != "batch_first":
            inputs = [x.squeeze(0) if batch == "unbatched" else x.transpose(0, 1) for x in inputs]
        given = dict(call)
        if batch == "unbatched" and "key_padding_mask" in given:
            given["key_padding_mask"] = given["key_padding_mask"][0]
        given |= {"average_attn_weights": average}
        # Torch with weights is the one that counts: without, its causal hint hides the added columns.
        wanted = results(theirs, inputs, same, look_at_weights=need, **given)
        got = results(ours, inputs, same, look_at_weights=need, need_weights=need, **given)
        assert_same(got, wanted, f"{arguments} need_weights={need}")
        runs += 1
    assert len(fused_calls) == (0 if kind in MASKS_OF_PYTORCH else runs)


@both_plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_low_precision(kind: str, dtype: torch.dtype, need_weights: bool, raw_history: bool) -> None:
    """Not further from float64 than torch's module in the same dtype, by a factor of 2 (gradients 3)."""
    users, candidates, events = 4, 33, 65
    ours, theirs = make_pair(64, 4, dtype=dtype, batch_first=True, add_bias_kv=not raw_history)
    exact = copy.deepcopy(theirs).double()
    inputs = [torch.randn(users, n, 64).to(dtype) for n in (candidates, events, events)]
    call = {**make_masks(kind, users, candidates, events), "need_weights": need_weights}
    got, plain = (results(module, inputs, "apart", **call) for module in (ours, theirs))
    wanted = results(exact, [x.double() for x in inputs], "apart", **call)
    for name, x in wanted.items():
        # What rounds on the way are sums of several roundings, of which a rounding step of the result is one.
        factor = 3.0 if name.startswith("gradient") else 2.0
        assert_close_to_reference(got[name], plain[name], x, factor=factor, what=name)


@given(
    users=st.integers(0, 4),
    candidates=st.integers(0, 9),
    events=st.integers(0, 20),
    heads=st.sampled_from([1, 2, 4]),
    padded=st.booleans(),
    prefixes=st.booleans(),
    need_weights=st.booleans(),
)
def test_any_shape(
    users: int, candidates: int, events: int, heads: int, padded: bool, prefixes: bool, need_weights: bool
) -> None:
    """Empty batches and histories too. A query that sees nothing gets the output projection of zeros."""
    ours, theirs = make_pair(32, heads, batch_first=True, dtype=torch.float64)
    inputs = [torch.randn(users, n, 32, dtype=torch.float64) for n in (candidates, events, events)]
    call: dict[str, Any] = {"need_weights": need_weights}
    hidden = torch.zeros(users, candidates, events, dtype=torch.bool)
    if padded:
        call["key_padding_mask"] = torch.rand(users, events) < 0.5
        hidden |= call["key_padding_mask"][:, None]
    if prefixes:
        call["attn_mask"] = torch.arange(events) >= torch.randint(0, events + 1, (candidates, 1))
        hidden |= call["attn_mask"]
    output, weights = ours(*inputs, **call)
    assert output.shape == (users, candidates, 32)
    empty = hidden.all(-1)
    torch.testing.assert_close(output[empty], theirs.out_proj.bias.expand(int(empty.sum()), -1))
    if not need_weights:
        assert weights is None
    elif users and candidates:
        torch.testing.assert_close(weights.sum(-1), (~empty).double())
    if users and candidates and events:
        wanted, wanted_weights = theirs(*inputs, **call | {"need_weights": True})
        torch.testing.assert_close(output[~empty], wanted[~empty])
        if need_weights:
            torch.testing.assert_close(weights[~empty], wanted_weights[~empty])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["padding", "any"])
@pytest.mark.filterwarnings("ignore:FusedMultiHeadAttention computes with PyTorch")
def test_query_that_sees_nothing(kind: str, need_weights: bool) -> None:
    """It gets the output projection of zeros, zero weights and finite gradients, on both paths."""
    ours, _ = make_pair(batch_first=True)
    query, history = torch.randn(2, 4, DIM, requires_grad=True), torch.randn(2, 6, DIM, requires_grad=True)
    if kind == "padding":
        call = {"key_padding_mask": torch.tensor([[False] * 6, [True] * 6])}
        empty = torch.tensor([[False] * 4, [True] * 4])
    else:
        mask = torch.rand(2 * HEADS, 4, 6) < 0.3
        mask[:, :, 0], mask[:, :, 1] = False, True
        mask[HEADS:, 2] = True
        call = {"attn_mask": mask}
        empty = torch.tensor([[False] * 4, [False, False, True, False]])
    output, weights = ours(query, history, history, need_weights=need_weights, **call)
    torch.testing.assert_close(output[empty], ours.out_proj.bias.expand(int(empty.sum()), -1))
    if need_weights:
        assert (weights[empty] == 0).all()
        assert (weights[~empty] > 0).any()
    output.sum().backward()
    for x in (query.grad, history.grad, *(p.grad for p in ours.parameters())):
        assert x.isfinite().all()
    assert (query.grad[empty] == 0).all()
    assert (query.grad[~empty] != 0).any()


@both_plans
def test_padding_is_never_computed_with(raw_history: bool, fused_calls: list) -> None:
    """Only the real events reach the kernels, and a NaN in the padding reaches nothing."""
    ours, theirs = make_pair(batch_first=True)
    query, history = torch.randn(USERS, CANDIDATES, DIM), torch.randn(USERS, EVENTS, DIM)
    hidden = torch.tensor([[False] * 7, [True] * 4 + [False] * 3, [False] * 2 + [True] * 5])
    wanted, wanted_weights = theirs(query, history, history, key_padding_mask=hidden)
    history[hidden] = torch.nan
    history.requires_grad_()
    output, weights = ours(query, history, history, key_padding_mask=hidden)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(weights, wanted_weights)
    (output.sum() + weights.square().sum()).backward()
    assert (history.grad[hidden] == 0).all()
    assert history.grad[~hidden].isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    assert fused_calls[0]["key"].shape[0] == int((~hidden).sum())


@pytest.mark.parametrize("kind", ["padding", "padding_float", "padding_bias", "causal_float_hint"])
def test_masks_that_cannot_be_read(kind: str, monkeypatch: pytest.MonkeyPatch, fused_calls: list) -> None:
    """As on an accelerator, where looking at a mask would cost a synchronisation."""
    monkeypatch.setattr(masks, "readable", lambda _: False)
    ours, theirs = make_pair(batch_first=True, dtype=torch.float64)
    inputs = [torch.randn(USERS, n, DIM, dtype=torch.float64) for n in (CANDIDATES, EVENTS)]
    call = make_masks(kind, USERS, CANDIDATES, EVENTS)
    assert_same(results(ours, inputs, "shared", **call), results(theirs, inputs, "shared", **call))
    assert len(fused_calls) == 1


@both_plans
def test_a_nan_behind_a_mask_that_cannot_be_read(raw_history: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is projected with the rest, and reaches no output, weight or other row's gradient."""
    monkeypatch.setattr(masks, "readable", lambda _: False)
    ours, _ = make_pair(batch_first=True)
    query, history = torch.randn(2, 4, DIM, requires_grad=True), torch.randn(2, 6, DIM)
    hidden = torch.tensor([[False, True, False, False, True, True], [False] * 6])
    history[hidden] = torch.nan
    history.requires_grad_()
    output, weights = ours(query, history, history, key_padding_mask=hidden)
    (output.sum() + weights.square().sum()).backward()
    for x in (output, weights, query.grad, history.grad[~hidden]):
        assert x.isfinite().all()


def test_reads_no_value_of_a_fake_tensor() -> None:
    """A fake tensor has none: what passes here costs no synchronisation on an accelerator."""
    ours = FusedMultiHeadAttention(DIM, HEADS, batch_first=True, add_zero_attn=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, hidden = torch.randn(2, 6, DIM), torch.zeros(2, 6, dtype=torch.bool)
        mask = torch.zeros(6, 6)
        call = {"key_padding_mask": hidden, "attn_mask": mask, "is_causal": True, "need_weights": False}
        assert ours(x, x, x, **call)[0].shape == (2, 6, DIM)
        rows = x.flatten(0, 1), make_offsets([5, 7])
        call = {"q_offsets": rows[1], "is_causal": True, "need_weights": False}
        assert ours(rows[0], rows[0], rows[0], **call)[0].shape == (12, DIM)


def test_gradient_of_a_float_mask() -> None:
    """A learned bias per event gets torch's gradient."""
    ours, theirs = make_pair(batch_first=True, dtype=torch.float64)
    query, history = (torch.randn(USERS, n, DIM, dtype=torch.float64) for n in (CANDIDATES, EVENTS))
    grads = []
    for module in (ours, theirs):
        bias = torch.linspace(-1, 1, USERS * EVENTS, dtype=torch.float64).view(USERS, EVENTS)
        bias = bias.masked_fill(bias > 0.9, -INF).requires_grad_()
        output, weights = module(query, history, history, key_padding_mask=bias)
        (output.sin().sum() + weights.sin().sum()).backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads)


def test_a_wrong_causal_hint_is_not_believed() -> None:
    ours, theirs = make_pair(batch_first=True)
    query, history = torch.randn(2, 3, DIM), torch.randn(2, 5, DIM)
    mask = torch.arange(5) >= torch.tensor([[5], [1], [3]])
    got, _ = ours(query, history, history, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(got, theirs(query, history, history, attn_mask=mask)[0])


def test_eval_without_gradients_as_torchs_fast_path() -> None:
    """Torch computes this in a kernel of its own."""
    ours, theirs = make_pair(batch_first=True)
    ours.eval(), theirs.eval()
    x, hidden = torch.randn(USERS, EVENTS, DIM), torch.rand(USERS, EVENTS) < 0.4
    hidden[:, 2] = False
    with torch.inference_mode():
        for call in ({}, {"key_padding_mask": hidden}, {"attn_mask": causal(EVENTS, EVENTS)}):
            for average in (True, False):
                got = ours(x, x, x, average_attn_weights=average, **call)
                wanted = theirs(x, x, x, average_attn_weights=average, **call)
                torch.testing.assert_close(got, wanted)


# --- what it projects ---------------------------------------------------------------------------------------


@both_plans
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same", ["shared", "apart"])
@pytest.mark.parametrize("kind", ["none", "padding", "padding_bias", "causal_padding"])
def test_both_plans_agree(kind: str, same: str, bias: bool, raw_history: bool, fused_calls: list) -> None:
    ours, theirs = make_pair(bias=bias, kdim=24, vdim=24, dtype=torch.float64, batch_first=True)
    shapes = [(CANDIDATES, DIM), (EVENTS, 24), (EVENTS, 24)]
    inputs = [torch.randn(USERS, *shape, dtype=torch.float64) for shape in shapes]
    call = make_masks(kind, USERS, CANDIDATES, EVENTS)
    assert_same(results(ours, inputs, same, **call), results(theirs, inputs, same, **call))
    key = fused_calls[0]["key"]
    assert key.shape[1:] == ((1, 24) if raw_history else (HEADS, DIM // HEADS))


@both_plans
def test_empty_history_has_no_value_bias(raw_history: bool) -> None:
    ours, _ = make_pair()
    rows = torch.randn(4, DIM), torch.randn(3, DIM), torch.randn(3, DIM)
    output, _ = ours(*rows, q_offsets=make_offsets([2, 2]), kv_offsets=make_offsets([0, 3]))
    torch.testing.assert_close(output[:2], ours.out_proj.bias.expand(2, -1))
    assert not torch.allclose(output[2:], ours.out_proj.bias.expand(2, -1))


def test_the_counts_decide_the_plan(fused_calls: list) -> None:
    """One candidate and a long history attend over the raw history; many candidates project it once."""
    # 64 events of 64 features and 1 candidate with 4 heads, by hand: 2 * 64 * 128 * 64 + 4 * 64 * 64
    # operations and 64 * (128 + 256) * 4 bytes, against 4 * 64 * 64 + 4 * 64 * 4 * 64 operations and
    # (2 * 64 * 64 + 4 * 4 * 64) * 4 bytes, and what its further calls cost.
    assert cost_of_projected_history(64, 64, 64, 64, 64, 4) == 1_064_960 + 5 * 98_304
    assert cost_of_raw_history(1, 64, 64, 64, 4, 64, 4) == 81_920 + 5 * 36_864 + CALLS_OF_RAW_HISTORY
    assert prefers_raw_history(2, 4_000, 4_000, 64, 4, 64, 64, 4)
    assert not prefers_raw_history(1, 64, 64, 64, 4, 64, 64, 4), "too small to pay for further calls"
    assert not prefers_raw_history(200, 4_000, 400_000, 64, 4, 64, 64, 4), "many candidates"
    assert not prefers_raw_history(2, 4_000, 4_000, 64, 4, 64, 32, 4), "keys and values of different widths"
    assert not prefers_raw_history(2, 4_000, 4_000, 512, 4, 512, 512, 4), "wider than a head may be"
    ours, theirs = make_pair(64, 4, batch_first=True)
    history = torch.randn(2, 2_000, 64)
    for candidates, heads_of_key in ((1, 1), (100, 4)):
        query = torch.randn(2, candidates, 64)
        got, _ = ours(query, history, history, need_weights=False)
        torch.testing.assert_close(got, theirs(query, history, history)[0])
        assert fused_calls[-1]["key"].shape[1] == heads_of_key
    extended = FusedMultiHeadAttention(64, 4, batch_first=True, add_zero_attn=True)
    extended(history[:, :1], history, history)
    assert fused_calls[-1]["key"].shape[1] == 4, "the key's bias does not cancel against the added key"


def test_self_attention_is_one_projection(fused_calls: list) -> None:
    """Queries, keys and values are views of one product, not copies."""
    ours, _ = make_pair(batch_first=True)
    x = torch.randn(USERS, EVENTS, DIM)
    ours(x, x, x, need_weights=False)
    views = [fused_calls[0][name] for name in ("query", "key", "value")]
    assert len({x.untyped_storage().data_ptr() for x in views}) == 1
    assert {x.stride(0) for x in views} == {3 * DIM}


def test_a_float_mask_that_only_hides_is_no_bias(fused_calls: list) -> None:
    """`nn.TransformerEncoderLayer` makes one of every boolean mask."""
    ours, _ = make_pair(batch_first=True)
    x = torch.randn(USERS, EVENTS, DIM)
    for kind, has_bias in (("padding_float", False), ("padding_bias", True)):
        ours(x, x, x, **make_masks(kind, USERS, EVENTS, EVENTS))
        assert (fused_calls[-1]["key_bias"] is not None) == has_bias
