"""The backends, which of them serves a call, and how a user chooses or asks.

A backend has a `name`, says of a call why it cannot serve it (`supports`, None where it can), and runs it.
BACKENDS is the order of preference, but for the ops of TRITON_FIRST: the first that supports a call serves
it, unless one is forced. `reference` is last and supports everything.

On CPU tensors the usual call never comes here: the C++ kernels are registered for the CPU with the dispatcher
itself. A kernel that asks here takes their place only while another backend is forced
(`registration.reroute_cpu`).
"""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from attnrec import kernels
from attnrec._extension import extension, reason
from attnrec.ops import checks
from attnrec.ops.op import Arguments, Op, device_of, is_differentiated


@dataclass(frozen=True)
class Call:
    """An op and all its arguments by name, in the native form."""

    op: Op
    arguments: Arguments

    @cached_property
    def device(self) -> torch.device:
        return device_of(self.arguments)


class Backend(Protocol):
    """Both are asked about calls whose arguments have passed the op's checks."""

    name: str

    def supports(self, call: Call) -> str | None:
        """Why not, or None."""

    def run(self, call: Call) -> Any: ...


class Reference:
    """Plain PyTorch: attnrec/reference.py."""

    name = "reference"

    def supports(self, call: Call) -> str | None:
        return None

    def run(self, call: Call) -> Any:
        return call.op.reference(**call.arguments)


class Cpu:
    """The C++ kernels of csrc/cpu, which the dispatcher calls by itself."""

    name = "cpu"

    def __init__(self) -> None:
        self.kernels: set[str] = set()  # names of ops; filled at registration

    def supports(self, call: Call) -> str | None:
        if extension is None:
            return reason
        if call.device.type != "cpu":
            return f"the tensors are on {call.device}"
        if call.op.name not in self.kernels:
            return f"this build has no CPU kernel of {call.op.name}"
        return None

    def run(self, call: Call) -> Any:
        args, kwargs = call.op.split(call.arguments)
        return getattr(torch.ops.attnrec, call.op.name)(*args, **kwargs)


class Triton:
    """The kernels of kernels/, installed as `attnrec.kernels`; a call that asks for one imports Triton."""

    name = "triton"

    def supports(self, call: Call) -> str | None:
        op, device = call.op.name, call.device
        why_not = kernels.why_not(device)
        if why_not is not None:
            return why_not
        if op not in kernels.MODULES:
            return f"there is no Triton kernel of {op}"
        if device.type == "cpu" and _forced is not self:
            # TRITON_INTERPRET=1 may be set for somebody else's kernels, and C++ is a thousand times faster.
            return "CPU tensors are interpreted only where this backend is forced"
        tensors = [x for x in call.arguments.values() if isinstance(x, Tensor)]
        if torch.float64 in [x.dtype for x in tensors]:
            return "Triton kernels take float32, bfloat16 and float16, not float64"
        if extension is None and is_differentiated(*tensors):
            return f"without the extension, gradients are the reference's ({reason})"
        return kernels.why_not_these(op, call.arguments)

    def run(self, call: Call) -> Any:
        function = kernels.kernel(call.op.name)
        device = call.device
        # Triton launches on the current device, which need not be the tensors' own.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return function(**call.arguments)
        return function(**call.arguments)


class Cuda:
    """The CUDA C++ kernels of csrc/cuda. Where there is no Python the dispatcher calls them by itself; here a
    kernel that asks for the choice lies over them."""

    name = "cuda"

    def __init__(self) -> None:
        # By name of the op, as torch.library.get_kernel gives them; filled at registration.
        self.kernels: dict[str, Any] = {}
        self.device = "cuda"
        self._tf32 = False  # what the kernels were last told

    def supports(self, call: Call) -> str | None:
        if extension is None:
            return reason
        if not self.kernels:
            return extension.build["why_no_cuda"]
        if call.device.type != self.device:
            return f"the tensors are on {call.device}"
        if call.op.name not in self.kernels:
            return f"there is no CUDA kernel of {call.op.name}"
        if any(x.dtype == torch.float64 for x in call.arguments.values() if isinstance(x, Tensor)):
            return "CUDA kernels take float32, bfloat16 and float16, not float64"
        if self.device == "cuda":
            major, minor = torch.cuda.get_device_capability(call.device)
            if major < 8:
                return f"the GPU is sm_{major}{minor}, and the kernels need sm_80 or newer"
        return _beyond_cuda(call.op.name, call.arguments)

    def run(self, call: Call) -> Any:
        args, kwargs = call.op.split(call.arguments)
        tf32 = torch.get_float32_matmul_precision() != "highest"
        if tf32 != self._tf32:
            torch.ops.attnrec.allow_tf32(tf32)
            self._tf32 = tf32
        return self.kernels[call.op.name].call_boxed(_CUDA_KEYS, *args, **kwargs)


