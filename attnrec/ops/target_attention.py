"""`target_attention` and its gradient: checks, shapes, autograd."""

from typing import Any

import torch
from torch import Tensor

from attnrec import reference
from attnrec.ops.checks import FLOATS, INTEGERS, Check
from attnrec.ops.op import Arguments, Gradient, Op, casts, gradients_by_autograd, wide

WITH_GRADIENT = ("query", "key", "value", "self_key", "self_value", "key_bias")


def check(
    values: bool,
    query: Any,
    key: Any,
    q_offsets: Any,
    kv_offsets: Any,
    *,
    op: str = "target_attention",
    scale: float | None = None,
    kv_lengths: Any = None,
    visible: Any = None,
    self_key: Any = None,
    key_bias: Any = None,
    max_kv_length: Any = None,
    **with_values: Any,
) -> None:
    """Checks the arguments of the attention ops; those that attend also give `value` and `self_value`."""
    checked = Check(op, ("query", query))
    checked.tensor("query", query, "[T_c, H, D]", (None, None, None))
    rows, heads, dim = query.shape
    same_dtype = (query.dtype,)
    checked.tensor("key", key, "[T_l, H_kv, D]", (None, None, dim), same_dtype)
    events, kv_heads, _ = key.shape
    if not 1 <= dim <= 256:
        checked.fail("query", "have a head dim D from 1 to 256", dim)
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        checked.fail(
            "query", f"have a number of heads H that is a multiple of key's H_kv = {kv_heads}", heads
        )
    checked.tensor("q_offsets", q_offsets, "[B + 1]", (None,), INTEGERS)
    if q_offsets.shape[0] < 1:
        checked.fail("q_offsets", "have shape [B + 1]: at least one element", list(q_offsets.shape))
    bounds = q_offsets.shape[0]
    checked.tensor("kv_offsets", kv_offsets, "[B + 1]", (bounds,), INTEGERS)
    if scale is not None:
        checked.number("scale", scale)
    if kv_lengths is not None:
        checked.tensor("kv_lengths", kv_lengths, "[B]", (bounds - 1,), INTEGERS)
    if visible is not None:
        checked.tensor("visible", visible, "[T_c]", (rows,), INTEGERS)
    if self_key is not None:
        checked.tensor("self_key", self_key, "[T_c, H_kv, D]", (rows, kv_heads, dim), same_dtype)
    if key_bias is not None:
        bias_dtypes = (torch.float32,) if query.dtype == torch.float32 else (torch.float32, query.dtype)
        checked.tensor("key_bias", key_bias, "[T_l, H]", (events, heads), bias_dtypes)
    if max_kv_length is not None:
        checked.integer("max_kv_length", max_kv_length)
    if "value" in with_values:
        self_value = with_values["self_value"]
        checked.tensor("value", with_values["value"], "[T_l, H_kv, D]", (events, kv_heads, dim), same_dtype)
        if (self_key is None) != (self_value is None):
            missing, given = ("self_key", "self_value") if self_key is None else ("self_value", "self_key")
            checked.fail(missing, f"be given where {given} is", None)
        if self_value is not None:
            checked.tensor("self_value", self_value, "[T_c, H_kv, D]", (rows, kv_heads, dim), same_dtype)
    if not values:
        return
    checked.offsets("q_offsets", q_offsets, "query", rows)
    checked.offsets("kv_offsets", kv_offsets, "key", events)
    room = kv_offsets.diff()
    if kv_lengths is not None:
        checked.within("kv_lengths", kv_lengths, 0, room, "the user's room")
    lengths = room if kv_lengths is None else kv_lengths
    if max_kv_length is not None and lengths.numel() and int(lengths.max()) > max_kv_length:
        user = int(lengths.argmax())
        needed = f"be at least {int(lengths[user])}, the events of user {user}"
        checked.fail("max_kv_length", needed, max_kv_length)
    if visible is not None:
        checked.within(
            "visible", visible, 0, room.repeat_interleave(q_offsets.diff().long()), "the user's room"
        )


def fake(query: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide(query.dtype))


def backward_reference(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    self_value: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "q_offsets": q_offsets,
        "kv_offsets": kv_offsets,
        "scale": scale,
        "kv_lengths": kv_lengths,
        "visible": visible,
        "self_key": self_key,
        "self_value": self_value,
        "key_bias": key_bias,
    }
    return gradients_by_autograd(reference.target_attention, WITH_GRADIENT, arguments, (grad_out, grad_lse))


def backward_check(values: bool, grad_out: Any, grad_lse: Any, out: Any, lse: Any, **arguments: Any) -> None:
    check(values, op="target_attention_backward", **arguments)
    query = arguments["query"]
    checked = Check("target_attention_backward", ("query", query))
    checked.tensor("grad_out", grad_out, "[T_c, H, D]", query.shape, (query.dtype,))
    checked.tensor("out", out, "[T_c, H, D]", query.shape, (query.dtype,))
    checked.tensor("lse", lse, "[T_c, H]", query.shape[:2], (wide(query.dtype),))
    if grad_lse is not None:
        checked.tensor("grad_lse", grad_lse, "[T_c, H]", query.shape[:2], FLOATS)


def backward_fake(query: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    given = [query, *(arguments[name] for name in WITH_GRADIENT[1:])]
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def gradient(
    grads: tuple[Tensor | None, ...],
    arguments: Arguments,
    outputs: tuple[Tensor, ...],
    _: dict[str, bool],
) -> tuple[Tensor, ...]:
    out, lse = outputs
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    options = {name: arguments[name] for name in BACKWARD.names[BACKWARD.positional :]}
    query, key, value, q_offsets, kv_offsets = (arguments[name] for name in OP.names[: OP.positional])
    return torch.ops.attnrec.target_attention_backward(
        grad_out, grads[1], query, key, value, out, lse, q_offsets, kv_offsets, **options
    )


OP = Op(
    "target_attention",
    reference.target_attention,
    check,
    fake,
    casts("query", "key", "value", "self_key", "self_value"),
    Gradient(WITH_GRADIENT, gradient),
)
BACKWARD = Op("target_attention_backward", backward_reference, backward_check, backward_fake)
OPS = (OP, BACKWARD)
