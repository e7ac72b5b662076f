"""Projected keys and values of one user's events, kept so that an event is projected once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrec import target_attention
from attnrec.nn import FusedMultiHeadAttention
from attnrec.nn.projections import split_in_projection


class KeyValueCache:
    """What an attention has projected of a user's events so far. Grows in place, in rows of room for more.

    `target_attention` takes the room as it is: `kv_lengths` says how much of it are events.
    """

    def __init__(self, attention: FusedMultiHeadAttention) -> None:
        self._attention = attention
        (self._w_q, w_k, w_v), (self._b_q, b_k, b_v) = split_in_projection(attention)
        self._projections = (w_k, b_k), (w_v, b_v)
        self._stored = [w_k.new_empty(0, attention.num_heads, attention.head_dim) for _ in range(2)]
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        """Projects further events, `[n, E]`."""
        end = self.length + len(key)
        room = len(self._stored[0])
        if end > room:
            # half as much again as is needed, so that events that come one by one are seldom copied
            more = end + end // 2 - room
            self._stored = [F.pad(stored, (0, 0, 0, 0, 0, more)) for stored in self._stored]
        for stored, rows, (weight, bias) in zip(self._stored, (key, value), self._projections, strict=True):
            stored[self.length : end] = self._by_head(F.linear(rows, weight, bias))
        self.length = end

    def attend(self, query: Tensor, visible: Tensor | None = None) -> Tensor:
        """The module's output `[C, E]` for queries `[C, E]` over all events, or the first `visible [C]`."""
        key, value = self._stored
        out = target_attention(
            self._by_head(F.linear(query, self._w_q, self._b_q)),
            key,
            value,
            torch.tensor([0, len(query)], device=query.device),
            torch.tensor([0, len(key)], device=query.device),
            kv_lengths=torch.tensor([self.length], device=query.device),
            max_kv_length=self.length,
            visible=visible,
        )
        return self._attention.out_proj(out.flatten(1))

    def attend_causally(self, events: Tensor) -> Tensor:
        """Self-attention of further events `[n, E]`: each over those before it and itself."""
        first = self.length
        self.append(events, events)
        visible = torch.arange(first + 1, self.length + 1, device=events.device)
        return self.attend(events, visible)

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, (self._attention.num_heads, self._attention.head_dim))
