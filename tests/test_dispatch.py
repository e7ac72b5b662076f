"""Which backend serves a call, how it is forced, and what `explain` says of it."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from helpers import make_jagged, make_offsets

import attnrec
from attnrec import ops, reference
from attnrec._extension import extension
from attnrec.ops import backends

BATCH = make_jagged([2, 1], [3, 2], heads=2, dim=8)
needs_extension = pytest.mark.skipif(extension is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def unforced():
    yield
    attnrec.use_backend(None)


@pytest.fixture
def reference_calls(monkeypatch):
    """How often the reference served `target_attention`."""
    calls = []
    original = backends.Reference.run

    def run(self, call):
        calls.append(call.op.name)
        return original(self, call)

    monkeypatch.setattr(backends.Reference, "run", run)
    return calls


def run_python(code: str, **environment: str) -> str:
    """The output of a Python process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestUseBackend:
    def test_as_a_call(self, reference_calls):
        attnrec.use_backend("reference")
        attnrec.target_attention(*BATCH.args)
        assert reference_calls == ["target_attention"]
        attnrec.use_backend(None)
        attnrec.target_attention(*BATCH.args)
        assert len(reference_calls) == (1 if "target_attention" in backends.CPU.kernels else 2)

    def test_as_a_context(self, reference_calls):
        attnrec.use_backend("reference")
        with attnrec.use_backend(None):
            with attnrec.use_backend("reference"):
                attnrec.target_attention(*BATCH.args)
            assert attnrec.explain(attnrec.target_attention, *BATCH.args).forced is False
        assert attnrec.explain(attnrec.target_attention, *BATCH.args).forced is True
        assert reference_calls == ["target_attention"]

    def test_an_exception_ends_the_context_too(self):
        with pytest.raises(KeyError), attnrec.use_backend("reference"):
            raise KeyError
        assert not attnrec.explain(attnrec.target_attention, *BATCH.args).forced

    def test_backward_goes_the_same_way(self, reference_calls):
        with attnrec.use_backend("reference"):
            out = attnrec.target_attention(BATCH.query.clone().requires_grad_(), *BATCH.args[1:])
            out.sum().backward()
        if extension is not None:  # without it the reference's own graph is walked
            assert reference_calls == ["target_attention", "target_attention_backward"]

    @needs_extension
    def test_torch_ops_are_rerouted_too(self, reference_calls):
        with attnrec.use_backend("reference"):
            torch.ops.attnrec.softmax_score(torch.ones(1, 2), torch.ones(3, 2), make_offsets([3]))
        assert reference_calls == ["softmax_score"]

    def test_for_all_threads(self, reference_calls):
        with attnrec.use_backend("reference"):
            thread = threading.Thread(target=attnrec.target_attention, args=BATCH.args)
            thread.start()
            thread.join()
        assert reference_calls == ["target_attention"]

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match="no backend 'gpu': there are cuda, triton, cpu, reference"):
            attnrec.use_backend("gpu")

    @pytest.mark.parametrize("name", ["triton", "cuda"])
    def test_one_that_cannot_serve_says_why(self, name):
        why = attnrec.explain(attnrec.target_attention, *BATCH.args).reasons[name]
        with attnrec.use_backend(name), pytest.raises(RuntimeError) as caught:
            attnrec.target_attention(*BATCH.args)
        assert str(caught.value) == f"the backend {name} can't serve target_attention: {why}"

    @needs_extension
    def test_no_warning_of_the_dispatcher(self, recwarn):
        with attnrec.use_backend("reference"):
            pass
        assert not recwarn.list


