"""The Triton backend beside its numbers: what it refuses, in which words, and what its launch code may do."""

import os
import re
import subprocess
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import make_jagged
from helpers_ops import DIFFERENTIABLE, FORWARD_ONLY, inputs, of_backward
from runners import RUNNER

import attnrec
from attnrec import kernels, ops
from attnrec.ops import backends
from attnrec.ops.op import device_of

triton = pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.skipif(RUNNER.name != "native", reason="tests of what surrounds the kernels")
ROOT = Path(__file__).resolve().parents[1]
BATCH = make_jagged([2, 1], [3, 2], heads=2, dim=8)
BACKEND = backends._named("triton")


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def call(name, arguments):
    return backends.Call(ops.OPS[name], ops.OPS[name].bind(arguments, {}))


class TestWhereItRuns:
    def test_nothing_imports_triton_before_it_is_needed(self):
        code = """
            import sys, torch
            before = "triton" in sys.modules  # torch itself may
            import attnrec, attnrec.kernels
            x = torch.ones(2, 1, 8); o = torch.tensor([0, 2])
            attnrec.target_attention(x, x, x, o, o)
            attnrec.explain(attnrec.target_attention, x, x, x, o, o)
            print(before or "triton" not in sys.modules)
        """
        assert python(code) == "True"

    def test_without_triton(self):
        code = """
            import sys
            sys.modules["triton"] = None
            import torch, attnrec
            x = torch.ones(2, 1, 8); o = torch.tensor([0, 2])
            print(attnrec.explain(attnrec.target_attention, x, x, x, o, o).reasons["triton"])
            print(attnrec.target_attention(x, x, x, o, o).sum().item())
        """
        assert python(code, TRITON_INTERPRET="1").startswith("triton is not there: ")

    @pytest.mark.parametrize(("version", "old"), [("3.5.1", True), ("3.6.0", False), ("3.10.0+git1", False)])
    def test_an_old_triton(self, monkeypatch, version, old):
        monkeypatch.setattr(triton, "__version__", version)
        why = kernels._why_no_triton.__wrapped__()
        assert why == (f"triton {version} is older than 3.6" if old else None)

    @pytest.mark.parametrize(
        ("capability", "cuda", "why"),
        [
            ((7, 5), "13.0", "the GPU is sm_75, and the kernels need sm_80 or newer"),
            ((8, 0), "13.0", None),
            ((12, 0), "13.0", None),
            ((9, 4), None, "the kernels are written for NVIDIA GPUs"),
        ],
    )
    def test_the_gpu(self, monkeypatch, capability, cuda, why):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert kernels._why_not_gpu.__wrapped__(torch.device("cuda")) == why

    def test_cpu_tensors_are_not_interpreted_unless_it_is_forced(self):
        """Somebody who debugs kernels of their own under the interpreter keeps the fast ones here."""
        code = """
            import torch, attnrec
            x = torch.ones(2, 1, 8); o = torch.tensor([0, 2])
            said = attnrec.explain(attnrec.target_attention, x, x, x, o, o)
            print(said.backend, said.reasons["triton"], sep="; ")
            with attnrec.use_backend("triton"):
                print(attnrec.explain(attnrec.target_attention, x, x, x, o, o).backend)
                print(attnrec.target_attention(x, x, x, o, o).sum().item())
        """
        lines = python(code, TRITON_INTERPRET="1").splitlines()
        assert lines[0].endswith("; CPU tensors are interpreted only where this backend is forced")
        assert lines[1:] == ["triton", "16.0"]

    def test_the_environment_forces_it(self):
        code = """
            import torch, attnrec
            print(attnrec.explain(attnrec.softmax_score, torch.ones(2, 8), torch.ones(2, 3, 8)).backend)
        """
        assert python(code, TRITON_INTERPRET="1", ATTNREC_BACKEND="triton") == "triton"


