"""Attention weights as a module returns them: with a gradient, and padded to a dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnrec.functional import target_attention_weights


class Weights(torch.autograd.Function):
    """`target_attention_weights` as a differentiable function of the scores and their log-sum-exp.

    `w = exp(s - lse)`, so `dL/ds = w dL/dw` and `dL/dlse = -sum w dL/dw` over the events; what lies
    behind the log-sum-exp (the other events, the self slot) is `target_attention`'s to differentiate.
    Forward is the fused op. Backward runs for a loss that looks at the weights and for no other; it forms
    their gradients in memory.

    Takes `query, key [.., H, D]`, `key_bias [T_l, H]` or None, `lse [T_c, H]`, then what has no
    gradient: `even`, `(B, C, L)` if every user has C candidates and L events or None, and the op's options.
    Gives `weights [sum C_b * L_b, H]`.
    """

    @staticmethod
    def forward(
        ctx, query, key, key_bias, lse, q_offsets, kv_offsets, even, scale, kv_lengths, visible, self_key
    ):
        weights, _ = target_attention_weights(
            query.detach(),
            key.detach(),
            q_offsets,
            kv_offsets,
            scale=scale,
            kv_lengths=kv_lengths,
            visible=visible,
            self_key=None if self_key is None else self_key.detach(),
            key_bias=None if key_bias is None else key_bias.detach(),
        )
        ctx.save_for_backward(query, key, key_bias, weights, q_offsets, kv_offsets)
        ctx.even, ctx.scale = even, scale
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights):
        query, key, key_bias, weights, q_offsets, kv_offsets = ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = weights.to(dtype) * grad_weights.to(dtype)
        if ctx.even is not None:
            users, candidates, events = ctx.even
            scores = scores.view(users, candidates, events, scores.shape[1])
            grads = _score_grads(
                scores, query.unflatten(0, (users, candidates)), key.unflatten(0, (users, events)), ctx.scale
            )
            grads = tuple(g.flatten(0, 1) for g in grads)
        else:
            candidates, events = q_offsets.diff().tolist(), kv_offsets.diff().tolist()
            pairs = [c * n for c, n in zip(candidates, events, strict=True)]
            users = zip(scores.split(pairs), query.split(candidates), key.split(events), strict=True)
            parts = [_score_grads(s.view(len(q), len(k), s.shape[1]), q, k, ctx.scale) for s, q, k in users]
            grads = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        grad_query, grad_key, grad_bias, grad_lse = grads
        return (
            grad_query.to(query.dtype),
            grad_key.to(key.dtype),
            None if key_bias is None else grad_bias.to(key_bias.dtype),
            grad_lse,
            *(None,) * 7,
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
    begins = torch.nn.functional.pad((q_lengths * kv_lengths).cumsum(0), (1, 0))[:-1]
    candidate = torch.arange(candidates, device=weights.device)
    row = begins[:, None] + candidate * kv_lengths[:, None]
    real = (candidate < q_lengths[:, None])[:, :, None] & (rank >= 0)[:, None, :]
    index = (row[:, :, None] + rank[:, None, :]).masked_fill(~real, weights.shape[0])
    padded = torch.nn.functional.pad(weights, (0, 0, 0, 1))  # the last row serves all that is not there
    return padded[index]
