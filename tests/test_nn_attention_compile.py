"""`FusedMultiHeadAttention` under `torch.compile`, `torch.export`, `torch.func` and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import make_offsets
from helpers_nn import DIM, HEADS, causal, forced_plan, make_pair
from torch import Tensor, nn

from attnrec.nn import FusedMultiHeadAttention, swap_attention

EVENTS = 7

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:FusedMultiHeadAttention computes with PyTorch"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def make_call(kind: str, users: int, candidates: int) -> dict[str, Any]:
    hidden = torch.rand(users, EVENTS) < 0.5
    return {
        "plain": {"need_weights": False},
        "weights": {},
        "padding": {"key_padding_mask": hidden, "average_attn_weights": False},
        "causal": {"attn_mask": causal(candidates, EVENTS), "is_causal": True, "need_weights": False},
        "any_mask": {"attn_mask": torch.randn(candidates, EVENTS)},
    }[kind]


def loss(results: tuple[Tensor, Tensor | None]) -> Tensor:
    return sum(x.sin().sum() for x in results if x is not None)


@pytest.mark.parametrize("kind", ["plain", "weights", "padding", "causal", "any_mask"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, kind: str) -> None:
    """One graph, forward and backward, for batches of changing shapes."""
    module, _ = make_pair(batch_first=True, add_bias_kv=True, add_zero_attn=True)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for users, candidates in ((3, 5), (2, 4)):
        call = make_call(kind, users, candidates)
        query = torch.randn(users, candidates, DIM, requires_grad=True)
        history = torch.randn(users, EVENTS, DIM, requires_grad=True)
        got, wanted = (f(query, history, history, **call) for f in (compiled, module))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(loss(x), [query, history]) for x in (got, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_compile_both_plans(raw: bool) -> None:
    module, _ = make_pair(batch_first=True)
    query, history = torch.randn(2, 3, DIM), torch.randn(2, EVENTS, DIM)
    with forced_plan(raw):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got, wanted = (f(query, history, history) for f in (compiled, module))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_compile_with_inductor() -> None:
    module, _ = make_pair(batch_first=True)
    x, hidden = torch.randn(2, EVENTS, DIM), torch.arange(EVENTS) >= torch.tensor([[7], [3]])
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    got, wanted = (f(x, x, x, key_padding_mask=hidden) for f in (compiled, module))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    loss(got).backward()


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile_packed(need_weights: bool) -> None:
    module, _ = make_pair()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = torch.randn(6, DIM, requires_grad=True)
    call = {"q_offsets": make_offsets([2, 0, 4]), "is_causal": True, "need_weights": need_weights}
    got, wanted = (f(x, x, x, **call) for f in (compiled, module))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(result[0].sin().sum(), x) for result in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile_nested(need_weights: bool) -> None:
    module, _ = make_pair()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = torch.nested.nested_tensor([torch.randn(n, DIM) for n in (2, 5, 3)], layout=torch.jagged)
    got, wanted = (f(x, x, x, need_weights=need_weights, is_causal=True) for f in (compiled, module))
    torch.testing.assert_close(got[0].values(), wanted[0].values(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-5)


def test_compile_a_swapped_encoder() -> None:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    swap_attention(encoder)
    x, mask = torch.randn(2, EVENTS, DIM), nn.Transformer.generate_square_subsequent_mask(EVENTS)
    for train in (True, False):
        encoder.train(train)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(train):
            got, wanted = (f(x, mask=mask, is_causal=True) for f in (compiled, encoder))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_export(padded: bool, strict: bool) -> None:
    """With every size dynamic."""
    module = make_pair(batch_first=True)[0].eval()
    users, candidates, events = (torch.export.Dim(name) for name in ("users", "candidates", "events"))
    shapes: dict[str, Any] = {
        "query": {0: users, 1: candidates},
        "key": {0: users, 1: events},
        "value": {0: users, 1: events},
        "need_weights": None,
    }

    def make_arguments(b: int, c: int, n: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        mask = {"key_padding_mask": torch.rand(b, n) < 0.4} if padded else {}
        args = torch.randn(b, c, DIM), torch.randn(b, n, DIM), torch.randn(b, n, DIM)
        return args, {**mask, "need_weights": padded}

    if padded:
        shapes["key_padding_mask"] = {0: users, 1: events}
    args, kwargs = make_arguments(3, 5, 7)
    program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=strict)
    for sizes in ((3, 5, 7), (2, 9, 4)):
        args, kwargs = make_arguments(*sizes)
        got, wanted = program.module()(*args, **kwargs), module(*args, **kwargs)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_functional_gradient(need_weights: bool) -> None:
    module, _ = make_pair(batch_first=True)
    x = torch.randn(2, EVENTS, DIM)

    def of(parameters: dict[str, Tensor]) -> Tensor:
        call = {"need_weights": need_weights}
        return loss(torch.func.functional_call(module, parameters, (x, x, x), call))

    got = torch.func.grad(of)({name: p.detach() for name, p in module.named_parameters()})
    loss(module(x, x, x, need_weights=need_weights)).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_vmap_keeps_the_gradient(need_weights: bool) -> None:
    module, _ = make_pair(batch_first=True, add_zero_attn=True)
    batches = torch.randn(3, 2, EVENTS, DIM)
    grads = []
    for mapped in (True, False):
        module.zero_grad()

        def run(x: Tensor) -> Tensor:
            return module(x, x, x, need_weights=need_weights)[int(need_weights)]

        result = torch.vmap(run)(batches) if mapped else torch.stack([run(x) for x in batches])
        result.sin().sum().backward()
        grads.append(module.in_proj_weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert (grads[0] != 0).any()


def test_higher_derivatives_raise() -> None:
    module, _ = make_pair(batch_first=True)
    x = torch.randn(2, EVENTS, DIM, requires_grad=True)
    for need_weights in (False, True):
        result = module(x, x, x, need_weights=need_weights)[int(need_weights)]
        grad = torch.autograd.grad(result.sin().sum(), x, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="second-order"):
            grad.sum().backward()
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda y, w=need_weights: module(y, y, y, need_weights=w)[int(w)], (x,), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
def test_autocast(added: bool, raw: bool, dtype: torch.dtype) -> None:
    """Results have autocast's dtype, gradients the parameters'."""
    ours, theirs = make_pair(64, 4, batch_first=True, add_bias_kv=added, add_zero_attn=added)
    query, history = torch.randn(2, 3, 64), torch.randn(2, 9, 64)
    hidden = torch.arange(9) >= torch.tensor([[9], [4]])
    with torch.autocast("cpu", dtype), forced_plan(raw):
        got, wanted = (f(query, history, history, key_padding_mask=hidden) for f in (ours, theirs))
    assert got[0].dtype == dtype
    torch.testing.assert_close(got[0], wanted[0], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(got[1].float(), wanted[1].float(), rtol=3e-2, atol=3e-2)
    got[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_meta_device() -> None:
    module = FusedMultiHeadAttention(DIM, HEADS, batch_first=True, device="meta")
    x, hidden = torch.randn(2, 4, DIM, device="meta"), torch.zeros(2, 4, dtype=torch.bool, device="meta")
    assert module(x, x, x, key_padding_mask=hidden, need_weights=False)[0].shape == (2, 4, DIM)
