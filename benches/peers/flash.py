"""flash-attn's variable-length attention, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from benches.case import Contender, Refused
from benches.jagged import PACKED, Batch, torch_contender
from benches.peers import need, need_device


def attention(batch: Batch) -> Contender:
    need_device(batch.device, "cuda")
    if batch.query.dtype == torch.float32:
        raise Refused("takes no float32")
    if batch.causal and batch.candidates != batch.events:
        raise Refused("its causal mask means this only where there are as many candidates as events")
    function = need("flash_attn").flash_attn_varlen_func
    offsets = batch.q_offsets.int(), batch.kv_offsets.int()
    longest = max(batch.candidates), max(batch.events)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(query, key, value, *offsets, *longest, causal=batch.causal)

    return torch_contender(batch, attend, PACKED)
