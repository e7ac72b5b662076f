"""`FusedMultiHeadAttention`: `torch.nn.MultiheadAttention` over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.functional import pad

from .forms import (
    JaggedInput,
    PaddedRows,
    check_dense,
    check_offsets,
    nested_rows,
    packed_rows,
    padded_weights,
)
from .fused import Rows, attend
from .masks import dense_mask, even_offsets, read_attn_mask, read_padding
from .projections import MAX_HEAD_DIM, MIN_HEAD_DIM, project
from .pytorch_path import dense_attention, say_once
from .weights import pad_weights


class FusedMultiHeadAttention(nn.MultiheadAttention):
    """A drop-in for `torch.nn.MultiheadAttention` that attends with the fused kernels.

    Signature, arguments, results and `state_dict` are those of `torch.nn.MultiheadAttention`, and so are
    the initial weights on the same seed. It also loads the state of the common hand-written module of four
    linear layers (`query`, `key`, `value`, `out`).

    Beyond torch's module:

    - jagged input: nested tensors, or packed rows `[T, E]` with `q_offsets` and `kv_offsets`;
    - of a padded batch only the real events are projected and attended to (`key_padding_mask`);
    - with few queries and a long history the queries are projected into the history's space instead of the
      history into the keys' (the counted cost decides);
    - weights have a gradient, and cost nothing in the backward pass of a loss that ignores them.

    Two rules where `torch.nn.MultiheadAttention` gives different answers on its different paths: a query
    with every key masked attends to nothing, so its output is the output projection of zeros (torch: NaN on
    one path); and causal masks show the columns of `add_bias_kv` and `add_zero_attn`, with or without
    `need_weights`.

    What the fused kernels do not cover (dropout while training, an `attn_mask` that is not a prefix per
    query, head dims outside 8 ... 256) is computed with PyTorch's attention, and a warning says so once.

    Args:
        embed_dim: model dim E, of queries and outputs.
        num_heads: heads H; divides `embed_dim`.
        dropout: probability of dropping an attention weight while training.
        bias: whether the projections have biases.
        add_bias_kv: append a learned key and value to every history.
        add_zero_attn: append a key and value of zeros to every history.
        kdim, vdim: features of keys and values; `embed_dim` by default.
        batch_first: dense input is `[B, L, E]` rather than `[L, B, E]`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self._refuse_foreign_fast_paths()

    def _refuse_foreign_fast_paths(self) -> None:
        """Keeps `nn.TransformerEncoderLayer` from computing this module's attention itself in eval mode.

        It does so with the parameters of any `self_attn` for which this flag is true. Nothing here reads
        the flag: `in_proj_weight` is None where the projections are apart.
        """
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        # As torch's, which goes by the flag above; in its order, so that a seed gives the same weights.
        if self.in_proj_weight is not None:
            init.xavier_uniform_(self.in_proj_weight)
        else:
            for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
                init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            init.zeros_(self.in_proj_bias)
            init.zeros_(self.out_proj.bias)
        if self.bias_k is not None:
            init.xavier_normal_(self.bias_k)
        if self.bias_v is not None:
            init.xavier_normal_(self.bias_v)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}query.weight" in state_dict and f"{prefix}out.weight" in state_dict:
            self._rename_four_linears(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _rename_four_linears(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replaces `query/key/value/out` by this module's keys; what is missing stays missing."""
        names = ("query", "key", "value")
        weights = [state_dict.pop(f"{prefix}{name}.weight", None) for name in names]
        biases = [state_dict.pop(f"{prefix}{name}.bias", None) for name in names]
        if self.in_proj_weight is None:
            for letter, weight in zip("qkv", weights, strict=True):
                if weight is not None:
                    state_dict[f"{prefix}{letter}_proj_weight"] = weight
        elif all(weight is not None for weight in weights):
            state_dict[f"{prefix}in_proj_weight"] = torch.cat(weights)
        if all(bias is not None for bias in biases):
            state_dict[f"{prefix}in_proj_bias"] = torch.cat(biases)
        for kind in ("weight", "bias"):
            if f"{prefix}out.{kind}" in state_dict:
                state_dict[f"{prefix}out_proj.{kind}"] = state_dict.pop(f"{prefix}out.{kind}")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        q_offsets: Tensor | None = None,
        kv_offsets: Tensor | None = None,
        kv_lengths: Tensor | None = None,
        visible: Tensor | None = None,
        max_kv_length: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Attention of `query` over `key` and `value`.

        Three forms of input, answered in the same form:

        - dense, as torch's module takes it: `[L, B, E]`, `[B, L, E]` with `batch_first`, or `[L, E]`;
        - packed: `query [T_c, E]`, `key [T_l, kdim]`, `value [T_l, vdim]` with offsets;
        - nested: `[B, j, E]` in either of torch's layouts.

        Args:
            query, key, value: as above. Passing one tensor for several of them saves projections.
            key_padding_mask: bool (True hides) or float (added to the scores) `[B, L]`; dense input only.
            need_weights: return the attention weights too. They are in memory as a whole, so turn it off
                where they are not used.
            attn_mask: bool (True hides) or float (added to the scores), `[C, L]` or `[B * H, C, L]`; dense
                input only. Fused where every query sees a prefix of the events, as with a causal mask.
            average_attn_weights: weights averaged over the heads rather than per head.
            is_causal: a hint that `attn_mask`, which must be there, is causal. Needed where reading the mask
                is not possible (`torch.compile`) or costs a synchronisation (accelerators); else the mask
                itself counts. Jagged input has no mask: the n-th query of a user sees its first n events.
            q_offsets, kv_offsets: int `[B+1]`, packed input. `kv_offsets` may be left out where `query` is
                `key`.
            kv_lengths: int `[B]`, packed input: the user's events are the first `kv_lengths[b]` of its rows.
            visible: int `[T_c]`, packed input: the query sees only the first `visible[c]` events.
            max_kv_length: packed input: the events of the longest history, or more, which makes kernels
                faster on a GPU (see `attnrec.target_attention`). Other input says it by itself.

        Returns:
            `(output, weights)`, `weights` None without `need_weights`. Dense and nested input: `[B, C, L]`
            averaged, `[B, H, C, L]` per head (nested padded with zeros; without B for unbatched input), the
            columns of `add_bias_kv` and `add_zero_attn` last. Packed: the pair `(weights [sum C_b * L_b],
            offsets [B+1])`, per head `[sum C_b * L_b, H]`, of events only.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if query.is_nested or q_offsets is not None or kv_offsets is not None:
            if key_padding_mask is not None or attn_mask is not None:
                name = "attn_mask" if key_padding_mask is None else "key_padding_mask"
                raise ValueError(f"{name} goes with dense input; jagged input takes is_causal or visible")
            if query.is_nested:
                if any(x is not None for x in (q_offsets, kv_offsets, kv_lengths, visible, max_kv_length)):
                    raise ValueError(
                        "offsets, kv_lengths, visible and max_kv_length go with packed input, got nested "
                        "tensors"
                    )
                batch = nested_rows(self, query, key, value)
            else:
                batch = packed_rows(
                    self, query, key, value, q_offsets, kv_offsets, kv_lengths, visible, max_kv_length
                )
            return self._forward_jagged(batch, need_weights, average_attn_weights, is_causal)
        packed_only = {"kv_lengths": kv_lengths, "visible": visible, "max_kv_length": max_kv_length}
        if name := next((name for name, x in packed_only.items() if x is not None), None):
            raise ValueError(f"{name} goes with packed input: give q_offsets and kv_offsets too")
        check_dense(self, query, key, value, key_padding_mask, attn_mask, is_causal)

        if query.dim() == 2:
            query, key, value = _map_distinct(lambda x: x.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            output, weights = self._forward_dense(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        if not self.batch_first:
            query, key, value = _map_distinct(lambda x: x.transpose(0, 1), query, key, value)
        output, weights = self._forward_dense(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return output if self.batch_first else output.transpose(0, 1), weights

    def _forward_dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Batch-first: `output [B, C, E]`, `weights [B, C, L]` or `[B, H, C, L]`."""
        (users, candidates), events = query.shape[:2], key.shape[1]
        visible, reason = None, self._not_fused()
        if reason is None and attn_mask is not None:
            visible = read_attn_mask(attn_mask, is_causal, users, self.num_heads)
            if visible is None:
                reason = "the attn_mask does not show every query a prefix of the events (or cannot be read)"
        if reason is not None:
            say_once(reason)
            mask = dense_mask(attn_mask, key_padding_mask, query)
            out, weights = self._attend_with_pytorch(query, key, value, mask, need_weights)
            return self.out_proj(out), _averaged(weights, average)

        padding = read_padding(key_padding_mask, users, events, query.device)
        q, k, v = _map_distinct(lambda x: x.flatten(0, 1), query, key, value)
        if padding.index is not None:
            packed = k.index_select(0, padding.index)
            k, v = packed, packed if v is k else v.index_select(0, padding.index)
        rows = Rows(
            q,
            k,
            v,
            even_offsets(users, candidates, query.device),
            padding.kv_offsets,
            kv_lengths=padding.kv_lengths,
            visible=None if visible is None else padding.visible(visible).flatten(),
            key_bias=padding.key_bias,
            even=(users, candidates, events) if padding.index is None else None,
            max_kv_length=None if query.device.type == "cpu" else events,
        )
        out, weights = attend(self, rows, need_weights)
        output = self.out_proj(out).unflatten(0, (users, candidates))
        if weights is None:
            return output, None
        if padding.index is None:
            columns = [weights.events.view(users, candidates, events, self.num_heads)]
        else:
            rank = (padding.keep.cumsum(1) - 1).masked_fill(~padding.keep, -1)
            lengths = rows.q_offsets.diff(), rows.kv_offsets.diff()
            columns = [pad_weights(weights.events, *lengths, rank, candidates)]
        columns += [x.view(users, candidates, 1, self.num_heads) for x in weights.added]
        return output, _averaged(torch.cat(columns, 2).permute(0, 3, 1, 2), average)

    def _forward_jagged(
        self, batch: JaggedInput, need_weights: bool, average: bool, is_causal: bool
    ) -> tuple[Tensor, Any]:
        rows = batch.rows
        check_offsets(rows)
        if is_causal:
            if rows.visible is not None:
                raise ValueError("is_causal and visible say the same thing: give one of them")
            rows.visible = rows.causal()
        reason = self._not_fused()
        if reason is not None:
            say_once(reason)
            padded = PaddedRows(rows)
            out, weights = self._attend_with_pytorch(*padded.inputs(), padded.mask(), need_weights)
            output = batch.restore(self.out_proj(padded.query_rows(out)))
            if weights is None:
                return output, None
            if batch.nested:
                return output, _averaged(padded.blanked(weights), average)
            events = padded.weight_rows(weights)
        else:
            out, weights = attend(self, rows, need_weights)
            output = batch.restore(self.out_proj(out))
            if weights is None:
                return output, None
            if batch.nested:
                return output, _averaged(padded_weights(rows, weights), average)
            events = weights.events
        return output, (events.mean(1) if average else events, rows.pair_offsets())

    def _attend_with_pytorch(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs `[B, L, E]` -> `out [B, C, E]` before the output projection, `weights [B, H, C, L]`.

        `mask` is added to the scores and broadcasts to `[B, H, C, L]`.
        """
        q, k, v = (x.transpose(1, 2) for x in project(self, query, key, value))
        users, heads, events, dim = k.shape
        if self.bias_k is not None:
            k, v = (
                torch.cat([x, b.to(x.dtype).view(1, heads, 1, dim).expand(users, heads, 1, dim)], 2)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None:
            mask = pad(mask, (0, k.shape[2] - events))
        dropout = self.dropout if self.training else 0.0
        out, weights = dense_attention(q, k, v, mask, dropout=dropout, need_weights=need_weights)
        return out.transpose(1, 2).flatten(2), weights

    def _not_fused(self) -> str | None:
        """Why the fused kernels cannot serve a call, whatever its input; None if they can."""
        if self.training and self.dropout > 0:
            return "attention weights are dropped while training (dropout > 0)"
        if not MIN_HEAD_DIM <= self.head_dim <= MAX_HEAD_DIM:
            return f"head dim {self.head_dim} is outside {MIN_HEAD_DIM} ... {MAX_HEAD_DIM}"
        return None


def _map_distinct(
    f: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`f` of each tensor, once for what is one tensor, so that it stays one."""
    q = f(query)
    k = q if key is query else f(key)
    v = k if value is key else q if value is query else f(value)
    return q, k, v


def _averaged(weights: Tensor | None, average: bool) -> Tensor | None:
    return weights.mean(1) if average and weights is not None else weights
