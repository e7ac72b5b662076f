"""The reference compiled by `torch.compile`, as somebody would do who has no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrec import reference
from benches.case import Contender
from benches.jagged import PACKED, Batch, torch_contender


def compiled(batch: Batch) -> Contender:
    """`torch.compile(reference.target_attention)`: a loop over users, compiled as far as it goes."""
    torch._dynamo.reset()
    function = torch.compile(reference.target_attention, dynamic=True)
    offsets, visible = (batch.q_offsets, batch.kv_offsets), batch.visible

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(query, key, value, *offsets, visible=visible)[0]

    return torch_contender(batch, attend, PACKED)
