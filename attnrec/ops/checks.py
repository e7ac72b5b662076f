"""Argument checks, in the words that users read.

Every op has a function `check(values, **arguments)`. What shapes, dtypes and devices tell is always checked;
what takes reading the tensors (`values=True`) is checked where that costs no synchronisation: on the CPU, and
on other devices in debug mode. Compiled kernels check for themselves before they touch memory; when one
refuses, the public functions ask here for the reason, so that the exception is the same whichever backend
runs.

ValueError, or TypeError where the type or dtype is wrong: `op: argument must ..., got ...`.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real  # numpy's are among them
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)

_debug = False


def debug(on: bool = True) -> None:
    """Whether values are checked on devices where reading them costs a synchronisation (offsets that fall,
    `visible` out of range, ids outside the catalogue). Also by the environment: `ATTNREC_DEBUG=1`."""
    global _debug
    _debug = on


def reads_values(device: torch.device) -> bool:
    """Whether values on this device are checked."""
    return device.type == "cpu" or (_debug and device.type != "meta")


def same(a: int, b: int) -> bool:
    """Equal sizes; of sizes that a tracer does not know (of data-dependent shapes) it is assumed."""
    if type(a) is int and type(b) is int:
        return a == b
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(a == b)


def _fits(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(shape) != len(sizes):
        return False
    # A loop, not `all`: every tensor of every call comes here, and a generator takes longer than its work.
    for size, need in zip(shape, sizes, strict=True):
        if need is not None and not same(size, need):
            return False
    return True


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


class Check:
    """The checks of one call of an op."""

    def __init__(self, op: str, device_of: tuple[str, Any]) -> None:
        self.op = op
        self.reference_name, reference = device_of
        if not isinstance(reference, Tensor):
            self.fail(self.reference_name, "be a tensor", type(reference).__name__, TypeError)
        self.device = reference.device

    def fail(self, name: str, needs: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.op}: {name} must {needs}, got {got}")

    def tensor(
        self,
        name: str,
        x: Any,
        dims: str,
        sizes: Sequence[int | None],
        dtypes: Sequence[torch.dtype] = FLOATS,
    ) -> None:
        """A strided tensor of these sizes (None: any) and one of these dtypes, on the others' device."""
        if not isinstance(x, Tensor):
            self.fail(name, "be a tensor", type(x).__name__, TypeError)
        if x.layout != torch.strided:
            self.fail(name, "be a strided tensor", x.layout, TypeError)
        if x.dtype not in dtypes:
            self.fail(name, f"be {_names(dtypes)}", _names([x.dtype]), TypeError)
        if x.device != self.device:
            self.fail(name, f"be on {self.device} as {self.reference_name} is", x.device)
        if not _fits(x.shape, sizes):
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            self.fail(name, f"have shape {dims} = [{wanted}]", list(x.shape))

    def vectors(self, name: str, x: Any, dims: str) -> None:
        """Of any number and dim, but not without elements."""
        self.tensor(name, x, dims, (None, None))
        if isinstance(x.shape[1], int) and x.shape[1] < 1:
            self.fail(name, "have a dim D of at least 1", list(x.shape))

    def number(self, name: str, x: Any, *, above: float | None = None) -> None:
        """A finite number, above a bound; of a tracer's symbolic ones only the type is checked."""
        if isinstance(x, bool) or not isinstance(x, Real | torch.SymInt | torch.SymFloat):
            self.fail(name, "be a number", type(x).__name__, TypeError)
        if not isinstance(x, Real):
            return
        if not math.isfinite(x) or (above is not None and x <= above):
            self.fail(name, "be finite" + ("" if above is None else f" and above {above:g}"), x)

    def integer(self, name: str, x: Any) -> None:
        if isinstance(x, bool) or not isinstance(x, Integral | torch.SymInt):
            self.fail(name, "be an integer", type(x).__name__, TypeError)

    def offsets(self, name: str, offsets: Tensor, rows_of: str, rows: int) -> None:
        """Values: starting at 0, rising, ending at the number of rows."""
        if int(offsets[0]) != 0:
            self.fail(name, "start at 0", int(offsets[0]))
        falls = (offsets.diff() < 0).nonzero()
        if len(falls):
            user = int(falls[0])
            pair = f"{int(offsets[user])} and then {int(offsets[user + 1])} at position {user + 1}"
            self.fail(name, "not fall", pair)
        if int(offsets[-1]) != rows:
            self.fail(name, f"end at {rows}, the number of rows of {rows_of}", int(offsets[-1]))

    def within(self, name: str, x: Tensor, low: int, high: int | Tensor, meaning: str) -> None:
        """Values: from `low` to `high`, which may differ by position."""
        outside = ((x < low) | (x > high)).nonzero()
        if len(outside):
            at = int(outside[0])
            limit = high if isinstance(high, int) else int(high[at])
            self.fail(name, f"be from {low} to {meaning} ({limit})", f"{int(x[at])} at position {at}")