def _beyond_cuda(op: str, arguments: Arguments) -> str | None:
    """What an op's CUDA kernel does not take, beyond the op's own checks."""
    if not op.startswith("catalog_"):
        return None
    dim = arguments["users"].shape[1]
    if dim > 256:
        return f"the kernels of {op} take vectors of up to 256 elements, not {dim}"
    if op == "catalog_topk" and arguments["catalog"].shape[0] >> 30:
        items = arguments["catalog"].shape[0]
        return f"the catalogue has {items} items, and the kernel counts them in 30 bits"
    return None


_CUDA_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

CPU = Cpu()
CUDA = Cuda()
BACKENDS: tuple[Backend, ...] = (CUDA, Triton(), CPU, Reference())


def _modelled(a100: str, h100: str) -> str:
    return (
        f"no GPU has compared them yet; by the model (docs/gpu-model.md) CUDA C++ is {a100} times as fast "
        f"on an A100, {h100} on an H100"
    )


_UNKNOWN = "neither a GPU nor the model (docs/gpu-model.md) has compared them yet"

# Ops for which Triton's kernel comes before CUDA's, and on what grounds: one that has not been measured to be
# slower than the other stays where it was. The figures are those of the page (tests/test_docs.py).
TRITON_FIRST: dict[str, str] = {
    "target_attention": _modelled("1.10 to 1.31", "0.77 to 1.00"),
    "target_attention_backward": _modelled("0.61 to 1.25", "0.42 to 0.68"),
    "target_attention_weights": _UNKNOWN,
    "target_attention_top": _UNKNOWN,
    "catalog_topk": _UNKNOWN,
    "softmax_score": _UNKNOWN,
    "softmax_score_backward": _UNKNOWN,
    "catalog_cross_entropy": _modelled("1.14 to 1.91", "0.80 to 1.17"),
    "catalog_cross_entropy_backward": _UNKNOWN,
}

_TRITON_BEFORE = tuple(sorted(BACKENDS, key=lambda backend: backend.name != "triton"))

_forced: Backend | None = None


def _named(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"no backend {name!r}: there are {', '.join(b.name for b in BACKENDS)}")


def _in_order(op: str) -> tuple[Backend, ...]:
    """The backends, the preferred first."""
    return _TRITON_BEFORE if op in TRITON_FIRST else BACKENDS


def choose(call: Call) -> Backend:
    """The backend that serves the call: the forced one, or the first that supports it."""
    if _forced is not None:
        why_not = _forced.supports(call)
        if why_not is not None:
            raise RuntimeError(f"the backend {_forced.name} can't serve {call.op.name}: {why_not}")
        return _forced
    return next(backend for backend in _in_order(call.op.name) if backend.supports(call) is None)


def serve(call: Call) -> Any:
    """Checks the arguments and runs the call on the backend that is chosen for it."""
    call.op.check(checks.reads_values(call.device), **call.arguments)
    return choose(call).run(call)


class use_backend:  # a function to its user, which may also stand in a `with`
    """Forces a backend, by name, for all threads of the process; None: the usual choice by call.

    As a plain call it holds until the next; in a `with` statement until its end. `ATTNREC_BACKEND` in the
    environment does the same from the start. A call that the backend can't serve raises RuntimeError with the
    reason.

        attnrec.use_backend("reference")
        with attnrec.use_backend("reference"):
            ...
    """

    def __init__(self, name: str | None) -> None:
        self._before = _forced
        _force(None if name is None else _named(name))

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *_: object) -> None:
        _force(self._before)


def _force(backend: Backend | None) -> None:
    from attnrec.ops import registration  # which itself asks `choose`

    global _forced
    _forced = backend
    # The CPU's own kernels need no detour where they are the ones that are asked for.
    registration.reroute_cpu(backend is not None and backend.name != "cpu")


def force_by_environment() -> None:
    name = os.environ.get("ATTNREC_BACKEND")
    if name:
        _force(_named(name))
    if os.environ.get("ATTNREC_DEBUG", "0") not in ("", "0"):
        checks.debug(True)


@dataclass(frozen=True)
class Explanation:
    """What would run, and why not the others; prints as text."""

    op: str
    backend: str | None  # None: the forced backend can't serve the call
    forced: bool
    reasons: dict[str, str]

    def __str__(self) -> str:
        how = " (forced)" if self.forced else ""
        lines = [f"{self.op}: {self.backend or 'raises'}{how}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.reasons.items()])


def explanation(call: Call) -> Explanation:
    """What `choose` does with the call, and why; bad shapes, dtypes and devices raise as in a call."""
    call.op.check(False, **call.arguments)
    reasons = {b.name: why for b in BACKENDS if (why := b.supports(call)) is not None}
    if _forced is not None:
        able = None if _forced.name in reasons else _forced.name
        others = {b.name: f"{_forced.name} is forced" for b in BACKENDS if b is not _forced}
        return Explanation(call.op.name, able, True, others | reasons)
    chosen = choose(call)
    first = f"{chosen.name} comes first"
    others = {b.name: reasons.get(b.name, first) for b in BACKENDS if b is not chosen}
    if chosen.name == "triton" and others["cuda"] == first:
        others["cuda"] += f": {TRITON_FIRST[call.op.name]}"
    return Explanation(call.op.name, chosen.name, False, others)
