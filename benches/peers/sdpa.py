"""`torch.nn.functional.scaled_dot_product_attention`, in each way that its users call it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benches.case import Contender, Refused
from benches.jagged import CONTIGUOUS, PACKED, PADDED, STRIDED, Batch, padding_mask, torch_contender


def contiguous(batch: Batch) -> Contender:
    """Dense `[B, H, n, D]`, every head's rows together."""
    return torch_contender(batch, _function(batch), CONTIGUOUS)


def strided(batch: Batch) -> Contender:
    """Dense, views of `[B, n, H, D]` as projections give them."""
    return torch_contender(batch, _function(batch), STRIDED)


def padded(batch: Batch) -> Contender:
    """Padded to the longest of the batch and masked; the padding itself is not timed."""
    if batch.dense:
        raise Refused("nothing to pad: the batch is dense")
    if batch.causal:
        # Real queries come before the padding, so that the causal mask hides it already.
        return torch_contender(batch, _function(batch), PADDED, note="padding not timed")
    mask = padding_mask(batch.events, batch.device)
    keep = None if mask is None else mask[:, None, None, :]
    return torch_contender(batch, partial(_function(batch), attn_mask=keep), PADDED, note="padding not timed")


def loop(batch: Batch) -> Contender:
    """One call for each user, on views of the packed rows."""
    function, q_counts, kv_counts = _function(batch), batch.candidates, batch.events

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        users = zip(query.split(q_counts), key.split(kv_counts), value.split(kv_counts), strict=True)
        outs = [function(*(x.transpose(0, 1).unsqueeze(0) for x in user)) for user in users]
        return torch.cat([out.squeeze(0).transpose(0, 1) for out in outs])

    return torch_contender(batch, attend, PACKED)


def nested(batch: Batch) -> Contender:
    """Nested tensors of torch's jagged layout."""
    if batch.grouped:
        raise Refused("nested tensors have no grouped heads")
    lengths = {"max_seqlen": max(batch.candidates)}, {"max_seqlen": max(batch.events)}
    q_offsets, kv_offsets, function = batch.q_offsets, batch.kv_offsets, _function(batch)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        of = torch.nested.nested_tensor_from_jagged
        q = of(query, q_offsets, **lengths[0]).transpose(1, 2)
        k, v = (of(x, kv_offsets, **lengths[1]).transpose(1, 2) for x in (key, value))
        return function(q, k, v).transpose(1, 2).values()

    # A nested tensor cannot be made in inference mode.
    return torch_contender(batch, attend, PACKED, inference=torch.no_grad)


def _function(batch: Batch) -> Callable[..., Tensor]:
    if batch.causal and batch.candidates != batch.events:
        raise Refused("its causal mask means this only where there are as many candidates as events")
    return partial(scaled_dot_product_attention, is_causal=batch.causal, enable_gqa=batch.grouped)