class TestCuda:
    """The choice, with kernels that a test has made."""

    @pytest.fixture
    def kernels(self, monkeypatch):
        """The CUDA backend on CPU tensors, with one kernel; what it was called with."""
        calls = []

        class Kernel:
            def call_boxed(self, keys, *args, **kwargs):
                calls.append((keys, args, kwargs))
                return ops.OPS["softmax_score"].reference(*args, **kwargs)

        monkeypatch.setattr(backends.CUDA, "kernels", {"softmax_score": Kernel()})
        monkeypatch.setattr(backends.CUDA, "device", "cpu")
        return calls

    ARGUMENTS = (torch.ones(1, 2), torch.ones(3, 2), make_offsets([3]))

    @needs_extension
    def test_its_kernel_gets_the_schemas_arguments(self, kernels):
        with attnrec.use_backend("cuda"):
            attnrec.softmax_score(*self.ARGUMENTS, temperature=2.0)
        ((keys, args, kwargs),) = kernels
        assert keys.has(torch._C.DispatchKey.CUDA)
        assert all(x is y for x, y in zip(args, self.ARGUMENTS, strict=True))
        assert kwargs == {"temperature": 2.0, "bias": None}

    @needs_extension
    def test_what_it_declines(self, kernels):
        def why(function, *args):
            return attnrec.explain(function, *args).reasons["cuda"]

        double = [x.double() if x.is_floating_point() else x for x in self.ARGUMENTS]
        assert "not float64" in why(attnrec.softmax_score, *double)
        assert "no CUDA kernel of target_attention" in why(attnrec.target_attention, *BATCH.args)
        backends.CUDA.device = "cuda"
        assert why(attnrec.softmax_score, *self.ARGUMENTS) == "the tensors are on cpu"

    @needs_extension
    @pytest.mark.parametrize("listed", [True, False])
    def test_which_of_two_gpu_backends_comes_first(self, kernels, monkeypatch, listed):
        monkeypatch.setattr(backends.Triton, "supports", lambda self, call: None)
        monkeypatch.setattr(backends, "TRITON_FIRST", {"softmax_score": "for a test"} if listed else {})
        said = attnrec.explain(attnrec.softmax_score, *self.ARGUMENTS)
        if listed:
            assert (said.backend, said.reasons["cuda"]) == ("triton", "triton comes first: for a test")
        else:
            assert (said.backend, said.reasons["triton"]) == ("cuda", "cuda comes first")

    @needs_extension
    def test_where_triton_cannot_serve_cuda_does(self, kernels):
        said = attnrec.explain(attnrec.softmax_score, *self.ARGUMENTS)
        assert said.backend == "cuda"
        assert "TRITON_INTERPRET=1" in said.reasons["triton"]


class TestExplain:
    @needs_extension
    @pytest.mark.parametrize("name", ["target_attention", "catalog_cross_entropy"])
    def test_the_usual_choice(self, name):
        if name not in backends.CPU.kernels:
            pytest.skip(f"no CPU kernel of {name}")
        rows = torch.ones(3, 4)
        arguments = BATCH.args if name == "target_attention" else (rows, rows, torch.tensor([0, 1, 2]))
        said = attnrec.explain(getattr(attnrec, name), *arguments)
        assert (said.op, said.backend, said.forced) == (name, "cpu", False)
        assert said.reasons["reference"] == "cpu comes first"
        assert "TRITON_INTERPRET=1" in said.reasons["triton"]
        assert str(said).splitlines()[0] == f"{name}: cpu"
        assert "  not triton: CPU tensors can only be interpreted" in str(said)

    def test_nothing_is_computed(self, monkeypatch):
        def fail(*_, **__):
            raise AssertionError

        monkeypatch.setattr(backends.Reference, "run", fail)
        with attnrec.use_backend("reference"):
            said = attnrec.explain(attnrec.target_attention, *BATCH.args)
        assert (said.backend, said.forced) == ("reference", True)
        assert "TRITON_INTERPRET=1" in said.reasons["triton"]

    def test_other_threads_go_on_meanwhile(self):
        results = []

        def function():
            thread = threading.Thread(target=lambda: results.append(attnrec.target_attention(*BATCH.args)))
            thread.start()
            thread.join()
            return attnrec.target_attention(*BATCH.args)

        assert attnrec.explain(function).op == "target_attention"
        assert torch.equal(results[0], attnrec.target_attention(*BATCH.args))

    def test_dense_input_and_other_devices(self):
        query = torch.ones(1, 2, 3, 8, device="meta")
        said = attnrec.explain(attnrec.target_attention, query, query, query)
        assert said.backend == "reference"
        if extension is not None:
            assert said.reasons["cpu"] == "the tensors are on meta"

    def test_what_autocast_makes_of_the_arguments(self):
        query = BATCH.query.bfloat16()  # of a layer, while keys and values come from elsewhere
        with torch.autocast("cpu", torch.bfloat16):
            attnrec.target_attention(query, *BATCH.args[1:])
            said = attnrec.explain(attnrec.target_attention, query, *BATCH.args[1:])
        assert said.backend == ("reference" if extension is None else "cpu")

    def test_the_op_that_a_function_ends_in(self):
        said = attnrec.explain(attnrec.target_attention_weights, *BATCH.weights_args, top=2)
        assert said.op == "target_attention_top"

    def test_by_name(self):
        assert attnrec.explain("target_attention", *BATCH.args).op == "target_attention"
        with pytest.raises(ValueError, match="no op 'attention': there are target_attention, "):
            attnrec.explain("attention")

    def test_a_forced_backend_that_cannot(self):
        with attnrec.use_backend("triton"):
            said = attnrec.explain(attnrec.target_attention, *BATCH.args)
        assert said.backend is None
        assert str(said).startswith("target_attention: raises (forced)\n")

    def test_a_function_of_another_kind(self):
        with pytest.raises(ValueError, match="called no op"):
            attnrec.explain(lambda: None)
        assert attnrec.target_attention(*BATCH.args).shape == BATCH.query.shape  # and calls compute again


