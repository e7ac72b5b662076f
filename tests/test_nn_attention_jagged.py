"""`FusedMultiHeadAttention` on packed and nested input, against torch's module on one user at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_offsets
from helpers_nn import DIM, HEADS, causal, make_pair
from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:FusedMultiHeadAttention computes with PyTorch"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

C_LENGTHS, L_LENGTHS = [2, 0, 3, 1], [5, 4, 0, 7]


def packed_batch(same: str = "shared") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = [L_LENGTHS if same == "self" else C_LENGTHS, L_LENGTHS, L_LENGTHS]
    return [torch.randn(sum(n), DIM, generator=generator, dtype=torch.float64) for n in lengths]


def user_by_user(
    module: nn.MultiheadAttention, parts: list[tuple[Tensor, Tensor, Tensor]], masks: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Torch's module on one user after the other: outputs, and weights per head in the packed form."""
    outputs, weights = [], []
    for (q, k, v), mask in zip(parts, masks, strict=True):
        if len(q) == 0:
            continue
        if len(k) == 0 and module.bias_k is None and not module.add_zero_attn:
            outputs.append(module.out_proj(q * 0))
            continue
        out, w = module(q, k, v, attn_mask=mask, average_attn_weights=False)
        outputs.append(out)
        weights.append(w[..., : len(k)].permute(1, 2, 0).reshape(-1, module.num_heads))
    return torch.cat(outputs), torch.cat(weights)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("extra", ["plain", "causal", "visible", "kv_lengths"])
