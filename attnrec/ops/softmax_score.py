"""`softmax_score` and its gradient: checks, shapes, autograd."""

from typing import Any

import torch
from torch import Tensor

from attnrec import reference
from attnrec.ops.checks import INTEGERS, Check
from attnrec.ops.op import Arguments, Gradient, Op, casts, gradients_by_autograd

WITH_GRADIENT = ("users", "items", "bias")


def check(
    values: bool,
    users: Any,
    items: Any,
    offsets: Any,
    *,
    op: str = "softmax_score",
    temperature: float = 1.0,
    bias: Any = None,
) -> None:
    checked = Check(op, ("users", users))
    checked.vectors("users", users, "[B, D]")
    checked.tensor("items", items, "[T_c, D]", (None, users.shape[1]), (users.dtype,))
    checked.tensor("offsets", offsets, "[B + 1]", (users.shape[0] + 1,), INTEGERS)
    checked.number("temperature", temperature, above=0.0)
    if bias is not None:
        checked.tensor("bias", bias, "[T_c]", (items.shape[0],), (torch.float32, users.dtype))
    if values:
        checked.offsets("offsets", offsets, "items", items.shape[0])


def fake(users: Tensor, items: Tensor, **_: Any) -> Tensor:
    return users.new_empty(items.shape[:1])


def backward_reference(
    grad: Tensor,
    users: Tensor,
    items: Tensor,
    offsets: Tensor,
    probabilities: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    arguments = {"users": users, "items": items, "offsets": offsets, "temperature": temperature, "bias": bias}
    return gradients_by_autograd(reference.softmax_score, WITH_GRADIENT, arguments, (grad,))


def backward_check(values: bool, grad: Any, probabilities: Any, **arguments: Any) -> None:
    check(values, op="softmax_score_backward", **arguments)
    users, rows = arguments["users"], arguments["items"].shape[:1]
    checked = Check("softmax_score_backward", ("users", users))
    checked.tensor("grad", grad, "[T_c]", rows, (users.dtype,))
    checked.tensor("probabilities", probabilities, "[T_c]", rows, (users.dtype,))


def backward_fake(users: Tensor, items: Tensor, bias: Tensor | None, **_: Any) -> tuple[Tensor, ...]:
    grad_bias = users.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return users.new_empty(users.shape), items.new_empty(items.shape), grad_bias


def gradient(
    grads: tuple[Tensor | None, ...],
    arguments: Arguments,
    outputs: tuple[Tensor, ...],
    _: dict[str, bool],
) -> tuple[Tensor, ...]:
    return torch.ops.attnrec.softmax_score_backward(
        grads[0],
        arguments["users"],
        arguments["items"],
        arguments["offsets"],
        outputs[0],
        temperature=arguments["temperature"],
        bias=arguments["bias"],
    )


OPS = (
    Op(
        "softmax_score",
        reference.softmax_score,
        check,
        fake,
        casts("users", "items"),
        Gradient(WITH_GRADIENT, gradient),
    ),
    Op("softmax_score_backward", backward_reference, backward_check, backward_fake),
)
