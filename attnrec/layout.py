"""Dense and nested attention input, seen as the native jagged batch.

`Native` holds what the attention ops take and knows the way back. Nothing is copied where strides allow: a
dense `[B, H, n, D]` is read either with its heads in place (a transposed view of `[B, n, H, D]`, as
projections give it) or with the heads folded into the users (contiguous `[B, H, n, D]`: every head a user of
its own).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attnrec.ops.checks import FLOATS, INTEGERS, Check, reads_values


@dataclass(slots=True)
class Native:
    """Arguments of an attention op, and how its results return to the form that the caller gave.

    `options` are the optional tensors that are given, by name. `max_kv_length` is what the form tells of the
    longest history, where kernels may not look at offsets: on the CPU they do, and to pass it takes a tenth
    of a small call. `rows(x)` maps `x [T_c, H, ...]`, a result per candidate and head. `pairs(x, offsets)`
    maps the weights `x [sum C_b * L_b, H]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    q_offsets: Tensor
    kv_offsets: Tensor
    options: dict[str, Tensor]
    rows: Callable[[Tensor], Tensor]
    pairs: Callable[[Tensor, Tensor], Any]
    max_kv_length: int | None


# --- dense --------------------------------------------------------------------------------------------------


_DENSE_OPTIONS = {
    "kv_lengths": ("[B]", INTEGERS),
    "key_padding_mask": ("[B, L]", (torch.bool,)),
    "visible": ("[B, C]", INTEGERS),
    "self_key": ("[B, H_kv, C, D]", FLOATS),
    "self_value": ("[B, H_kv, C, D]", FLOATS),
    "key_bias": ("[B, H, L]", FLOATS),
}


def _dense_shapes(query: Tensor, key: Tensor) -> dict[str, tuple[int, ...]]:
    users, heads, candidates, dim = query.shape
    kv_heads, events = key.shape[1:3]
    slots = (users, kv_heads, candidates, dim)
    return {
        "kv_lengths": (users,),
        "key_padding_mask": (users, events),
        "visible": (users, candidates),
        "self_key": slots,
        "self_value": slots,
        "key_bias": (users, heads, events),
    }


def _check_dense(op: str, query: Any, key: Any, value: Any, options: dict[str, Tensor]) -> None:
    """What the native form can't tell any more: ranks, and sizes that differ where their products agree."""
    checked = Check(op, ("query", query))
    checked.tensor("query", query, "[B, H, C, D] (without offsets)", (None,) * 4)
    users, heads, _, dim = query.shape
    checked.tensor("key", key, "[B, H_kv, L, D] (without offsets)", (users, None, None, dim))
    kv_heads = key.shape[1]
    if kv_heads < 1 or heads % kv_heads != 0:
        checked.fail(
            "query", f"have a number of heads H that is a multiple of key's H_kv = {kv_heads}", heads
        )
    if op == "target_attention":
        checked.tensor("value", value, "[B, H_kv, L, D]", key.shape)
    shapes = _dense_shapes(query, key)
    for name, x in options.items():
        dims, dtypes = _DENSE_OPTIONS[name]
        checked.tensor(name, x, dims, shapes[name], dtypes)


def _options_look_dense(query: Tensor, key: Tensor, options: dict[str, Tensor]) -> bool:
    shapes = _dense_shapes(query, key)
    return all(
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and x.device == query.device
        and x.dtype in _DENSE_OPTIONS[name][1]
        and x.shape == shapes[name]
        for name, x in options.items()
    )


def _looks_dense(query: Any, key: Any, value: Any, options: dict[str, Tensor]) -> bool:
    """The usual call judged at a glance, a tenth of what the sentences of `_check_dense` cost."""
    return (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and query.dim() == key.dim() == 4
        and query.shape[0] == key.shape[0]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
        and (value is None or (isinstance(value, Tensor) and value.shape == key.shape))
        and (not options or _options_look_dense(query, key, options))
    )


def _even_offsets(users: int, n: int, device: torch.device | None) -> Tensor:
    if n == 0:
        return torch.zeros(users + 1, dtype=torch.int64, device=device)
    return torch.arange(0, users * n + 1, n, device=device)


@lru_cache(maxsize=64)
def _kept_offsets(users: int, n: int) -> Tensor:
    with torch.inference_mode(False):  # later calls may have gradients
        return _even_offsets(users, n, torch.device("cpu"))


def _offsets(users: int, n: int, like: Tensor) -> Tensor:
    """Offsets of users with n rows each. For small batches they are kept from call to call, where nothing
    traces or wraps tensors: making them takes a tenth of a small call."""
    keep = (
        type(like) is Tensor
        and like.device.type == "cpu"
        and users <= 256
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )
    return _kept_offsets(users, n) if keep else _even_offsets(users, n, like.device)


def lengths_of_mask(key_padding_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """`key_padding_mask [B, L]` (True hides) as `(kv_lengths [B], bias [B, L] or None)`.

    The length ends at the last event that is shown; hidden ones before it get a bias of -inf. Whether there
    are any is looked up only on the CPU and outside of a compiler: elsewhere it would cost a synchronisation
    or a graph break.
    """
    users, events = key_padding_mask.shape
    if events == 0:
        return key_padding_mask.new_zeros(users, dtype=torch.int64), None
    position = torch.arange(1, events + 1, device=key_padding_mask.device)
    lengths = key_padding_mask.logical_not().mul(position).amax(1)
    on_cpu = key_padding_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and torch.equal(key_padding_mask, position > lengths.unsqueeze(1)):
        return lengths, None
    bias = torch.zeros(key_padding_mask.shape, device=key_padding_mask.device)
    return lengths, bias.masked_fill(key_padding_mask, -torch.inf)


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


def _folds_better(tensors: list[Tensor]) -> bool:
    """Whether fewer elements of `[B, H, n, D]` are copied with heads folded into the users than in place."""
    in_place = sum(x.numel() for x in tensors if not _merges(x, (0, 2)))
    return in_place > 0 and in_place > sum(x.numel() for x in tensors if not _merges(x, (0, 1, 2)))


def from_dense(
    op: str, query: Tensor, key: Tensor, value: Tensor | None, options: dict[str, Tensor | None]
) -> Native:
    """Dense `query [B, H, C, D]`, `key`/`value [B, H_kv, L, D]`, `visible [B, C]`, `key_bias [B, H, L]`, and
    `key_padding_mask [B, L]`."""
    options = {name: x for name, x in options.items() if x is not None}
    if not _looks_dense(query, key, value, options):
        _check_dense(op, query, key, value, options)
    users, heads, candidates, _ = query.shape
    kv_heads, events = key.shape[1], key.shape[2]
    if "key_padding_mask" in options:
        if "kv_lengths" in options:
            raise ValueError(f"{op}: key_padding_mask and kv_lengths say the same thing: give one of them")
        options["kv_lengths"], holes = lengths_of_mask(options.pop("key_padding_mask"))
        if holes is not None:
            holes = holes.unsqueeze(1).expand(users, heads, events)
            options["key_bias"] = options["key_bias"] + holes if "key_bias" in options else holes

    large = [query, key] if value is None else [query, key, value]
    # With grouped heads, folded heads share their key: no per-head bias and no self slot of the group's own.
    may_fold = heads == kv_heads or not ("key_bias" in options or "self_key" in options)
    fold = users > 1 and may_fold and _folds_better(large)
    if fold:
        # The heads of a group are further candidates of their key's user.
        native_users, rows_of_user = users * kv_heads, heads // kv_heads * candidates
    else:
        native_users, rows_of_user = users, candidates

    def per_head(x: Tensor) -> Tensor:
        _, of_heads, n, last = x.shape
        if fold:
            return x.reshape(users * of_heads * n, 1, last)
        return x.transpose(1, 2).reshape(users * n, of_heads, last)

    def per_user(x: Tensor, copies: int) -> Tensor:
        return x.unsqueeze(1).expand(users, copies, *x.shape[1:]).flatten() if fold else x.flatten()

    def rows(x: Tensor) -> Tensor:
        if fold:
            return x.view(users, heads, candidates, *x.shape[2:])
        return x.view(users, candidates, *x.shape[1:]).transpose(1, 2)

    def pairs(weights: Tensor, _: Tensor) -> Tensor:
        torch._check(weights.shape[0] == native_users * rows_of_user * events)
        if fold:
            return weights.view(users, heads, candidates, events)
        return weights.view(users, candidates, events, heads).permute(0, 3, 1, 2)

    for name, x in options.items():
        if name == "key_bias":
            options[name] = per_head(x.unsqueeze(-1)).squeeze(-1)
        elif name == "kv_lengths":
            options[name] = per_user(x, kv_heads)
        elif name == "visible":
            options[name] = per_user(x, heads)
        else:
            options[name] = per_head(x)
    return Native(
        per_head(query),
        per_head(key),
        None if value is None else per_head(value),
        _offsets(native_users, rows_of_user, query),
        _offsets(native_users, events, query),
        options,
        rows,
        pairs,
        None if query.device.type == "cpu" else events,
    )


# --- nested -------------------------------------------------------------------------------------------------


def _is_nested(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged


def nested_values(x: Tensor | None) -> Tensor | None:
    """Packed `[T, ...]` of a jagged nested tensor, ragged in dimension 1 or 2; other tensors as they are."""
    if not _is_nested(x):
        return x
    if x._ragged_idx == 2:
        x = x.transpose(1, 2)
    if x.lengths() is not None:  # a narrowed tensor, with room between its users
        x = x.contiguous()
    return x.values()


def nested_offsets(x: Tensor) -> Tensor:
    """Offsets of `nested_values(x)`."""
    return x.offsets() if x.lengths() is None else x.contiguous().offsets()


def known_max_length(x: Tensor) -> int | None:
    """The longest row of a jagged nested tensor as `Native` wants it, where it is known: to compute it would
    read offsets."""
    known = None if x.device.type == "cpu" else x._maybe_max_seqlen
    return known if isinstance(known, int) else None  # a tracer's symbol would guard a graph by it


def _check_users(op: str, name: str, x: Tensor | None, like_name: str, offsets: Tensor) -> None:
    """Nested `x` must have as many rows for each user as `like_name`; packed, it would go unnoticed."""
    if not _is_nested(x):
        return
    own = nested_offsets(x)
    if own is offsets or torch.compiler.is_compiling() or not reads_values(own.device):
        return
    if not torch.equal(own, offsets):
        raise ValueError(
            f"{op}: {name} must have {like_name}'s number of rows for each user, {offsets.diff().tolist()}, "
            f"got {own.diff().tolist()}"
        )


def from_nested(
    op: str, query: Tensor, key: Tensor, value: Tensor | None, options: dict[str, Tensor | None]
) -> Native:
    """Nested `query [B, j, H, D]` or `[B, H, j, D]`, likewise key and value; options nested or packed."""
    options = {name: x for name, x in options.items() if x is not None}
    if "key_padding_mask" in options:
        raise ValueError(f"{op}: key_padding_mask goes with dense input, not with nested tensors")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not (_is_nested(x) or (x is None and op != "target_attention")):
            got = type(x).__name__ if not isinstance(x, Tensor) else f"a tensor of layout {x.layout}"
            raise TypeError(
                f"{op}: {name} must be nested (layout=torch.jagged) where query is, got {got}; a dense "
                "query goes with dense keys"
            )
        if x is not None and (x.dim() != 4 or x._ragged_idx not in (1, 2)):
            raise ValueError(
                f"{op}: {name} must be nested [B, j, H, D] or [B, H, j, D], got {list(x.shape)} ragged in "
                f"dimension {x._ragged_idx}"
            )
    q_offsets, kv_offsets, transposed = nested_offsets(query), nested_offsets(key), query._ragged_idx == 2
    _check_users(op, "value", value, "key", kv_offsets)
    for name, x in options.items():
        of_events = name == "key_bias"
        _check_users(op, name, x, "key" if of_events else "query", kv_offsets if of_events else q_offsets)

    def rows(x: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(x, q_offsets)
        return nested.transpose(1, 2) if transposed else nested

    return Native(
        nested_values(query),
        nested_values(key),
        nested_values(value),
        q_offsets,
        kv_offsets,
        {name: nested_values(x) for name, x in options.items()},
        rows,
        torch.nested.nested_tensor_from_jagged,
        known_max_length(key),
    )


# --- candidates of softmax_score ----------------------------------------------------------------------------


def candidates(
    users: Tensor, items: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Dense `items [B, C, D]` or nested `[B, j, D]`: native items, offsets and bias, and the way back."""
    if _is_nested(items):
        offsets = nested_offsets(items)
        _check_users("softmax_score", "bias", bias, "items", offsets)
        back = partial(torch.nested.nested_tensor_from_jagged, offsets=offsets)
        return nested_values(items), offsets, nested_values(bias), back
    checked = Check("softmax_score", ("items", items))
    checked.tensor("items", items, "[B, C, D] (without offsets)", (None, None, None))
    batch, count, dim = items.shape
    checked.tensor("users", users, "[B, D]", (batch, dim))
    if bias is not None:
        checked.tensor("bias", bias, "[B, C]", (batch, count))
        bias = bias.flatten()
    offsets = _offsets(batch, count, items)
    return items.flatten(0, 1), offsets, bias, lambda probabilities: probabilities.view(batch, count)