@pytest.mark.parametrize("same", ["self", "shared", "apart"])
@pytest.mark.parametrize("path", ["fused", "pytorch"])
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
def test_packed(added: bool, path: str, same: str, extra: str, index: torch.dtype, fused_calls: list) -> None:
    ours, theirs = make_pair(add_bias_kv=added, add_zero_attn=added, dtype=torch.float64)
    if path == "pytorch":
        ours.dropout = 1e-12  # drops nothing, but no fused kernel could
    leaves = [x.requires_grad_() for x in packed_batch(same)]
    if same == "self":
        leaves = [leaves[0]] * 3
    elif same == "shared":
        leaves[2] = leaves[1]
    lengths = (L_LENGTHS if same == "self" else C_LENGTHS), L_LENGTHS
    call: dict[str, Any] = {"q_offsets": make_offsets(lengths[0], index)}
    if same != "self":
        call["kv_offsets"] = make_offsets(lengths[1], index)
    masks: list[Tensor | None] = [None] * len(lengths[0])
    shown = list(lengths[1])
    if extra == "causal":
        call["is_causal"] = True
        masks = [causal(c, n) for c, n in zip(*lengths, strict=True)]
    elif extra == "visible":
        rooms = [n for c, n in zip(*lengths, strict=True) for _ in range(c)]
        call["visible"] = torch.tensor([min(1 + i % 3, n) for i, n in enumerate(rooms)], dtype=index)
        masks = [
            torch.arange(n) >= v.unsqueeze(1)
            for n, v in zip(lengths[1], call["visible"].split(list(lengths[0])), strict=True)
        ]
    elif extra == "kv_lengths":
        shown = [5, 1, 0, 3]
        call["kv_lengths"] = torch.tensor(shown, dtype=index)

    output, (weights, offsets) = ours(*leaves, average_attn_weights=False, **call)
    assert len(fused_calls) == (path == "fused")
    assert offsets.tolist() == make_offsets([c * n for c, n in zip(*lengths, strict=True)]).tolist()
    split = [x.split(list(n)) for x, n in zip(leaves, (lengths[0], lengths[1], lengths[1]), strict=True)]
    parts = [(q, k[:n], v[:n]) for q, k, v, n in zip(*split, shown, strict=True)]
    wanted, wanted_weights = user_by_user(theirs, parts, masks)
    torch.testing.assert_close(output, wanted)
    room = torch.cat([(torch.arange(n) < s).repeat(c) for c, n, s in zip(*lengths, shown, strict=True)])
    torch.testing.assert_close(weights[room], wanted_weights)
    assert (weights[~room] == 0).all()
    averaged, without = ours(*leaves, **call)[1][0], ours(*leaves, need_weights=False, **call)[1]
    torch.testing.assert_close(averaged, weights.mean(1))
    assert without is None

    distinct = list({id(x): x for x in leaves}.values())
    grads = [
        torch.autograd.grad(a.sin().sum() + b.sin().sum(), [*distinct, *module.parameters()])
        for a, b, module in ((output, weights[room], ours), (wanted, wanted_weights, theirs))
    ]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_room_is_not_computed_with() -> None:
    """A NaN beyond `kv_lengths` reaches no output, weight or other row's gradient."""
    ours, _ = make_pair()
    query, history = torch.randn(2, DIM, requires_grad=True), torch.randn(6, DIM)
    history[2], history[5] = torch.nan, torch.nan
    history.requires_grad_()
    call = {"q_offsets": make_offsets([1, 1]), "kv_offsets": make_offsets([3, 3])}
    output, (weights, _) = ours(query, history, history, kv_lengths=torch.tensor([2, 2]), **call)
    (output.sum() + weights.square().sum()).backward()
    for x in (output, weights, query.grad, history.grad[[0, 1, 3, 4]]):
        assert x.isfinite().all()


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("same", ["self", "apart"])
@pytest.mark.parametrize("path", ["fused", "pytorch"])
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
def test_nested(added: bool, path: str, same: str, layout: torch.layout, fused_calls: list) -> None:
    """Answers in the form it is given; weights are padded with zeros, as torch's are."""
    ours, theirs = make_pair(add_bias_kv=added, add_zero_attn=added, dtype=torch.float64, batch_first=True)
    if path == "pytorch":
        ours.dropout = 1e-12
    lengths = [L_LENGTHS if same == "self" else C_LENGTHS, L_LENGTHS, L_LENGTHS]
    parts = [list(x.split(n)) for x, n in zip(packed_batch(same), lengths, strict=True)]
    inputs = [torch.nested.nested_tensor(x, layout=layout, requires_grad=True) for x in parts]
    if same == "self":
        inputs, parts = [inputs[0]] * 3, [parts[0]] * 3
    output, weights = ours(*inputs, average_attn_weights=False)
    assert len(fused_calls) == (path == "fused")
    assert output.is_nested
    assert output.layout == layout
    assert weights.shape == (4, HEADS, max(lengths[0]), max(L_LENGTHS) + 2 * added)
    for user, (q, k, v) in enumerate(zip(*parts, strict=True)):
        if len(q) and (len(k) or added):
            wanted, wanted_weights = theirs(q, k, v, average_attn_weights=False)
            torch.testing.assert_close(output[user], wanted)
            of_user = torch.cat(
                [weights[user, :, : len(q), : len(k)], weights[user, :, : len(q), max(L_LENGTHS) :]], -1
            )
            torch.testing.assert_close(of_user, wanted_weights)
            torch.testing.assert_close(weights[user].sum(), wanted_weights.sum())
        else:
            assert (weights[user] == 0).all()
    torch.testing.assert_close(ours(*inputs)[1], weights.mean(1))
    (output + output)  # the result can be added to a residual of the same form
    if same == "self":
        (output + inputs[0])
    loss = sum(x.sin().sum() for x in output.unbind())
    loss.backward()
    assert inputs[0].grad.is_nested
    leaves = [[x.detach().clone().requires_grad_() for x in part] for part in parts]
    if same == "self":
        leaves = [leaves[0]] * 3
    loss = 0
    for q, k, v in zip(*leaves, strict=True):
        if len(q) and (len(k) or added):
            loss = loss + theirs(q, k, v)[0].sin().sum()
    loss.backward()
    for got, x in zip(inputs[0].grad.unbind(), leaves[0], strict=True):
        torch.testing.assert_close(got, torch.zeros_like(x) if x.grad is None else x.grad)


def test_nested_causal_and_narrowed() -> None:
    ours, theirs = make_pair(dtype=torch.float64)
    x = torch.randn(3, 6, DIM, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 3])
    narrowed = torch.nested.narrow(x, 1, torch.tensor([0, 1, 2]), lengths, layout=torch.jagged)
    output, _ = ours(narrowed, narrowed, narrowed, is_causal=True, need_weights=False)
    for user, (start, n) in enumerate(zip([0, 1, 2], lengths.tolist(), strict=True)):
        part = x[user, start : start + n]
        torch.testing.assert_close(output[user], theirs(part, part, part, attn_mask=causal(n, n))[0])
