"""`catalog_cross_entropy` and its gradient: checks, shapes, autograd."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnrec import reference
from attnrec.ops.checks import FLOATS, INTEGERS, Check
from attnrec.ops.op import Arguments, Gradient, Op, casts, gradients_by_autograd, wide

WITH_GRADIENT = ("users", "table", "bias")


def check(
    values: bool,
    users: Any,
    table: Any,
    target: Any,
    *,
    op: str = "catalog_cross_entropy",
    temperature: float = 1.0,
    bias: Any = None,
    logq: Any = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    negatives: Any = None,
    in_batch: bool = False,
) -> None:
    checked = Check(op, ("users", users))
    checked.vectors("users", users, "[T, D]")
    checked.tensor("table", table, "[N, D]", (None, users.shape[1]), (users.dtype,))
    rows, items = users.shape[0], table.shape[0]
    checked.tensor("target", target, "[T]", (rows,), INTEGERS)
    checked.number("temperature", temperature, above=0.0)
    for name, per_item in (("bias", bias), ("logq", logq)):
        if per_item is not None:
            checked.tensor(name, per_item, "[N]", (items,), (torch.float32, users.dtype))
    checked.integer("ignore_index", ignore_index)
    checked.number("label_smoothing", label_smoothing)
    if isinstance(label_smoothing, Real) and not 0.0 <= label_smoothing <= 1.0:
        checked.fail("label_smoothing", "be from 0 to 1", label_smoothing)
    if negatives is not None:
        checked.tensor("negatives", negatives, "[M]", (None,), INTEGERS)
        if label_smoothing != 0.0:
            checked.fail("label_smoothing", "be 0 with negatives", label_smoothing)
    elif in_batch:
        checked.fail("negatives", "be the targets where in_batch is set", None)
    if not values:
        return
    ids = target.masked_fill(target == ignore_index, 0) if items else target[target != ignore_index]
    checked.within("target", ids, 0, items - 1, "the last item of the table")
    if negatives is not None:
        ids = negatives[negatives != ignore_index] if in_batch else negatives
        checked.within("negatives", ids, 0, items - 1, "the last item of the table")


def fake(users: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    dtype = wide(users.dtype)
    return users.new_empty(users.shape[:1], dtype=dtype), users.new_empty(users.shape[:1], dtype=dtype)


def backward_reference(
    grad_loss: Tensor,
    users: Tensor,
    table: Tensor,
    target: Tensor,
    lse: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logq: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    negatives: Tensor | None = None,
    in_batch: bool = False,
    needs_users: bool = True,
    needs_table: bool = True,
) -> tuple[Tensor, ...]:
    arguments = {
        "users": users,
        "table": table,
        "target": target,
        "temperature": temperature,
        "bias": bias,
        "logq": logq,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "negatives": negatives,
        "in_batch": in_batch,
    }
    grads = gradients_by_autograd(
        reference.catalog_cross_entropy, WITH_GRADIENT, arguments, (grad_loss, None)
    )
    needed = (needs_users, needs_table, True)
    return tuple(grad if need else grad.new_empty(0) for grad, need in zip(grads, needed, strict=True))


def backward_check(
    values: bool, grad_loss: Any, lse: Any, needs_users: bool, needs_table: bool, **arguments: Any
) -> None:
    check(values, op="catalog_cross_entropy_backward", **arguments)
    users = arguments["users"]
    checked = Check("catalog_cross_entropy_backward", ("users", users))
    checked.tensor("grad_loss", grad_loss, "[T]", users.shape[:1], FLOATS)
    checked.tensor("lse", lse, "[T]", users.shape[:1], (wide(users.dtype),))


def backward_fake(
    users: Tensor, table: Tensor, bias: Tensor | None, needs_users: bool, needs_table: bool, **_: Any
) -> tuple[Tensor, ...]:
    given = ((users, needs_users), (table, needs_table), (bias, True))
    return tuple(x.new_empty(x.shape) if need and x is not None else users.new_empty(0) for x, need in given)


def gradient(
    grads: tuple[Tensor | None, ...],
    arguments: Arguments,
    outputs: tuple[Tensor, ...],
    needs: dict[str, bool],
) -> tuple[Tensor, ...]:
    options = {name: x for name, x in arguments.items() if name not in ("users", "table", "target")}
    return torch.ops.attnrec.catalog_cross_entropy_backward(
        grads[0],
        arguments["users"],
        arguments["table"],
        arguments["target"],
        outputs[1],
        **options,
        needs_users=needs["users"],
        needs_table=needs["table"],
    )


OPS = (
    Op(
        "catalog_cross_entropy",
        reference.catalog_cross_entropy,
        check,
        fake,
        casts("users", "table"),
        Gradient(WITH_GRADIENT, gradient, constants=(1,)),
    ),
    Op("catalog_cross_entropy_backward", backward_reference, backward_check, backward_fake),
)
