"""`target_attention_weights` and `target_attention_top`: checks and shapes. Forward only."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from attnrec import reference
from attnrec.ops import target_attention
from attnrec.ops.checks import Check
from attnrec.ops.op import Op, casts

FUNCTION = "target_attention_weights"  # the public one, of both ops


def check(values: bool, **arguments: Any) -> None:
    target_attention.check(values, op=FUNCTION, **arguments)


def check_top(values: bool, top: Any, **arguments: Any) -> None:
    target_attention.check(values, op=FUNCTION, **arguments)
    checked = Check(FUNCTION, ("query", arguments["query"]))
    checked.integer("top", top)
    if isinstance(top, Integral) and top < 0:
        checked.fail("top", "be at least 0", top)


def fake(query: Tensor, q_offsets: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return query.new_empty(pairs, query.shape[1]), q_offsets.new_empty(q_offsets.shape, dtype=torch.int64)


def fake_top(query: Tensor, top: int, **_: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], top)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


CASTS = casts("query", "key", "self_key")
OPS = (
    Op("target_attention_weights", reference.target_attention_weights, check, fake, CASTS),
    Op("target_attention_top", reference.target_attention_top, check_top, fake_top, CASTS),
)
