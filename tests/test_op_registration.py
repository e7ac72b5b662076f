"""What the dispatcher knows of each op: schema, fakes, autograd in all its orders, autocast, vmap."""

import inspect

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import make_jagged
from helpers_ops import DIFFERENTIABLE, FORWARD_ONLY, first, inputs, of_backward
from runners import RUNNER

import attnrec
from attnrec import ops
from attnrec._extension import extension, reason

pytestmark = pytest.mark.skipif(extension is None, reason=f"no ops without the extension: {reason}")


def op(name):
    return getattr(torch.ops.attnrec, name)


@pytest.fixture(params=["default", "reference"])
def backend(request):
    """The runner's own, and the reference."""
    with attnrec.use_backend(RUNNER.backend if request.param == "default" else request.param):
        yield request.param


@pytest.mark.parametrize("name", list(ops.OPS))
def test_schema_is_the_references_signature(name):
    schema = op(name).default._schema
    parameters = inspect.signature(ops.OPS[name].reference).parameters.values()
    assert [a.name for a in schema.arguments] == [p.name for p in parameters]
    for argument, parameter in zip(schema.arguments, parameters, strict=True):
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY)
        assert argument.has_default_value() == (parameter.default is not parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == parameter.default


@pytest.mark.parametrize("name", DIFFERENTIABLE + FORWARD_ONLY)
def test_opcheck(backend, name):
    for args, kwargs in inputs(name, requires_grad=name in DIFFERENTIABLE):
        torch.library.opcheck(op(name).default, args, kwargs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_of_the_backward_op(backend, name):
    for args, kwargs in inputs(name, requires_grad=False):
        args = of_backward(name, args, op(name)(*args, **kwargs))
        torch.library.opcheck(op(name + "_backward").default, args, kwargs)


class TestAutograd:
    @pytest.mark.cpu_only("float64")
    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_gradients(self, backend, name):
        """Through the op in float64, so through the real kernels."""
        for args, kwargs in inputs(name, torch.float64):
            args = tuple(x.double() if getattr(x, "requires_grad", False) else x for x in args)
            options = {k: x.double() if getattr(x, "requires_grad", False) else x for k, x in kwargs.items()}
            if options.get("key_bias") is not None:
                options["key_bias"] = options["key_bias"].clamp(min=-3)  # no differences around -inf
            leaves = [x for x in (*args, *options.values()) if getattr(x, "requires_grad", False)]
            leaves = [x.detach().requires_grad_() for x in leaves]

            def function(*tensors, args=args, options=options):
                new = iter(tensors)
                swapped = [next(new) if getattr(x, "requires_grad", False) else x for x in args]
                named = {
                    k: next(new) if getattr(x, "requires_grad", False) else x for k, x in options.items()
                }
                result = op(name)(*swapped, **named)
                if name == "target_attention":
                    return result[0], result[1].masked_fill(result[1] == -torch.inf, 0)
                return first(result)

            assert torch.autograd.gradcheck(function, leaves, fast_mode=False)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_a_gradient_without_strides(self, backend, name):
        """`sum().backward()` gives an expanded scalar."""
        for args, kwargs in inputs(name):
            grads = []
            for of in (lambda x: x.sum(), lambda x: (x * torch.ones_like(x)).sum()):
                leaves = [x for x in (*args, *kwargs.values()) if getattr(x, "requires_grad", False)]
                grads.append(torch.autograd.grad(of(first(op(name)(*args, **kwargs))), leaves))
            for expanded, dense in zip(*grads, strict=True):
                assert torch.equal(expanded, dense)

    def test_only_what_is_needed(self, backend):
        args, kwargs = inputs("target_attention", requires_grad=False)[1]
        key = args[1].requires_grad_()
        out, lse = op("target_attention")(args[0], key, *args[2:], **kwargs)
        finite = lse[lse.isfinite()]
        both = torch.autograd.grad(out.sum() + finite.sum(), key, retain_graph=True)[0]
        by_out = torch.autograd.grad(out.sum(), key, retain_graph=True)[0]
        by_lse = torch.autograd.grad(finite.sum(), key)[0]
        torch.testing.assert_close(both, by_out + by_lse)

    @pytest.mark.parametrize("name", FORWARD_ONLY)
    def test_forward_only_ops_refuse(self, backend, name):
        args, kwargs = inputs(name)[0]
        with pytest.raises(NotImplementedError, match=f"{name} is forward only"):
            first(op(name)(*args, **kwargs)).sum().backward()
        with torch.no_grad():
            assert not first(op(name)(*args, **kwargs)).requires_grad

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_second_order_refuses(self, backend, name):
        for args, kwargs in inputs(name):
            result = first(op(name)(*args, **kwargs))
            (grad,) = torch.autograd.grad(result.pow(2).sum(), args[0], create_graph=True)
            with pytest.raises(NotImplementedError, match=f"{name} has no second-order gradient"):
                grad.sum().backward()

    @pytest.mark.parametrize("name", DIFFERENTIABLE + FORWARD_ONLY)
    def test_forward_mode_refuses(self, backend, name):
        args, kwargs = inputs(name, requires_grad=False)[0]
        tangent = torch.ones_like(args[0])

        def function(x):
            return first(op(name)(x, *args[1:], **kwargs))

        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
            torch.func.jvp(function, (args[0],), (tangent,))
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"),
        ):
            function(forward_ad.make_dual(args[0], tangent))
        with forward_ad.dual_level():  # nobody asked for this op's derivative
            assert torch.equal(function(args[0]), function(args[0]))

    def test_forward_mode_of_an_option(self, backend):
        args, kwargs = inputs("target_attention", requires_grad=False)[1]

        def function(bias):
            return op("target_attention")(*args, **(kwargs | {"key_bias": bias}))[0]

        bias = kwargs["key_bias"]
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (bias,), (torch.ones_like(bias),))


