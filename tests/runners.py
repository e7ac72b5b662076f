"""Where the ops' tests run: one suite, five runners. ATTNREC_TEST_RUNNER chooses; `native` is the default.

| runner | tensors | what serves them |
| --- | --- | --- |
| native | on the CPU | the usual choice, which is the C++ kernels |
| interpreter | on the CPU | the Triton kernels in Triton's interpreter: their logic, in numpy |
| emulator | on the CPU | the Triton kernels as compiled for sm_80, executed by tests/ptxemu |
| cuda-emulator | on the CPU | the CUDA C++ kernels, their launchers and their binding, likewise |
| device | on the GPU | the Triton kernels, or the backend that ATTNREC_BACKEND names |

The middle three are a thousand times slower than hardware. For them alone everything that makes a run long is
turned down here, and only here: a parametrised test keeps a covering part of its cases (`thin`), and at most
`most` of these, or three times as many where they are of options; sizes that are large for the sake of being
large are cut (`smaller`), hypothesis draws fewer examples.
ATTNREC_TEST_FULL=1 turns it all up again; 0 keeps the covering part on a fast runner too.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WITHOUT_DOUBLE = ALL[:3]


@dataclass(frozen=True)
class Runner:
    name: str
    device: str = "cpu"
    backend: str | None = None  # forced for the whole session
    dtypes: tuple[torch.dtype, ...] = ALL
    examples: int = 25
    threads: tuple[int, ...] = (1, 2, 5, 2)  # to repeat a call with
    divisor: int = 1
    thin: bool = False
    most: int | None = None

    @property
    def widest(self) -> torch.dtype:
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    def smaller(self, size: int) -> int:
        """A size that is large for the sake of being large, cut where everything is slow."""
        return size // self.divisor

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Everything that has to hold while tests run."""
        import attnrec

        with contextlib.ExitStack() as stack:
            if self.name == "interpreter":
                stack.enter_context(_patched_once())
            if self.name == "emulator":
                from ptxemu.session import session

                stack.enter_context(session())
            if self.name == "cuda-emulator":
                from ptxemu import project

                stack.enter_context(project.served())
            if self.backend == "cuda":
                stack.enter_context(_only_ops_with_a_kernel())
            if self.backend is not None:
                stack.enter_context(attnrec.use_backend(self.backend))
            yield


@contextlib.contextmanager
def _patched_once() -> Iterator[None]:
    """Triton's interpreter patches triton.language at every launch, and again at every call of a device
    function. That takes half of its time, and is needed once for each module that such functions come from:
    what the launch patches it puts back, and what a call patches stays.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    with mock.patch.object(interpreter.InterpretedFunction, "__call__", call):
        yield


@contextlib.contextmanager
def _only_ops_with_a_kernel() -> Iterator[None]:
    """A test that comes to an op without a CUDA kernel is skipped, where the build has any."""
    from attnrec.ops import backends

    usual = backends.CUDA.supports

    def supports(call: backends.Call) -> str | None:
        why_not = usual(call)
        if backends.CUDA.kernels and call.op.name not in backends.CUDA.kernels:
            pytest.skip(str(why_not))
        return why_not

    with mock.patch.object(backends.CUDA, "supports", supports):
        yield


RUNNERS = {
    runner.name: runner
    for runner in (
        Runner("native"),
        Runner("interpreter", "cpu", "triton", WITHOUT_DOUBLE, 2, (1,), 8, thin=True, most=2),
        Runner("emulator", "cpu", "triton", WITHOUT_DOUBLE, 2, (1,), 8, thin=True, most=2),
        Runner("cuda-emulator", "cpu", "cuda", WITHOUT_DOUBLE, 2, (1,), 8, thin=True, most=1),
        Runner("device", "cuda", os.environ.get("ATTNREC_BACKEND", "triton"), WITHOUT_DOUBLE, threads=(1, 2)),
    )
}


def chosen() -> Runner:
    name = os.environ.get("ATTNREC_TEST_RUNNER", "native")
    if name not in RUNNERS:
        raise ValueError(f"ATTNREC_TEST_RUNNER must be one of {', '.join(RUNNERS)}, got {name!r}")
    runner = RUNNERS[name]
    full = os.environ.get("ATTNREC_TEST_FULL")
    if full == "1":
        runner = replace(runner, examples=25, divisor=1, thin=False, most=None)
    elif full == "0":
        runner = replace(runner, examples=min(runner.examples, 5), thin=True)
    if "ATTNREC_TEST_EXAMPLES" in os.environ:
        runner = replace(runner, examples=int(os.environ["ATTNREC_TEST_EXAMPLES"]))
    if runner.name == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    return runner


def covering(cases: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of some cases (values by parameter) in which every value of every parameter occurs.

    For each value that does not occur yet a case whose values occur least so far, so that they meet in many
    combinations; always the same cases.
    """
    order = list(range(len(cases)))
    random.Random(0).shuffle(order)
    times: Counter[tuple[str, Any]] = Counter()
    kept = set()
    for case in cases:
        for value in case.items():
            if not times[value]:
                having = (index for index in order if value in cases[index].items())
                best = min(having, key=lambda index: sum(times[other] for other in cases[index].items()))
                kept.add(best)
                times.update(cases[best].items())
    return sorted(kept)


RUNNER = chosen()
if RUNNER.device != "cpu":  # for tensors that a test makes without saying where
    torch.set_default_device(RUNNER.device)
