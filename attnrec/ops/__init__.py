"""The ops in their native form: `call(name, ...)`.

Each has a file of its name with its checks, shapes and gradient; OPS is the list of them.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from attnrec._extension import extension
from attnrec.ops import (
    backends,
    catalog_cross_entropy,
    catalog_filter,
    catalog_topk,
    checks,
    registration,
    softmax_score,
    target_attention,
    target_attention_weights,
)
from attnrec.ops.backends import Explanation, use_backend
from attnrec.ops.checks import debug
from attnrec.ops.op import Op, is_differentiated, under_autocast

__all__ = ["OPS", "Explanation", "Op", "call", "debug", "explain", "use_backend"]

OPS: dict[str, Op] = {
    op.name: op
    for module in (
        target_attention,
        target_attention_weights,
        softmax_score,
        catalog_topk,
        catalog_filter,
        catalog_cross_entropy,
    )
    for op in module.OPS
}

if extension is not None:
    registration.register(list(OPS.values()))
    _functions: dict[str, Callable[..., Any]] = {
        name: getattr(torch.ops.attnrec, name).default for name in OPS
    }
else:
    _functions = {name: registration.without_dispatcher(op) for name, op in OPS.items()}

backends.force_by_environment()

_explaining = 0  # the thread that runs `explain`: calls of others are not held up


class _Explained(Exception):  # not an error: it ends the call that `explain` looks at
    def __init__(self, call: backends.Call) -> None:
        self.call = call


def _below_autograd(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may pass by the autograd kernel, which is Python and would do nothing: 4 us."""
    return not (
        extension is None
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()  # passes by anyway
        or torch._C._are_functorch_transforms_active()
        or is_differentiated(*args, *kwargs.values())
    )


def _bound(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> backends.Call:
    """The call as a backend would get it."""
    op = OPS[name]
    return backends.Call(op, under_autocast(op, op.bind(args, kwargs)))


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Runs an op. Bad arguments raise the ValueError or TypeError of `checks`, whichever backend met them."""
    if _explaining and _explaining == threading.get_ident():
        raise _Explained(_bound(name, args, kwargs))
    try:
        if _below_autograd(args, kwargs):
            with torch._C._AutoDispatchBelowAutograd():
                return _functions[name](*args, **kwargs)
        return _functions[name](*args, **kwargs)
    except RuntimeError as error:
        _raise_in_words(_bound(name, args, kwargs), error)
        raise


def _raise_in_words(call: backends.Call, error: RuntimeError) -> None:
    """What a compiled kernel refused, as the checks put it; nothing where they find no fault."""
    try:
        call.op.check(checks.reads_values(call.device), **call.arguments)
    except (TypeError, ValueError) as said:
        raise said from error


def explain(function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """What would run for this call, and why the other backends would not.

    `function` is one of the public functions, such as `attnrec.target_attention`, with its arguments; or an
    op's name with those of the op. Nothing is computed. The answer prints as text and has the fields `op`,
    `backend`, `forced` and `reasons`.
    """
    global _explaining
    if isinstance(function, str):
        if function not in OPS:
            raise ValueError(f"no op {function!r}: there are {', '.join(OPS)}")
        return backends.explanation(_bound(function, args, kwargs))
    _explaining = threading.get_ident()
    try:
        function(*args, **kwargs)
    except _Explained as reached:
        return backends.explanation(reached.call)
    finally:
        _explaining = 0
    raise ValueError(f"{getattr(function, '__name__', function)} called no op of attnrec")
