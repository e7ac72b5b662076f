"""Attention weights as a module returns them: with a gradient, and padded to a dense tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnrec.functional import target_attention_weights


def differentiable_weights(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    lse: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    even: bool,
    scale: float,
    self_key: Tensor | None,
    **options: Tensor | None,
) -> Tensor:
    """`target_attention_weights` with a gradient: `weights [sum C_b * L_b, H]`.

    `query` and `key` are `[.., H, D]`, `lse [T_c, H]` is that of `target_attention`. `even` says that every
    user has as many candidates and events as any other. The gradient goes to query, key, bias and `lse`.
    """
    with torch.no_grad():
        weights, _ = target_attention_weights(
            query, key, q_offsets, kv_offsets, scale=scale, self_key=self_key, key_bias=key_bias, **options
        )
    if not torch.is_grad_enabled():
        return weights  # and no look at requires_grad, which is False of what torch.vmap maps over
    other_offsets = None if kv_offsets is q_offsets else kv_offsets  # a compiler refuses one tensor twice
    return _WithGradient.apply(weights, query, key, key_bias, lse, q_offsets, other_offsets, even, scale)


class _WithGradient(torch.autograd.Function):
    """Gives the weights, which it returns, their gradient.

    `w = exp(s - lse)`, so `dL/ds = w dL/dw` and `dL/dlse = -sum w dL/dw` over the events; what lies behind
    the log-sum-exp (the other events, the self slot) is `target_attention`'s to differentiate. This runs for
    a loss that looks at the weights, and for no other; then it forms their gradients in memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, *_: Any) -> Tensor:
        return weights.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, query, key, key_bias, _, q_offsets, kv_offsets, ctx.even, ctx.scale = inputs
        ctx.save_for_backward(output, query, key, key_bias, q_offsets, kv_offsets)

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        weights, query, key, key_bias, q_offsets, kv_offsets = ctx.saved_tensors
        kv_offsets = q_offsets if kv_offsets is None else kv_offsets
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = weights.to(dtype) * grad_weights.to(dtype)
        heads, users = query.shape[1], q_offsets.shape[0] - 1
        if ctx.even and users:
            candidates, events = query.shape[0] // users, key.shape[0] // users
            scores = scores.view(users, candidates, events, heads)
            query, key = query.unflatten(0, (users, candidates)), key.unflatten(0, (users, events))
            grads = tuple(g.flatten(0, 1) for g in _score_grads(scores, query, key, ctx.scale))
        else:
            candidates, events = q_offsets.diff().tolist(), kv_offsets.diff().tolist()
            pairs = [c * n for c, n in zip(candidates, events, strict=True)]
            by_user = zip(scores.split(pairs), query.split(candidates), key.split(events), strict=True)
            parts = [_score_grads(s.view(len(q), len(k), heads), q, k, ctx.scale) for s, q, k in by_user]
            grads = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        grad_query, grad_key, grad_bias, grad_lse = grads
        return (
            None,
            grad_query.to(query.dtype),
            grad_key.to(key.dtype),
            None if key_bias is None else grad_bias.to(key_bias.dtype),
            grad_lse,
            *(None,) * 4,
        )


def _score_grads(scores: Tensor, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients to query, key, bias and log-sum-exp from those to the scores, `[.., C, L, H]`."""
    # An event without any weight is hidden; what it holds, a NaN even, must not be multiplied with.
    key = key.masked_fill((scores == 0).all(-3).unsqueeze(-1), 0)
    grad_query = torch.einsum("...clh,...lhd->...chd", scores, key.to(scores.dtype)) * scale
    grad_key = torch.einsum("...clh,...chd->...lhd", scores, query.to(scores.dtype)) * scale
    return grad_query, grad_key, scores.sum(-3), -scores.sum(-2)


def pad_weights(
    weights: Tensor, q_lengths: Tensor, kv_lengths: Tensor, rank: Tensor, candidates: int
) -> Tensor:
    """Jagged `weights [sum C_b * L_b, H]` as dense `[B, candidates, L, H]`, zeros where there are none.

    `q_lengths` and `kv_lengths` `[B]` are C_b and L_b; `rank [B, L]` is the place among the user's L_b
    events of what stands at l, or -1 where nothing does.
    """
    begins = pad((q_lengths * kv_lengths).cumsum(0), (1, 0))[:-1]
    candidate = torch.arange(candidates, device=weights.device)
    row = begins[:, None] + candidate * kv_lengths[:, None]
    real = (candidate < q_lengths[:, None])[:, :, None] & (rank >= 0)[:, None, :]
    index = (row[:, :, None] + rank[:, None, :]).masked_fill(~real, weights.shape[0])
    padded = pad(weights, (0, 0, 0, 1))  # the last row serves all that is not there
    return padded[index]
