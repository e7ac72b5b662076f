"""The forms of a module's input: checks, and jagged input as rows and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnrec.layout import known_max_length
from attnrec.ops import target_attention
from attnrec.ops.checks import reads_values

from .fused import FusedWeights, Rows
from .weights import pad_weights

if TYPE_CHECKING:
    from .attention import FusedMultiHeadAttention


def check_dense(
    module: FusedMultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Raises where dense input does not fit together."""
    if query.dim() not in (2, 3):
        raise ValueError(f"query must be 3-D, or 2-D for unbatched input, got {query.dim()}-D")
    unbatched = query.dim() == 2
    for name, x, features in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x.is_nested:
            raise ValueError(f"{name} is nested but query is not: all three must have one form")
        if x.dim() != query.dim():
            raise ValueError(f"{name} must be {query.dim()}-D as query is, got {x.dim()}-D")
        if x.shape[-1] != features:
            raise ValueError(f"{name} must have {features} features, got shape {tuple(x.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"value must have as many rows as key, got {tuple(value.shape)} for key {tuple(key.shape)}"
        )
    length, batch = (0, 1) if unbatched or not module.batch_first else (1, 0)
    if not unbatched and key.shape[batch] != query.shape[batch]:
        raise ValueError(
            f"key must have query's batch size {query.shape[batch]}, got {key.shape[batch]} "
            f"(batch_first={module.batch_first})"
        )
    users = 1 if unbatched else query.shape[batch]
    candidates, events = query.shape[length], key.shape[length]
    shapes = {
        "key_padding_mask": [(events,)] if unbatched else [(users, events)],
        "attn_mask": [(candidates, events), (users * module.num_heads, candidates, events)],
    }
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name} must be boolean or floating point, got {mask.dtype}")
        if tuple(mask.shape) not in shapes[name]:
            needed = " or ".join(str(shape) for shape in shapes[name])
            raise ValueError(f"{name} must have shape {needed}, got {tuple(mask.shape)}")
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal is a hint about attn_mask, which is missing; "
            "torch.nn.Transformer.generate_square_subsequent_mask makes one"
        )


@dataclass
class JaggedInput:
    """Jagged input as rows; `restore` gives results `[T_c, E]` the form of the input."""

    rows: Rows
    restore: Callable[[Tensor], Tensor]
    nested: bool


def packed_rows(
    module: FusedMultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
    kv_lengths: Tensor | None,
    visible: Tensor | None,
    max_kv_length: int | None,
) -> JaggedInput:
    """Packed input `[T, E]` with offsets."""
    if q_offsets is None:
        raise ValueError("q_offsets is missing: packed input needs q_offsets and kv_offsets")
    if kv_offsets is None:
        if query is not key:
            raise ValueError("kv_offsets is missing: it may be left out only where query is key")
        kv_offsets = q_offsets
    for name, x, features in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x.dim() != 2 or x.shape[1] != features:
            raise ValueError(f"{name} must be packed as [T, {features}], got shape {tuple(x.shape)}")
    rows = Rows(
        query,
        key,
        value,
        q_offsets,
        kv_offsets,
        kv_lengths=kv_lengths,
        visible=visible,
        max_kv_length=max_kv_length,
    )
    return JaggedInput(rows, lambda x: x, nested=False)


def nested_rows(module: FusedMultiHeadAttention, query: Tensor, key: Tensor, value: Tensor) -> JaggedInput:
    """Nested input `[B, j, E]` of either layout."""
    taken: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    for name, x, features in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if not x.is_nested:
            raise ValueError(f"{name} must be nested as query is, got a dense tensor")
        if x.dim() != 3 or x.size(2) != features or (x.layout == torch.jagged and x._ragged_idx != 1):
            raise ValueError(f"{name} must be nested as [B, j, {features}]")
        known = next((rows for other, rows in taken if other is x), None)
        taken.append((x, _values_and_offsets(x) if known is None else known))
    (_, (q, q_offsets)), (_, (k, kv_offsets)), (_, (v, v_offsets)) = taken
    if v_offsets is not kv_offsets and not torch.equal(v_offsets, kv_offsets):
        raise ValueError("value must have as many rows as key for every user")
    longest = known_max_length(key) if key.layout == torch.jagged else None
    rows = Rows(q, k, v, q_offsets, kv_offsets, max_kv_length=longest)
    if query.layout == torch.jagged:
        return JaggedInput(rows, lambda x: torch.nested.nested_tensor_from_jagged(x, q_offsets), nested=True)
    lengths = q_offsets.diff().tolist()
    return JaggedInput(
        rows,
        lambda x: torch.nested.as_nested_tensor(list(x.split(lengths)), layout=torch.strided),
        nested=True,
    )


