"""`torch.nn.attention.flex_attention`, compiled."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benches.case import Contender, Refused
from benches.jagged import CONTIGUOUS, Batch, Layout, torch_contender

# Packed rows as one sequence, [1, H, T, D].
ONE_SEQUENCE = Layout(
    lambda rows, counts: rows.transpose(0, 1).unsqueeze(0).contiguous(),
    lambda out, counts: out.squeeze(0).transpose(0, 1),
)


def attention(batch: Batch) -> Contender:
    """Dense batches as they are; jagged ones packed, with a block mask that is made once and not timed."""
    if batch.train and batch.device.type == "cpu":
        raise Refused("flex_attention has no gradient on the CPU")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention)
    function = partial(compiled, enable_gqa=batch.grouped)
    if batch.dense and not batch.causal:
        return torch_contender(batch, function, CONTIGUOUS)
    user_of_row = _user_of(batch.candidates, batch.device)
    user_of_event = _user_of(batch.events, batch.device)
    event = torch.cat([torch.arange(n) for n in batch.events]).to(batch.device)
    visible = batch.visible
    if visible is None:
        visible = torch.tensor(batch.events, device=batch.device)[user_of_row]

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (user_of_row[row] == user_of_event[column]) & (event[column] < visible[row])

    mask = create_block_mask(sees, None, None, len(user_of_row), len(event), device=batch.device.type)
    return torch_contender(
        batch, partial(function, block_mask=mask), ONE_SEQUENCE, note="block mask not timed"
    )


def _user_of(counts: list[int], device: torch.device) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
