"""The attention of a module over jagged rows, by the fused kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnrec.functional import target_attention

from .projections import prefers_raw_history, project, project_candidates, project_sums
from .weights import differentiable_weights

if TYPE_CHECKING:
    from .attention import FusedMultiHeadAttention


@dataclass
class Rows:
    """A module's input in the kernels' own form; what is one tensor for the caller is one here."""

    query: Tensor  # [T_c, embed_dim]
    key: Tensor  # [T_l, kdim]
    value: Tensor  # [T_l, vdim]
    q_offsets: Tensor  # [B+1]
    kv_offsets: Tensor  # [B+1]
    kv_lengths: Tensor | None = None  # [B]
    visible: Tensor | None = None  # [T_c]
    key_bias: Tensor | None = None  # [T_l]
    even: tuple[int, int, int] | None = None  # (B, C, L) if every user has C candidates and L events
    max_kv_length: int | None = None  # at least the events of the longest history, if known

    def causal(self) -> Tensor:
        """`visible` of causal attention: a user's n-th candidate sees its first n events."""
        row = torch.arange(self.query.shape[0], dtype=self.q_offsets.dtype, device=self.query.device)
        # Offsets that end before the last row are refused where the kernels are called, and must come so far.
        end = torch.searchsorted(self.q_offsets, row, right=True).clamp(max=self.q_offsets.shape[0] - 1)
        begin = end - 1
        room = self.kv_offsets[end] - self.kv_offsets[begin]
        return torch.minimum(row - self.q_offsets[begin] + 1, room)

    def pair_offsets(self) -> Tensor:
        """Offsets `[B+1]` of the users' weights."""
        pairs = self.q_offsets.diff().long() * self.kv_offsets.diff().long()
        return torch.nn.functional.pad(pairs.cumsum(0), (1, 0))


@dataclass
class FusedWeights:
    """Weights of the events, `[sum C_b * L_b, H]`, and of the columns that a module adds, `[T_c, H]`."""

    events: Tensor
    added: list[Tensor]


def attend(
    module: FusedMultiHeadAttention, rows: Rows, need_weights: bool
) -> tuple[Tensor, FusedWeights | None]:
    """Projects and attends: `out [T_c, embed_dim]` before the output projection, and the weights.

    `bias_k` and `bias_v` are the kernels' self slot. The key of zeros that `add_zero_attn` adds scores 0: it
    takes the share `1 / (1 + exp(lse))` of every row and gives nothing, so it is a factor on the rest.
    """
    raw = _attends_raw_history(module, rows)
    if raw:
        q = project_candidates(module, rows.query)
        k = rows.key.to(q.dtype).unsqueeze(1)
        v = k if rows.value is rows.key else rows.value.to(q.dtype).unsqueeze(1)
    else:
        q, k, v = project(module, rows.query, rows.key, rows.value)
    scale = module.head_dim**-0.5
    options = {"kv_lengths": rows.kv_lengths, "visible": rows.visible}
    self_key = self_value = key_bias = None
    if module.bias_k is not None:
        slot = (1, module.num_heads, module.head_dim)
        self_key = module.bias_k.to(q.dtype).view(slot).expand_as(q)
        self_value = module.bias_v.to(q.dtype).view(slot).expand_as(q)
    if rows.key_bias is not None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        key_bias = rows.key_bias.to(dtype).unsqueeze(1).expand(-1, module.num_heads)
    out, lse = target_attention(
        q,
        k,
        v,
        rows.q_offsets,
        rows.kv_offsets,
        scale=scale,
        self_key=self_key,
        self_value=self_value,
        key_bias=key_bias,
        max_kv_length=rows.max_kv_length,
        return_lse=True,
        **options,
    )
    if raw:
        out = project_sums(module, out, lse)
    if module.add_zero_attn:
        out = (out * lse.sigmoid().unsqueeze(-1)).to(out.dtype)
    out = out.reshape(-1, module.embed_dim)
    if not need_weights:
        return out, None

    if raw:
        k = k.expand(-1, module.num_heads, -1)
    weights = differentiable_weights(
        q,
        k,
        key_bias,
        lse,
        rows.q_offsets,
        rows.kv_offsets,
        even=rows.even is not None,
        scale=scale,
        self_key=self_key,
        **options,
    )
    added = []
    if self_key is not None:
        added.append(((q * self_key).sum(-1) * scale - lse).exp())
    if module.add_zero_attn:
        gate = lse.sigmoid()
        added = [*(x * gate for x in added), (-lse).sigmoid()]
        weights = (weights * _of_each_pair(rows, gate)).to(q.dtype)
    return out, FusedWeights(weights, [x.to(q.dtype) for x in added])


def _attends_raw_history(module: FusedMultiHeadAttention, rows: Rows) -> bool:
    """Whether the kernels get the history as it is; decided by shapes alone, so without reading offsets."""
    if module.bias_k is not None or module.add_zero_attn:
        return False  # the key's bias no longer cancels against what is not of the history
    if torch.compiler.is_exporting():
        return False  # an exported graph holds one plan, and comparing costs would bound its dynamic shapes
    candidates, events = rows.query.shape[0], rows.key.shape[0]
    return prefers_raw_history(
        candidates,
        events,
        candidates * events // max(rows.q_offsets.shape[0] - 1, 1),
        module.embed_dim,
        module.num_heads,
        module.kdim,
        module.vdim,
        rows.query.element_size(),
    )


def _of_each_pair(rows: Rows, x: Tensor) -> Tensor:
    """`x [T_c, H]` repeated for every event of the candidate's user: `[sum C_b * L_b, H]`."""
    if rows.even is not None:
        users, candidates, events = rows.even
        return x.unsqueeze(1).expand(users * candidates, events, x.shape[1]).flatten(0, 1)
    events = rows.kv_offsets.diff().repeat_interleave(rows.q_offsets.diff())
    return x.repeat_interleave(events, 0)