def _values_and_offsets(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.layout == torch.jagged:
        x = x.contiguous()  # closes the gaps of a narrowed one; else nothing to do
        return x.values(), x.offsets()
    parts = x.unbind()
    lengths = torch.tensor([0] + [len(part) for part in parts], device=x.device)
    return torch.cat(parts), lengths.cumsum(0)


def check_offsets(rows: Rows) -> None:
    """Raises where offsets are not of one number of users; what else is wrong with them the kernels tell."""
    for name, x in (("q_offsets", rows.q_offsets), ("kv_offsets", rows.kv_offsets)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    shape = rows.q_offsets.shape
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"q_offsets must have shape [B + 1], got {list(shape)}")
    if rows.kv_offsets.shape != shape:
        raise ValueError(
            f"kv_offsets must have shape {list(shape)} as q_offsets, got {list(rows.kv_offsets.shape)}"
        )


def _check_rows(rows: Rows) -> None:
    """The kernels' checks, for where no kernel is called."""

    def of_a_head(x: Tensor) -> Tensor:  # under autocast the inputs' own dtypes may differ
        return rows.query.new_empty(x.shape[0], 1, 1)

    target_attention.check(
        reads_values(rows.query.device),
        op="FusedMultiHeadAttention",
        query=of_a_head(rows.query),
        key=of_a_head(rows.key),
        value=of_a_head(rows.value),
        q_offsets=rows.q_offsets,
        kv_offsets=rows.kv_offsets,
        kv_lengths=rows.kv_lengths,
        visible=rows.visible,
        self_value=None,
        max_kv_length=rows.max_kv_length,
    )


class PaddedRows:
    """Rows padded to a dense batch, for PyTorch's attention."""

    def __init__(self, rows: Rows) -> None:
        _check_rows(rows)
        self._rows = rows
        self._query_real = _real(rows.q_offsets.diff())
        self._key_real = _real(rows.kv_offsets.diff())

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, L, E]`."""
        rows = self._rows
        key = _padded(rows.key, self._key_real)
        value = key if rows.value is rows.key else _padded(rows.value, self._key_real)
        query = key if rows.query is rows.key else _padded(rows.query, self._query_real)
        return query, key, value

    def mask(self) -> Tensor:
        """What is added to the scores, `[B, 1, C or 1, L]`."""
        rows = self._rows
        event = torch.arange(self._key_real.shape[1], device=rows.key.device)
        lengths = rows.kv_offsets.diff() if rows.kv_lengths is None else rows.kv_lengths
        hidden = (event >= lengths[:, None])[:, None, None, :]
        if rows.visible is not None:
            visible = _padded(rows.visible.unsqueeze(1), self._query_real)
            hidden = hidden | (event >= visible)[:, None]
        return torch.zeros(hidden.shape, dtype=rows.query.dtype, device=hidden.device).masked_fill(
            hidden, -torch.inf
        )

    def query_rows(self, x: Tensor) -> Tensor:
        """`[B, C, E]` -> `[T_c, E]`."""
        return x[self._query_real]

    def blanked(self, weights: Tensor) -> Tensor:
        """`[B, H, C, L + added columns]` with zeros for the queries that are padding."""
        return weights.masked_fill(~self._query_real[:, None, :, None], 0)

    def weight_rows(self, weights: Tensor) -> Tensor:
        """`[B, H, C, L + added columns]` -> `[sum C_b * L_b, H]`."""
        real = self._query_real[:, :, None] & self._key_real[:, None, :]
        return weights[..., : real.shape[2]].permute(0, 2, 3, 1)[real]


def padded_weights(rows: Rows, weights: FusedWeights) -> Tensor:
    """Weights of jagged rows as dense `[B, H, C, L + added columns]`, zeros where nothing is."""
    q_lengths, kv_lengths = rows.q_offsets.diff(), rows.kv_offsets.diff()
    query_real, key_real = _real(q_lengths), _real(kv_lengths)
    event = torch.arange(key_real.shape[1], device=key_real.device)
    rank = event.masked_fill(~key_real, -1)
    columns = [pad_weights(weights.events, q_lengths, kv_lengths, rank, query_real.shape[1])]
    columns += [_padded(x, query_real).unsqueeze(2) for x in weights.added]
    return torch.cat(columns, 2).permute(0, 3, 1, 2)


def _real(lengths: Tensor) -> Tensor:
    """Bool `[B, max length]`: what of a padded batch is not padding."""
    longest = int(lengths.max()) if lengths.numel() else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def _padded(rows: Tensor, real: Tensor) -> Tensor:
    """`[T, n]` as `[B, max length, n]`, zeros where nothing is."""
    return rows.new_zeros(*real.shape, rows.shape[1]).index_put((real,), rows)