class TestEnvironment:
    def test_backend(self):
        code = """
            import torch, attnrec
            x = torch.ones(2, 2)
            print(attnrec.explain(attnrec.softmax_score, x, torch.ones(2, 3, 2)).backend)
        """
        assert run_python(code, ATTNREC_BACKEND="reference").strip() == "reference"

    def test_a_backend_that_is_none(self):
        code = """
            try:
                import attnrec
            except ValueError as error:
                print(error)
        """
        assert "no backend 'gpu'" in run_python(code, ATTNREC_BACKEND="gpu")

    @pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
    def test_debug(self, value, on):
        code = """
            import torch
            from attnrec.ops import checks
            print(checks.reads_values(torch.device("cuda")))
        """
        assert run_python(code, ATTNREC_DEBUG=value).strip() == str(on)


WITHOUT_EXTENSION = """
import sys, types
sys.modules["attnrec._extension"] = types.SimpleNamespace(extension=None, reason="not built")
import pytest, torch, attnrec
assert not hasattr(torch.ops.attnrec, "target_attention")
"""


class TestWithoutTheExtension:
    """Then there are no torch ops, and the reference serves."""

    def test_the_contract_holds(self):
        code = WITHOUT_EXTENSION + textwrap.dedent(
            """
            q = torch.randn(2, 2, 3, 8, requires_grad=True)
            out, lse = attnrec.target_attention(q, q, q, return_lse=True)
            want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            torch.testing.assert_close(out, want)
            grad = torch.autograd.grad(out.sum() + lse.sum(), q)[0]
            assert grad.isfinite().all()
            with torch.autocast("cpu", torch.bfloat16):
                assert attnrec.target_attention(q.bfloat16(), q, q).dtype == torch.bfloat16
            said = attnrec.explain(attnrec.target_attention, q, q, q)
            assert (said.backend, said.reasons["cpu"]) == ("reference", "not built")
            with pytest.raises(ValueError, match="k must be from 0"):
                attnrec.catalog_topk(torch.ones(1, 2), torch.ones(3, 2), 4)
            with pytest.raises(TypeError, match="query must be a tensor"):
                attnrec.target_attention(*[None] * 5)
            with pytest.raises(RuntimeError, match="cpu can't serve target_attention: not built"):
                with attnrec.use_backend("cpu"):
                    attnrec.target_attention(q, q, q)
            print("ok")
            """
        )
        assert run_python(code).strip() == "ok"

    def test_forward_only_functions_refuse_a_gradient(self):
        code = WITHOUT_EXTENSION + textwrap.dedent(
            """
            users = torch.ones(1, 2, requires_grad=True)
            scores, _, _ = attnrec.catalog_topk(users, torch.ones(3, 2), 1)
            with pytest.raises(NotImplementedError, match="catalog_topk is forward only"):
                scores.sum().backward()
            print("ok")
            """
        )
        assert run_python(code).strip() == "ok"


def test_every_public_function_has_its_ops():
    # The top form is target_attention_weights(top=n), and filters are made by Catalog.pack.
    of_others = {"target_attention_top", "catalog_filter"}
    named = {name.removesuffix("_backward") for name in ops.OPS} - of_others
    assert named <= set(attnrec.__all__)
    assert all(getattr(reference, name) for name in named)


@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_after_one_that_found_no_memory(threads):
    """The one says so, whatever thread it was on, and the next one is served as ever."""
    code = """
        import resource
        import torch, attnrec

        def call(rows, room=None):
            '''Gradients of two users with so many candidates, in that much more memory than there is now.'''
            query = torch.ones(2 * rows, 1, 1, dtype=torch.bfloat16)
            key = torch.arange(8.0).reshape(-1, 1, 1).bfloat16()
            tensors, offsets = (query, key, key.flip(0)), (torch.arange(3) * rows, torch.arange(3) * 4)
            results = torch.ops.attnrec.target_attention(*tensors, *offsets)
            with open("/proc/self/statm") as sizes:
                size = int(sizes.read().split()[0]) * resource.getpagesize()
            if room is not None:
                resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))
            try:
                return torch.ops.attnrec.target_attention_backward(query, None, *tensors, *results, *offsets)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        torch.set_num_threads(THREADS)
        before = call(rows=5)
        try:
            call(rows=1 << 20, room=32 << 20)
        except RuntimeError as error:
            print("no memory for" in str(error), end=" ")
        torch.use_deterministic_algorithms(True)  # uninitialised tensors hold NaN
        print(all(torch.equal(x, y) for x, y in zip(before, call(rows=5))))
    """
    assert run_python(code.replace("THREADS", str(threads))).split() == ["True", "True"]
