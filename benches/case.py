"""What a benchmark is made of: cases, the problem that a case builds, contenders that solve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

SUITES = ("smoke", "standard", "full", "growth")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Refused(Exception):
    """A peer is not installed, or cannot do this case; the message is the reason."""


@dataclass(frozen=True)
class Counts:
    """The work that a result needs, however it is computed: what a share of the machine is taken of.

    Attributes:
        flops: floating-point operations of the matrix products (a multiply-add is two).
        bytes: each input read once and each result written once.
        exps: exponentials.
    """

    flops: float
    bytes: float
    exps: float = 0.0


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's result, prepared: the inputs are in the layout that its users would have.

    Attributes:
        call: what is timed.
        read: its raw result as the problem's results (untimed).
        own_threads: it has a pool of threads of its own beside torch's. Such pools disturb each other where
            they alternate quickly, so samples are longer then.
        note: what a reader must know to read the figure.
        check: of its own result, where that is not the problem's.
    """

    call: Callable[[], Any]
    read: Callable[[Any], list[Tensor]] = lambda raw: list(raw) if isinstance(raw, tuple) else [raw]
    own_threads: bool = False
    note: str = ""
    check: Callable[[Sequence[Tensor]], Verdict] | None = None


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the reference, in its worst output, and how far it may be."""

    error: float
    allowed: float
    what: str = "result"

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # a NaN is not

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.2e}, allowed {self.allowed:.2e}"


class Problem(Protocol):
    """A case's inputs, and what is known of its result."""

    def counts(self) -> Counts: ...

    def ours(self) -> Contender: ...

    def backend(self) -> str:
        """The backend that serves our call."""

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict: ...


Peer = Callable[[Any], Contender]  # takes the problem, raises Refused
VARIANT = "+"  # begins the name of a contender that is our own call with something added


@dataclass(frozen=True)
class Case:
    """A row of the tables.

    Attributes:
        op: the name of the file that it comes from.
        name: unique within the op; `family/sizes/dtype`.
        suite: `full` has what `standard` has; `smoke` and `growth` stand alone.
        sizes: for the reports: by the design's letters.
        make: builds the problem on a device.
        peers: by name; with VARIANT before it, ours with something added.
        varied: in the growth suite: what is varied, and its value.
        threads: where the case says how many; else the runner's.
        more: what else to measure, of the contenders whose result is right; goes into the row as it is.
    """

    op: str
    name: str
    suite: str
    dtype: str
    sizes: Mapping[str, int | str]
    make: Callable[[torch.device], Problem]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    varied: tuple[str, int] | None = None
    threads: int | None = None
    more: Callable[[Any, Sequence[str]], dict[str, Any]] | None = None

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}"

    def in_suite(self, suite: str) -> bool:
        return self.suite == suite or (self.suite, suite) == ("standard", "full")


def compare(
    results: Sequence[Tensor],
    ways: Sequence[Sequence[Tensor]],
    exact: Sequence[Tensor],
    *,
    factors: Sequence[float],
    names: Sequence[str],
) -> Verdict:
    """The contract's rule, `|out - exact| <= factor * |plain - exact| + a rounding step`, twice.

    Once for the largest error, once for the root mean square: the largest sees a single wrong element, the
    mean a small error of many, which hides below a largest error that is a matter of luck.

    Args:
        ways: plain PyTorch's results in the case's dtype, by one way or by several that differ in the order
            of their sums: of their errors the largest counts. Where few rows decide, one order's largest
            error may be a third of another's.
        exact: the reference's results in float64.

    Returns:
        The verdict of the output that comes nearest to its limit, or is beyond it.
    """
    if len(results) != len(exact):
        return Verdict(float("nan"), 0.0, f"{len(results)} results in place of {len(exact)}")
    worst = Verdict(0.0, 1.0)
    for got, by_exact, factor, name, *by_plain in zip(results, exact, factors, names, *ways, strict=True):
        if got.shape != by_exact.shape:
            return Verdict(
                float("nan"), 0.0, f"{name} of shape {tuple(got.shape)}, not {tuple(by_exact.shape)}"
            )
        if by_exact.numel() == 0:
            continue
        finite = by_exact.isfinite()
        if not torch.equal(got.double()[~finite], by_exact[~finite]):
            return Verdict(float("nan"), 0.0, f"{name}: infinities")
        wide = by_exact.where(finite, 0.0)
        step = max(torch.finfo(by_plain[0].dtype).eps, torch.finfo(got.dtype).eps)
        errors, *of_plain = (_norms(x.double().where(finite, 0.0) - wide) for x in (got, *by_plain))
        for what, error, size, *others in zip(
            (name, f"{name} (mean)"), errors, _norms(wide), *of_plain, strict=True
        ):
            verdict = Verdict(error, factor * max(others) + step * max(size, 2.0**-14), what)
            if not verdict.right:
                return verdict
            if verdict.error / verdict.allowed > worst.error / worst.allowed:
                worst = verdict
    return worst


def _norms(x: Tensor) -> tuple[float, float]:
    """The largest magnitude and the root mean square."""
    return x.abs().max().item(), x.square().mean().sqrt().item()