class TestTorchFunc:
    """The orders in which `torch.func` nests its transforms: right, or refused; never a silent zero."""

    @pytest.fixture
    def function(self, backend):
        args, _ = inputs("softmax_score", requires_grad=False)[0]

        def function(users):
            return op("softmax_score")(users, *args[1:])[1] ** 2

        function.at = args[0]
        return function

    def expected(self, function):
        x = function.at.clone().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    def test_grad(self, function):
        torch.testing.assert_close(torch.func.grad(function)(function.at), self.expected(function))

    def test_grad_inside_another(self, function):
        def outer(c):
            return (torch.func.grad(function)(function.at) * c).sum()

        ones = torch.ones_like(function.at)
        torch.testing.assert_close(torch.func.grad(outer)(ones), self.expected(function))

    def test_jacrev(self, function):
        torch.testing.assert_close(torch.func.jacrev(function)(function.at), self.expected(function))

    @pytest.mark.parametrize(
        "second",
        [
            lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum()),
            lambda f: torch.func.hessian(f),
            lambda f: torch.func.jacrev(torch.func.jacrev(f)),
            lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]),
            lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),)),
            lambda f: torch.func.jacfwd(f),
            lambda f: lambda x: torch.func.grad(f)(x.requires_grad_()).sum().backward(),
            lambda f: lambda x: torch.vmap(torch.func.grad(lambda y: torch.func.grad(f)(y).sum()))(x[None]),
        ],
        ids=[
            "grad grad",
            "hessian",
            "jacrev jacrev",
            "grad jvp",
            "jvp grad",
            "jacfwd",
            "grad outside",
            "vmap",
        ],
    )
    def test_what_is_refused(self, function, second):
        with pytest.raises(NotImplementedError, match="softmax_score has no"):
            second(function)(function.at.clone())

    def test_vmap(self, function):
        """PyTorch's fallback: a loop over the mapped dimension."""
        several = torch.randn(4, *function.at.shape)
        torch.testing.assert_close(torch.vmap(function)(several), torch.stack([function(x) for x in several]))
        per_sample = torch.vmap(torch.func.grad(function))(several)
        torch.testing.assert_close(per_sample, torch.stack([torch.func.grad(function)(x) for x in several]))

    def test_vmap_of_attention(self, backend):
        args, kwargs = inputs("target_attention", requires_grad=False)[1]
        queries = torch.randn(3, *args[0].shape)
        got, _ = torch.vmap(lambda q: op("target_attention")(q, *args[1:], **kwargs))(queries)
        want = [op("target_attention")(q, *args[1:], **kwargs)[0] for q in queries]
        torch.testing.assert_close(got, torch.stack(want))


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_attention(self, backend, dtype):
        """Query, key and value are cast, also where they differ; the bias stays as it is."""
        args, kwargs = inputs("target_attention")[1]
        with torch.autocast(RUNNER.device, dtype):
            out, lse = op("target_attention")(args[0].to(dtype), *args[1:], **kwargs)
        low = [x.to(dtype) if x.is_floating_point() else x for x in args]
        options = {k: x.to(dtype) if k.startswith("self") else x for k, x in kwargs.items()}
        want, want_lse = op("target_attention")(*low, **options)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        out.float().sum().backward()
        assert args[1].grad.dtype == torch.float32

    @pytest.mark.cpu_only("float64")
    def test_float64_stays(self, backend):
        batch = make_jagged([1], [2], dtype=torch.float64)
        with torch.autocast(RUNNER.device, torch.bfloat16):
            assert attnrec.target_attention(*batch.args).dtype == torch.float64

    def test_scoring_and_loss(self, backend):
        (users, items, offsets), _ = inputs("softmax_score")[0]
        with torch.autocast(RUNNER.device, torch.bfloat16):
            assert attnrec.softmax_score(users, items, offsets).dtype == torch.bfloat16
            loss = attnrec.catalog_cross_entropy(users.bfloat16(), items, torch.tensor([0, 1, 2]))
        assert loss.dtype == torch.float32
        loss.backward()
        assert items.grad.dtype == torch.float32

    def test_topk_keeps_the_catalogue_as_it_is(self, backend):
        users, catalog = torch.ones(1, 1), torch.tensor([[1.0], [1.0001]])
        with torch.autocast(RUNNER.device, torch.bfloat16):
            _, ids, _ = attnrec.catalog_topk(users.bfloat16(), catalog, 1)
        assert ids.item() == 1

    def test_errors_are_those_of_the_cast_arguments(self, backend):
        args, _ = inputs("target_attention", requires_grad=False)[0]
        with (
            torch.autocast(RUNNER.device, torch.bfloat16),
            pytest.raises(ValueError, match="q_offsets must end at 5"),
        ):
            attnrec.target_attention(args[0].bfloat16(), *args[1:3], torch.tensor([0, 2, 2, 4]), args[4])


def test_meta_tensors():
    args, kwargs = inputs("target_attention", requires_grad=False)[1]
    out, lse = op("target_attention")(
        *(x.to("meta") for x in args),
        **{k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()},
    )
    assert out.is_meta
    assert (out.shape, lse.shape) == (args[0].shape, args[0].shape[:2])
