"""What torch's attention masks mean to the fused kernels.

The kernels take no mask. They know a user's number of events (`kv_lengths` or packed offsets), a prefix
per query (`visible`) and an additive bias per event (`key_bias`). Every `key_padding_mask` can be
written with these, and every `attn_mask` whose rows hide a tail, as a causal mask's do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def readable(mask: Tensor) -> bool:
    """Whether looking at the mask's values is possible and costs no synchronisation.

    Not under `torch.compile` and `torch.export` (a shape would depend on data), not on an accelerator,
    not on a fake tensor.
    """
    return (
        not torch.compiler.is_compiling()
        and mask.device.type == "cpu"
        and type(mask) in (Tensor, torch.nn.Parameter)
    )


def hidden_by(mask: Tensor) -> Tensor:
    """Where a boolean (True hides) or additive (-inf hides) mask hides, as a boolean tensor."""
    return mask if mask.dtype == torch.bool else mask == -torch.inf


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to the scores: 0 or -inf for a boolean one."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    return mask.to(dtype)


@dataclass
class Padding:
    """A `key_padding_mask [B, L]` in the kernels' terms.

    Either the real events are packed (`index`: their rows among the `B * L`), or nothing is moved and
    `key_bias` hides the others.
    """

    kv_offsets: Tensor  # [B+1]
    index: Tensor | None = None  # [T_l], rows of the real events
    keep: Tensor | None = None  # [B, L] bool, beside index
    kv_lengths: Tensor | None = None  # [B]
    key_bias: Tensor | None = None  # [T_l]

    def visible(self, visible: Tensor) -> Tensor:
        """Prefix lengths `[B, C]` over the padded events as prefix lengths over the packed ones."""
        if self.keep is None:
            return visible
        before = torch.nn.functional.pad(self.keep.cumsum(1), (1, 0))
        return before.gather(1, visible)


def even_offsets(users: int, size: int, device: torch.device) -> Tensor:
    """Offsets `[users + 1]` of a dense batch: every user has `size` rows."""
    if size == 0 or torch.compiler.is_compiling():  # to which the shape below would not be users + 1
        return torch.arange(users + 1, device=device) * size
    return torch.arange(0, users * size + 1, size, device=device)


def read_padding(mask: Tensor | None, users: int, events: int, device: torch.device) -> Padding:
    """Turn a `key_padding_mask [B, L]` (or None) into what the kernels take.

    On the CPU the values are read, so that hidden events are neither projected nor attended. Elsewhere
    nothing may depend on them: hidden events get a bias of -inf, and `kv_lengths` cuts each user's tail.
    """
    offsets = even_offsets(users, events, device)
    if mask is None:
        return Padding(offsets)
    hidden = hidden_by(mask)
    if not readable(mask):
        position = torch.arange(1, events + 1, device=device)
        lengths = (position * ~hidden).amax(1) if events else torch.zeros_like(offsets[1:])
        return Padding(offsets, kv_lengths=lengths, key_bias=additive(mask, torch.float32).reshape(-1))
    index, keep = None, None
    if bool(hidden.any()):
        keep = ~hidden
        index = keep.reshape(-1).nonzero().squeeze(1)
        offsets = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    bias = None
    if mask.dtype != torch.bool:
        bias = mask.reshape(-1) if index is None else mask.reshape(-1).index_select(0, index)
        if not bias.requires_grad and not bool(bias.any()):
            bias = None  # it only hid events, and those are gone
    return Padding(offsets, index=index, keep=keep, key_bias=bias)


def read_attn_mask(mask: Tensor, is_causal: bool, users: int, heads: int) -> Tensor | None:
    """The prefix lengths `[B, C]` that an `attn_mask` amounts to, or None if it is not of that kind.

    `mask` is `[C, L]` or `[B * heads, C, L]`. Where its values cannot be read (see `readable`) the
    caller's hint `is_causal` decides; where they can, they count, also against a wrong hint.
    """
    queries, events = mask.shape[-2:]
    if not readable(mask):
        if not is_causal:
            return None
        position = torch.arange(1, queries + 1, device=mask.device).clamp(max=events)
        return position.expand(users, queries)
    if mask.requires_grad:
        return None
    hidden = hidden_by(mask)
    if bool((hidden[..., :-1] & ~hidden[..., 1:]).any()):
        return None  # an event is seen after a hidden one
    if mask.dtype != torch.bool and not bool((mask == 0).logical_or_(hidden).all()):
        return None
    visible = events - hidden.sum(-1)
    if mask.dim() == 2:
        return visible.expand(users, queries)
    visible = visible.view(users, heads, queries)
    return visible[:, 0] if bool((visible == visible[:, :1]).all()) else None


def dense_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks as one that is added to scores `[B, H, C, L]`, for batch-first `query`."""
    mask = None
    if attn_mask is not None:
        mask = additive(attn_mask, query.dtype)
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (query.shape[0], -1))
    if key_padding_mask is not None:
        padding = additive(key_padding_mask, query.dtype)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask
