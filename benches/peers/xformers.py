"""xformers' memory-efficient attention over a block-diagonal batch, on a GPU."""

from __future__ import annotations

from torch import Tensor

from benches.case import Contender, Refused
from benches.jagged import PACKED, Batch, torch_contender
from benches.peers import need, need_device


def attention(batch: Batch) -> Contender:
    need_device(batch.device, "cuda")
    if batch.grouped:
        raise Refused("not set up for grouped attention")
    ops = need("xformers.ops")
    mask = ops.fmha.BlockDiagonalMask.from_seqlens(batch.candidates, batch.events)
    if batch.causal:
        mask = mask.make_causal()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        one = (x.unsqueeze(0) for x in (query, key, value))
        return ops.memory_efficient_attention(*one, attn_bias=mask).squeeze(0)

    return torch_contender(batch, attend, PACKED)
