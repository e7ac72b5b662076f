"""What the project knows of an op: its meaning, its checks, its shapes, its gradient."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Gradient:
    """How autograd asks for an op's gradient.

    `of` names the arguments that have one, in the order in which `call(grads, arguments, outputs, needs)`
    gives them: `grads` of the outputs (None where unused), the op's `arguments` and `outputs`, and by name
    whether each gradient is needed. An absent one is an empty tensor.
    """

    of: tuple[str, ...]
    call: Callable[
        [tuple[Tensor | None, ...], Arguments, tuple[Tensor, ...], dict[str, bool]], tuple[Tensor, ...]
    ]
    # Outputs that backward needs and nobody may differentiate, by index.
    constants: tuple[int, ...] = ()


@dataclass(frozen=True)
class Op:
    """An op of the namespace `attnrec`. Its schema, in csrc/library.cpp, is the signature of `reference`."""

    name: str
    reference: Callable[..., Any]
    check: Callable[..., None]  # check(values, **arguments)
    fake: Callable[..., Any]  # results without values, for tracing
    autocast: Callable[[Arguments, torch.dtype], Arguments] | None = None
    gradient: Gradient | None = None  # None: forward only
    names: tuple[str, ...] = field(init=False)
    positional: int = field(init=False)
    defaults: Arguments = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.reference).parameters.values()
        fill = object.__setattr__  # the dataclass is frozen
        fill(self, "names", tuple(p.name for p in parameters))
        fill(self, "positional", sum(p.kind is not p.KEYWORD_ONLY for p in parameters))
        fill(self, "defaults", {p.name: p.default for p in parameters if p.default is not p.empty})

    def bind(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """All arguments by name, in the schema's order; the dispatcher leaves out those at their default."""
        given = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        return {name: given[name] for name in self.names}

    def split(self, arguments: Arguments) -> tuple[tuple[Any, ...], Arguments]:
        """Positional and keyword arguments of the schema."""
        values = [arguments[name] for name in self.names]
        return tuple(values[: self.positional]), dict(
            zip(self.names[self.positional :], values[self.positional :], strict=True)
        )


def device_of(arguments: Arguments) -> torch.device:
    """The device of a call: that of its first tensor; without one the CPU, and the checks will object."""
    for x in arguments.values():
        if isinstance(x, Tensor):
            return x.device
    return torch.device("cpu")


def under_autocast(op: Op, arguments: Arguments) -> Arguments:
    """The arguments as autocast changes them, where it is on."""
    device = device_of(arguments).type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return op.autocast(arguments, torch.get_autocast_dtype(device)) if on and op.autocast else arguments


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exp, losses and scores."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_differentiated(*values: Any) -> bool:
    """Whether autograd, in either direction, would record a call with these arguments."""
    # `requires_grad` does not tell of forward mode's tangents, which would vanish unless it is recorded.
    requires_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*values)
    return requires_grad or forward_ad._current_level >= 0


def casts(*names: str) -> Callable[[Arguments, torch.dtype], Arguments]:
    """Under autocast these arguments take its dtype; float64 stays, as in torch's own ops."""

    def autocast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
        def cast(x: Tensor | None) -> Tensor | None:
            keep = not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64
            return x if keep else x.to(dtype)

        return arguments | {name: cast(arguments[name]) for name in names}

    return autocast


def gradients_by_autograd(
    reference: Callable[..., Any],
    of: tuple[str, ...],
    arguments: Arguments,
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """The reference's gradients: the forward pass again, then PyTorch's autograd."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in of if arguments[name] is not None}
    with _recording():
        result = reference(**(arguments | leaves))
        outputs = result if isinstance(result, tuple) else (result,)
        # A batch without rows has outputs without elements, which depend on nothing.
        pairs = zip(outputs, grads, strict=True)
        used = [(out, grad) for out, grad in pairs if grad is not None and out.numel() > 0]
        if used:
            found = torch.autograd.grad(
                [out for out, _ in used],
                list(leaves.values()),
                [grad for _, grad in used],
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            found = tuple(torch.zeros_like(x) for x in leaves.values())
    by_name = dict(zip(leaves, found, strict=True))
    absent = next(iter(leaves.values())).detach().new_empty(0)
    return tuple(by_name[name].contiguous() if name in by_name else absent.clone() for name in of)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd on, also inside an op: compiled graphs run their ops with it cut off for the thread."""
    included, excluded = (
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set(),
    )
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, excluded - autograd):
        yield
