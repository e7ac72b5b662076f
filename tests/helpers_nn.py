"""What the tests of `attnrec.nn` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import attnrec
from attnrec.nn import FusedMultiHeadAttention, fused

DIM, HEADS = 32, 2


@contextmanager
def recorded_calls() -> Iterator[list[dict[str, Any]]]:
    """The arguments of each call of the fused kernels, by name."""
    calls = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *offsets: Tensor, **options: Any) -> Any:
        calls.append({"query": query, "key": key, "value": value, **options})
        return attnrec.target_attention(query, key, value, *offsets, **options)

    with mock.patch.object(fused, "target_attention", spy):
        yield calls


@contextmanager
def forced_plan(raw_history: bool) -> Iterator[None]:
    """Attends over the raw history, or projects it, whatever the counts say."""

    def decided(*_: int) -> bool:  # a Mock could not be compiled
        return raw_history

    with mock.patch.object(fused, "prefers_raw_history", decided):
        yield


def causal(candidates: int, events: int) -> Tensor:
    return torch.ones(candidates, events, dtype=torch.bool).triu(1)


def make_pair(
    embed_dim: int = DIM, heads: int = HEADS, **arguments: Any
) -> tuple[FusedMultiHeadAttention, nn.MultiheadAttention]:
    """The fused module and torch's, with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(embed_dim, heads, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    ours = FusedMultiHeadAttention(embed_dim, heads, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(
    module: nn.Module, inputs: list[Tensor], same: str, look_at_weights: bool = True, **call: Any
) -> dict[str, Tensor]:
    """Output, weights, and all gradients of a random projection of both, or of the output alone."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    if same == "self":
        query = key = value = leaves[0]
    elif same == "shared":
        query, key = leaves[:2]
        value = key
    else:
        query, key, value = leaves
    module.zero_grad()
    output, weights = module(query, key, value, **call)
    generator = torch.Generator().manual_seed(2)

    def direction(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    loss = (output * direction(output)).sum()
    found = {"output": output}
    if weights is not None and look_at_weights:
        loss = loss + (weights * direction(weights)).sum()
        found["weights"] = weights
    loss.backward()
    for name, x in zip(("query", "key", "value"), leaves, strict=False):
        if x.grad is not None:
            found[f"gradient of {name}"] = x.grad
    for name, parameter in module.named_parameters():
        found[f"gradient of {name}"] = parameter.grad
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], what: str = "") -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(
            got[name], x, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{what} {n}: {m}"
        )
