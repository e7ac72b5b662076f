"""Attention by PyTorch, for what the fused kernels do not cover: any mask, dropout, any head dim."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

_told: set[str] = set()


def say_once(reason: str) -> None:
    """Warn, once in this process for each reason, that a call does not use the fused kernels."""
    if torch.compiler.is_compiling() or reason in _told:
        return
    _told.add(reason)
    warnings.warn(
        f"FusedMultiHeadAttention computes with PyTorch's attention here: {reason}. The results are right, "
        "but not faster. This is said once.",
        stacklevel=6,  # past forward and what nn.Module calls it through
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """`query [B, H, C, D]`, `key` and `value [B, H, L, D]` -> `out [B, H, C, D]`, `weights`.

    `mask` is added to the scores and broadcasts to `[B, H, C, L]`. A query with every key masked gets
    zeros. Dropout draws its numbers as `torch.nn.MultiheadAttention` does, on the same seed the same.
    """
    empty = None
    if mask is not None:
        # A softmax over nothing is NaN, and so is its gradient: such rows see everything first, then nothing.
        empty = (mask == -torch.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(empty, 0).to(query.dtype)
    if not need_weights:
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return (out if empty is None else out.masked_fill(empty, 0)), None
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ value, weights