class TestWhatItTakes:
    @pytest.fixture(autouse=True)
    def on_this_device(self, monkeypatch):
        """As if it ran here; nothing is."""
        monkeypatch.setattr(kernels, "_cpu_tensors_allowed", lambda: True)
        with attnrec.use_backend("triton"):
            yield

    def why_not(self, function, *arguments, **options):
        return attnrec.explain(function, *arguments, **options).reasons.get("triton")

    def test_every_op(self):
        # A filter is for kernels of the CPU: those of a GPU read the rows.
        assert ops.OPS.keys() - kernels.MODULES.keys() == {"catalog_filter"}
        for name, module in kernels.MODULES.items():
            assert module == name.removesuffix("_backward") or module.startswith(name)
            assert callable(kernels.kernel(name))

    def test_dtypes(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert (
                self.why_not("target_attention", *(x.to(dtype) for x in BATCH.args[:3]), *BATCH.args[3:])
                is None
            )
        wide = [x.double() for x in BATCH.args[:3]]
        why = self.why_not("target_attention", *wide, *BATCH.args[3:])
        assert why == "Triton kernels take float32, bfloat16 and float16, not float64"
        with pytest.raises(
            RuntimeError, match="triton can't serve target_attention: Triton kernels take float32"
        ):
            attnrec.target_attention(*wide, *BATCH.args[3:])

    def test_long_vectors(self):
        users, items = torch.ones(2, 257), torch.ones(5, 257)
        why = self.why_not("catalog_topk", users, items, 2)
        assert why == "the kernels take vectors of up to 256 elements, not 257"

    def test_bad_arguments_are_named_as_everywhere(self):
        with pytest.raises(ValueError, match="query must have a head dim D from 1 to 256, got 300"):
            attnrec.target_attention(
                *(x[..., :1].expand(-1, -1, 300) for x in BATCH.args[:3]), *BATCH.args[3:]
            )
        with pytest.raises(TypeError, match="key must be float32, got float64"):
            attnrec.explain(attnrec.target_attention, BATCH.query, BATCH.key.double(), *BATCH.args[2:])

    def test_gradients_without_the_extension(self, monkeypatch):
        monkeypatch.setattr(backends, "extension", None)
        monkeypatch.setattr(backends, "reason", "not built")
        query = BATCH.query.clone().requires_grad_()
        why = self.why_not("target_attention", query, *BATCH.args[1:])
        assert why == "without the extension, gradients are the reference's (not built)"
        with torch.no_grad():
            assert self.why_not("target_attention", query, *BATCH.args[1:]) is None

    def test_limits_of_a_kernel(self, monkeypatch):
        module = mock.Mock(why_not=lambda op, arguments: f"{op} at temperature {arguments['temperature']}")
        monkeypatch.setattr(kernels, "_module", lambda _: module)
        why = self.why_not("softmax_score", torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0, 3]))
        assert why == "softmax_score at temperature 1.0"


# --- launch code --------------------------------------------------------------------------------------------


def every_call():
    """(op, positional arguments, keyword arguments): plain, and with all options, backward ops too."""
    for name in DIFFERENTIABLE + FORWARD_ONLY:
        for args, kwargs in inputs(name, requires_grad=False):
            yield name, args, kwargs
            if name in DIFFERENTIABLE:
                result = ops.OPS[name].reference(*args, **kwargs)
                yield f"{name}_backward", of_backward(name, args, result), kwargs


CALLS = list(every_call())


@contextmanager
def recorded_launches():
    """Launches are written down and not made; as if on an A100."""
    from attnrec.kernels.standin import stand_in
    from triton.runtime.jit import JITFunction

    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self.__name__, grid(kwargs) if callable(grid) else grid, [*args, *kwargs.values()]))

    with mock.patch.object(JITFunction, "run", run), stand_in(80, lambda _: None):
        yield launches


def without_values(x):
    """The tensor's shape, strides and dtype on a device whose values nobody can read."""
    return x.to("meta") if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize(
    "index", range(len(CALLS)), ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CALLS)]
)
def test_launch_code_reads_no_value(index):
    """On tensors without values: `.item()` and all else that would wait for a GPU raises. No kernel gets a
    tensor of another device."""
    name, args, kwargs = CALLS[index]
    if name not in kernels.MODULES:
        pytest.skip(f"no kernel of {name}")
    if name == "target_attention_weights":  # the number of all weights is a value: one read, and only there
        reads = pytest.raises((RuntimeError, NotImplementedError), match="meta")
    else:
        reads = nullcontext()
    with recorded_launches() as launches, reads:
        arguments = {key: without_values(x) for key, x in ops.OPS[name].bind(args, kwargs).items()}
        result = kernels.kernel(name)(**arguments)
        expected = ops.OPS[name].fake(**arguments)
        for got, want in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected)), strict=True):
            assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")
        assert 1 <= len(launches) <= 6
        for kernel, grid, values in launches:
            assert all(isinstance(n, int) and n >= 1 for n in grid), (kernel, grid)
            assert all(x.is_meta for x in values if isinstance(x, torch.Tensor)), kernel


def test_it_launches_on_the_device_of_the_tensors(monkeypatch):
    current = []

    @contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "kernel", lambda name: lambda **arguments: (name, list(current)))
    second = torch.device("cuda:1")
    monkeypatch.setattr(backends, "device_of", lambda _: second)
    assert BACKEND.run(call("target_attention", BATCH.args)) == ("target_attention", [second])
    monkeypatch.setattr(backends, "device_of", lambda _: torch.device("cuda:0"))  # the current one already
    assert BACKEND.run(call("target_attention", BATCH.args)) == ("target_attention", [])
    monkeypatch.setattr(backends, "device_of", device_of)
    assert BACKEND.run(call("target_attention", BATCH.args)) == ("target_attention", [])


def test_every_kernel_has_a_row_in_the_status():
    rows = (ROOT / "docs" / "gpu-status.md").read_text().splitlines()
    for file in sorted((ROOT / "kernels").glob("*.py")):
        launched = set(re.findall(r"^ +(\w+)\[.*\]\(", file.read_text(), re.MULTILINE))
        row = next((row for row in rows if row.startswith(f"| `{file.name}` |")), "")
        assert launched == set(re.findall(r"`(\w+)`", row)), file.name
