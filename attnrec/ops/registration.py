"""Gives the dispatcher what each op needs beside its compiled kernels.

- a fake implementation, which checks arguments and computes shapes: tracing, `torch.compile`, `torch.export`;
- an autograd kernel, first order; second order and forward mode raise NotImplementedError;
- autocast kernels;
- a kernel in Python that asks `backends.choose`, for every device and op without a compiled one.

`torch.library.register_autograd` refuses ops with optional tensors by keyword and lets a forward-mode tangent
vanish without a word, so the autograd kernel is written here. `torch.vmap` takes PyTorch's own fallback, a
loop over the mapped dimension, which is right and no faster than the loop.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from attnrec.ops import backends
from attnrec.ops.op import Op, is_differentiated, under_autocast

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_library: torch.library.Library | None = None
_cpu_detour: torch.library.Library | None = None
_registered: list[Op] = []


# --- autograd -----------------------------------------------------------------------------------------------


def _at_levels_below(compute: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    """`compute(*values)` inside a forward pass. Under `torch.func` an op passes one level of differentiation
    after the other, each inside the forward pass of the one above, where PyTorch turns differentiation off: a
    second level would see constants and give zeros without a word."""
    if torch._C._are_functorch_transforms_active():
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return compute(*values)
    return compute(*values)


class _Recorded(_SingleLevelFunction):
    """One op on the tape. `torch.autograd.Function` proper would start over at the top level of `torch.func`;
    the dispatcher has already come down to this one."""

    @staticmethod
    def forward(ctx: Any, op: Op, compute: Callable[..., Any], *values: Any) -> Any:
        result = _at_levels_below(compute, values)
        ctx.op = op
        ctx.set_materialize_grads(False)
        if op.gradient is not None:
            outputs = result if isinstance(result, tuple) else (result,)
            ctx.mark_non_differentiable(*(outputs[i] for i in op.gradient.constants))
            tensors = [x if isinstance(x, Tensor) else None for x in values]
            ctx.save_for_backward(*tensors, *outputs)
            ctx.values = [None if isinstance(x, Tensor) else x for x in values]
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        op: Op = ctx.op
        if op.gradient is None:
            raise NotImplementedError(_refusal(op))
        count = len(op.names)
        saved = ctx.saved_tensors
        values = [x if x is not None else y for x, y in zip(saved[:count], ctx.values, strict=True)]
        needs = dict(zip(op.names, ctx.needs_input_grad[2:], strict=True))
        arguments = dict(zip(op.names, values, strict=True))
        if all(grad is None for grad in grads):
            return (None,) * (2 + count)
        found = dict(
            zip(op.gradient.of, op.gradient.call(grads, arguments, saved[count:], needs), strict=True)
        )
        return None, None, *(found[name] if needs[name] else None for name in op.names)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"attnrec::{ctx.op.name} has no forward-mode derivative")


def _refusal(op: Op) -> str:
    if op.name.endswith("_backward"):
        return f"attnrec::{op.name.removesuffix('_backward')} has no second-order gradient"
    return f"attnrec::{op.name} is forward only: call it under torch.no_grad() or detach its result"


def _record(op: Op, compute: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return _Recorded.apply(op, compute, *values)
    return _Recorded.apply(op, compute, *values)


def _autograd_kernel(op: Op, overload: torch._ops.OpOverload) -> Callable[..., Any]:
    names, positional = op.names, op.positional
    after = torch._C._after_autograd_keyset

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if not is_differentiated(*args, *kwargs.values()):
            return overload.redispatch(keyset & after, *args, **kwargs)

        def compute(*values: Any) -> Any:
            by_name = dict(zip(names[positional:], values[positional:], strict=True))
            return overload.redispatch(keyset & after, *values[:positional], **by_name)

        return _record(op, compute, tuple(op.bind(args, kwargs).values()))

    return kernel


# --- registration -------------------------------------------------------------------------------------------


def _fake(op: Op) -> Callable[..., Any]:
    def fake(*args: Any, **kwargs: Any) -> Any:
        arguments = op.bind(args, kwargs)
        op.check(False, **arguments)
        return op.fake(**arguments)

    return fake


def _autocast_kernel(op: Op, overload: torch._ops.OpOverload, device_type: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        arguments = op.autocast(op.bind(args, kwargs), torch.get_autocast_dtype(device_type))
        args, kwargs = op.split(arguments)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return overload(*args, **kwargs)

    return kernel


def _choosing_kernel(op: Op) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return backends.serve(backends.Call(op, op.bind(args, kwargs)))

    return kernel


def register(ops: list[Op]) -> None:
    """Registers the ops, whose schemas the extension has defined."""
    global _library
    _library = torch.library.Library("attnrec", "FRAGMENT")
    for op in ops:
        overload = getattr(torch.ops.attnrec, op.name).default
        torch.library.register_fake(f"attnrec::{op.name}", _fake(op), lib=_library)
        _library.impl(op.name, _choosing_kernel(op), "CompositeExplicitAutograd")
        _library.impl(op.name, _autograd_kernel(op, overload), "Autograd", with_keyset=True)
        if op.autocast is not None:
            _library.impl(op.name, _autocast_kernel(op, overload, "cpu"), "AutocastCPU")
            _library.impl(op.name, _autocast_kernel(op, overload, "cuda"), "AutocastCUDA")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"attnrec::{op.name}", "CPU"):
            backends.CPU.kernels.add(op.name)
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"attnrec::{op.name}", "CUDA"):
            backends.CUDA.kernels[op.name] = torch.library.get_kernel(overload, "CUDA")
            _put_over(_library, op, "CUDA")
        _registered.append(op)


def _put_over(library: torch.library.Library, op: Op, key: str) -> None:
    """The choosing kernel in place of a compiled one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        library.impl(op.name, _choosing_kernel(op), key)


def reroute_cpu(through_choice: bool) -> None:
    """Puts the choosing kernels in place of the compiled ones on the CPU, or takes them away again."""
    global _cpu_detour
    if _cpu_detour is not None:
        _cpu_detour._destroy()
        _cpu_detour = None
    if through_choice and _registered:
        _cpu_detour = torch.library.Library("attnrec", "IMPL")
        for op in _registered:
            _put_over(_cpu_detour, op, "CPU")


# --- without the extension ----------------------------------------------------------------------------------


def without_dispatcher(op: Op) -> Callable[..., Any]:
    """The op as a plain function, for where no extension defines its schema: autocast, choice, and the
    gradient of the reference, by PyTorch's autograd."""

    def function(*args: Any, **kwargs: Any) -> Any:
        def compute(*values: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return backends.serve(backends.Call(op, dict(zip(op.names, values, strict=True))))

        values = tuple(under_autocast(op, op.bind(args, kwargs)).values())
        refuses = op.gradient is None and is_differentiated(*values)
        return _record(op, compute, values) if refuses else compute(*values)

    return function
