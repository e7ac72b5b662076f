"""Dense and nested attention input, seen as the native jagged batch.

`Native` holds what the attention ops take and knows the way back. Nothing is copied where strides allow: a
dense `[B, H, n, D]` is read either with its heads in place (a transposed view of `[B, n, H, D]`, as
projections give it) or with the heads folded into the users (contiguous `[B, H, n, D]`: every head a user of
its own).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Native:
    """Arguments of an attention op, and how its results return to the form that the caller gave.

    `options` are the optional tensors by name. `rows(x)` maps `x [T_c, H, ...]`, a result per candidate and
    head. `pairs(x, offsets)` maps the weights `x [sum C_b * L_b, H]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    q_offsets: Tensor
    kv_offsets: Tensor
    options: dict[str, Tensor | None]
    rows: Callable[[Tensor], Tensor]
    pairs: Callable[[Tensor, Tensor], Any]


# --- dense --------------------------------------------------------------------------------------------------


def _merges(x: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether a view can make one dimension of `dims`."""
    expected = None
    for dim in reversed(dims):
        if x.shape[dim] == 1:
            continue
        if expected is not None and x.stride(dim) != expected:
            return False
        expected = x.stride(dim) * x.shape[dim]
    return True


def _copied(tensors: list[Tensor], dims: tuple[int, ...]) -> int:
    """Elements that must be copied before `dims` of the tensors are one."""
    return sum(x.numel() for x in tensors if not _merges(x, dims))


def _offsets(users: int, n: int, device: torch.device) -> Tensor:
    return torch.arange(users + 1, device=device) * n


def lengths_of_mask(key_padding_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """`key_padding_mask [B, L]` (True hides) as `(kv_lengths [B], bias [B, L] or None)`.

    The length ends at the last event that is shown; hidden ones before it get a bias of -inf. Whether there
    are any is looked up only on the CPU and outside of a compiler: elsewhere it would cost a synchronisation
    or a graph break.
    """
    n = key_padding_mask.shape[1]
    position = torch.arange(1, n + 1, device=key_padding_mask.device)
    lengths = (
        key_padding_mask.logical_not().mul(position).amax(1) if n else key_padding_mask.new_zeros(0).sum(1)
    )
    if not torch.compiler.is_compiling() and key_padding_mask.device.type == "cpu":
        if torch.equal(key_padding_mask, position > lengths.unsqueeze(1)):
            return lengths, None
    bias = torch.zeros(key_padding_mask.shape, device=key_padding_mask.device)
    return lengths, bias.masked_fill(key_padding_mask, -torch.inf)


def from_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    kv_lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    self_value: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Native:
    """Dense `query [B, H, C, D]`, `key`/`value [B, H_kv, L, D]`, `visible [B, C]`, `key_bias [B, H, L]`."""
    users, heads, candidates, _ = query.shape
    kv_heads, events = key.shape[1], key.shape[2]
    if key_padding_mask is not None:
        kv_lengths, holes = lengths_of_mask(key_padding_mask)
        if holes is not None:
            holes = holes.unsqueeze(1).expand(users, heads, events)
            key_bias = holes if key_bias is None else key_bias + holes

    large = [x for x in (query, key, value, self_key, self_value) if x is not None]
    # With grouped heads, folded heads share their key: no per-head bias and no self slot of the group's own.
    may_fold = heads == kv_heads or (key_bias is None and self_key is None)
    fold = may_fold and _copied(large, (0, 1, 2)) < _copied(large, (0, 2))

    def per_head(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.flatten(0, 2).unsqueeze(1) if fold else x.transpose(1, 2).flatten(0, 1)

    def per_user(x: Tensor | None, copies: int) -> Tensor | None:
        if x is None:
            return None
        return x.unsqueeze(1).expand(x.shape[0], copies, *x.shape[1:]).flatten() if fold else x.flatten()

    def rows(x: Tensor) -> Tensor:
        if fold:
            return x.squeeze(1).unflatten(0, (users, heads, candidates))
        return x.unflatten(0, (users, candidates)).transpose(1, 2)

    def pairs(weights: Tensor, _: Tensor) -> Tensor:
        if fold:
            return weights.view(users, heads, candidates, events)
        return weights.view(users, candidates, events, heads).permute(0, 3, 1, 2)

    # Folded, the heads of a group are further candidates of their key's user.
    native_users, group = (users * kv_heads, heads // kv_heads) if fold else (users, 1)
    bias = None if key_bias is None else per_head(key_bias.unsqueeze(-1)).squeeze(-1)
    return Native(
        per_head(query),
        per_head(key),
        per_head(value),
        _offsets(native_users, group * candidates, query.device),
        _offsets(native_users, events, query.device),
        {
            "kv_lengths": per_user(kv_lengths, kv_heads),
            "visible": per_user(visible, heads),
            "self_key": per_head(self_key),
            "self_value": per_head(self_value),
            "key_bias": bias,
        },
        rows,
        pairs,
    )


# --- nested -------------------------------------------------------------------------------------------------


def nested_values(x: Tensor | None) -> Tensor | None:
    """Packed `[T, ...]` of a jagged nested tensor, ragged in dimension 1 or 2; other tensors as they are."""
    if x is None or not x.is_nested:
        return x
    if x._ragged_idx == 2:
        x = x.transpose(1, 2)
    if x.lengths() is not None:  # a narrowed tensor, with room between its users
        x = x.contiguous()
    return x.values()


def from_nested(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    kv_lengths: Tensor | None = None,
    **options: Tensor | None,
) -> Native:
    """Nested `query [B, j, H, D]` or `[B, H, j, D]`, likewise key and value; options nested or packed."""
    q_offsets, transposed = query.offsets(), query._ragged_idx == 2

    def rows(x: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(x, q_offsets)
        return nested.transpose(1, 2) if transposed else nested

    return Native(
        nested_values(query),
        nested_values(key),
        nested_values(value),
        q_offsets,
        key.offsets(),
        {"kv_lengths": kv_lengths} | {name: nested_values(x) for name, x in options.items()},
        rows,
        torch.nested.nested_tensor_from_jagged,
    )
