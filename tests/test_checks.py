"""Bad input raises: every clause of the contract, by exception type and named argument, on each backend."""

import numpy as np
import pytest
import torch
from helpers import make_jagged, make_offsets
from runners import RUNNER

import attnrec
from attnrec import ops
from attnrec.ops.backends import CPU

INF, NAN = float("inf"), float("nan")

ATTENTION = make_jagged(
    [2, 1], [3, 2], heads=4, kv_heads=2, dim=8, options=("kv_lengths", "visible", "self", "key_bias")
)
ATTENTION = ATTENTION.with_(
    kv_lengths=torch.tensor([3, 1]), visible=torch.tensor([0, 3, 2]), key_bias=torch.zeros(5, 4)
)
GOOD = {
    "target_attention": dict(
        zip(("query", "key", "value", "q_offsets", "kv_offsets"), ATTENTION.args, strict=True)
    )
    | ATTENTION.options,
    "softmax_score": {
        "users": torch.ones(2, 4),
        "items": torch.ones(5, 4),
        "offsets": make_offsets([2, 3]),
        "bias": torch.zeros(5),
    },
    "catalog_topk": {
        "users": torch.ones(2, 4),
        "catalog": torch.ones(6, 4),
        "k": 3,
        "exclude": (torch.tensor([5, 0, 0]), make_offsets([2, 1])),
        "bias": torch.zeros(6),
    },
    "catalog_cross_entropy": {
        "users": torch.ones(3, 4),
        "table": torch.ones(6, 4),
        "target": torch.tensor([0, 5, -100]),
        "bias": torch.zeros(6),
        "logq": torch.zeros(6),
    },
}
GOOD["target_attention_weights"] = {
    name: x for name, x in GOOD["target_attention"].items() if name not in ("value", "self_value")
}
META = torch.ones(5, 2, 8, device="meta")

# function, argument, its bad value, exception, part of the message beside the argument's name
SHARED = [
    ("query", torch.ones(3, 8), ValueError, "T_c, H, D"),
    ("query", torch.ones(3, 3, 8), ValueError, "multiple of key's H_kv = 2, got 3"),
    ("query", torch.ones(3, 4, 8, dtype=torch.int64), TypeError, "float32"),
    ("query", torch.ones(3, 4, 8, dtype=torch.complex64), TypeError, "float32"),
    ("query", [1.0], TypeError, "tensor, got list"),
    ("key", torch.ones(5, 2, 7), ValueError, r"\[any, any, 8\], got \[5, 2, 7\]"),
    ("key", torch.ones(5, 16), ValueError, "T_l, H_kv, D"),
    ("key", torch.ones(5, 2, 8, dtype=torch.float16), TypeError, "be float32, got float16"),
    ("key", META, ValueError, "be on .* as query is, got meta"),
    ("q_offsets", torch.tensor([0, 2, 4]), ValueError, "end at 3.* got 4"),
    ("q_offsets", torch.tensor([1, 2, 3]), ValueError, "start at 0, got 1"),
    ("q_offsets", torch.tensor([0, 4, 3]), ValueError, "not fall, got 4 and then 3"),
    ("q_offsets", torch.tensor([0.0, 2.0, 3.0]), TypeError, "int32 or int64, got float32"),
    ("q_offsets", torch.zeros(0, dtype=torch.int64), ValueError, r"got \[0\]"),
    ("kv_offsets", torch.tensor([0, 5]), ValueError, r"\[3\], got \[2\]"),
    ("kv_offsets", torch.tensor([0, 3, 6]), ValueError, "end at 5.* got 6"),
    ("kv_offsets", torch.tensor([0, -1, 5]), ValueError, "not fall"),
    ("kv_lengths", torch.tensor([4, 1]), ValueError, r"room \(3\), got 4 at position 0"),
    ("kv_lengths", torch.tensor([-1, 1]), ValueError, "got -1"),
    ("kv_lengths", torch.tensor([1]), ValueError, r"\[2\], got \[1\]"),
    ("kv_lengths", torch.tensor([1.0, 1.0]), TypeError, "int32 or int64"),
    ("visible", torch.tensor([0, 4, 2]), ValueError, r"room \(3\), got 4 at position 1"),
    ("visible", torch.tensor([0, -1, 2]), ValueError, "got -1 at position 1"),
    ("visible", torch.tensor([0, 1]), ValueError, r"\[3\], got \[2\]"),
    ("visible", torch.tensor([True, False, True]), TypeError, "int32 or int64, got bool"),
    ("self_key", torch.ones(3, 4, 8), ValueError, r"\[3, 2, 8\], got \[3, 4, 8\]"),
    ("self_key", torch.ones(3, 2, 8, dtype=torch.float64), TypeError, "be float32, got float64"),
    ("key_bias", torch.zeros(5, 2), ValueError, r"\[5, 4\], got \[5, 2\]"),
    ("key_bias", torch.zeros(5, 4, dtype=torch.float16), TypeError, "be float32, got float16"),
    ("scale", NAN, ValueError, "finite"),
    ("scale", "1", TypeError, "number"),
]
CASES = (
    [("target_attention", *case) for case in SHARED]
    + [("target_attention_weights", *case) for case in SHARED]
    + [
        ("target_attention", "value", torch.ones(5, 2, 4), ValueError, r"\[5, 2, 8\], got \[5, 2, 4\]"),
        ("target_attention", "value", torch.ones(4, 2, 8), ValueError, r"\[5, 2, 8\], got \[4, 2, 8\]"),
        ("target_attention", "value", torch.ones(5, 2, 8, dtype=torch.bfloat16), TypeError, "bfloat16"),
        ("target_attention", "value", META, ValueError, "meta"),
        ("target_attention", "self_value", torch.ones(2, 2, 8), ValueError, r"\[3, 2, 8\]"),
        ("target_attention", "self_value", None, ValueError, "given where self_key is"),
        ("target_attention", "self_key", None, ValueError, "given where self_value is"),
        ("target_attention", "max_kv_length", 2, ValueError, "at least 3, the events of user 0, got 2"),
        ("target_attention", "max_kv_length", -1, ValueError, "at least 3"),
        ("target_attention", "max_kv_length", 3.5, TypeError, "integer, got float"),
        ("target_attention", "kv_offsets", None, ValueError, "must be given"),
        ("target_attention", "q_offsets", None, ValueError, "must be given"),
        ("target_attention", "key_padding_mask", torch.ones(2, 3) > 0, ValueError, "dense input"),
        ("target_attention_weights", "top", -1, ValueError, "at least 0, got -1"),
        ("target_attention_weights", "top", np.int64(-1), ValueError, "at least 0, got -1"),
        ("target_attention_weights", "top", 1.5, TypeError, "integer, got float"),
        ("softmax_score", "users", torch.ones(4), ValueError, r"B, D"),
        ("softmax_score", "users", torch.ones(2, 4, dtype=torch.int32), TypeError, "float32"),
        ("softmax_score", "items", torch.ones(5, 3), ValueError, r"\[any, 4\], got \[5, 3\]"),
        (
            "softmax_score",
            "items",
            torch.ones(5, 4, dtype=torch.float64),
            TypeError,
            "be float32, got float64",
        ),
        ("softmax_score", "items", torch.ones(5, 4, device="meta"), ValueError, "be on .*, got meta"),
        ("softmax_score", "offsets", make_offsets([5]), ValueError, r"\[3\], got \[2\]"),
        ("softmax_score", "offsets", torch.tensor([0, 2, 6]), ValueError, "end at 5.* got 6"),
        ("softmax_score", "offsets", torch.tensor([0, 7, 5]), ValueError, "not fall"),
        ("softmax_score", "offsets", torch.tensor([2, 3, 5]), ValueError, "start at 0"),
        ("softmax_score", "bias", torch.zeros(4), ValueError, r"\[5\], got \[4\]"),
        ("softmax_score", "bias", torch.zeros(5, dtype=torch.int64), TypeError, "float32"),
        ("softmax_score", "temperature", 0.0, ValueError, "above 0, got 0.0"),
        ("softmax_score", "temperature", np.float32(-1), ValueError, "above 0, got -1.0"),
        ("softmax_score", "temperature", INF, ValueError, "finite"),
        ("catalog_topk", "users", torch.ones(2, 3), ValueError, r"\[any, 3\]"),
        ("catalog_topk", "catalog", torch.ones(6, 4, dtype=torch.bfloat16), TypeError, "be float32"),
        ("catalog_topk", "catalog", torch.ones(6, 4, device="meta"), ValueError, "be on .*, got meta"),
        ("catalog_topk", "k", 7, ValueError, "N = 6, got 7"),
        ("catalog_topk", "k", -1, ValueError, "got -1"),
        ("catalog_topk", "k", np.int64(7), ValueError, "N = 6, got 7"),
        ("catalog_topk", "k", 2.5, TypeError, "integer"),
        (
            "catalog_topk",
            "exclude",
            (torch.tensor([6, 0, 0]), make_offsets([2, 1])),
            ValueError,
            "exclude_ids.*got 6",
        ),
        ("catalog_topk", "exclude", (torch.tensor([-1, 0, 0]), make_offsets([2, 1])), ValueError, "got -1"),
        ("catalog_topk", "exclude", (torch.ones(3), make_offsets([2, 1])), TypeError, "exclude_ids.*int32"),
        (
            "catalog_topk",
            "exclude",
            (torch.tensor([0]), make_offsets([2, 1])),
            ValueError,
            "exclude_offsets.*end at 1",
        ),
        ("catalog_topk", "exclude", (torch.tensor([0]), make_offsets([1])), ValueError, "exclude_offsets"),
        ("catalog_topk", "exclude", (torch.tensor([0]), None), ValueError, r"exclude_offsets.*given"),
        ("catalog_topk", "exclude", torch.tensor([0, 1]), TypeError, "pair"),
        ("catalog_topk", "bias", torch.zeros(5), ValueError, r"\[6\], got \[5\]"),
        ("catalog_topk", "temperature", -1.0, ValueError, "above 0"),
        ("catalog_cross_entropy", "users", torch.ones(3, 5), ValueError, r"table.*\[any, 5\]"),
        ("catalog_cross_entropy", "table", torch.ones(6, 4, dtype=torch.float16), TypeError, "be float32"),
        ("catalog_cross_entropy", "table", torch.ones(24), ValueError, "N, D"),
        (
            "catalog_cross_entropy",
            "target",
            torch.tensor([0, 6, 0]),
            ValueError,
            r"\(5\), got 6 at position 1",
        ),
        ("catalog_cross_entropy", "target", torch.tensor([0, -1, 0]), ValueError, "got -1"),
        ("catalog_cross_entropy", "target", torch.tensor([0, 1]), ValueError, r"\[3\], got \[2\]"),
        ("catalog_cross_entropy", "target", torch.ones(3), TypeError, "int32 or int64"),
        ("catalog_cross_entropy", "bias", torch.zeros(6, 1), ValueError, r"\[6\]"),
        ("catalog_cross_entropy", "bias", torch.zeros(6).double(), TypeError, "be float32, got float64"),
        ("catalog_cross_entropy", "logq", torch.zeros(7), ValueError, r"\[6\], got \[7\]"),
        ("catalog_cross_entropy", "logq", torch.zeros(6, requires_grad=True), ValueError, "gradient"),
        ("catalog_cross_entropy", "temperature", NAN, ValueError, "finite"),
        ("catalog_cross_entropy", "label_smoothing", 1.5, ValueError, "from 0 to 1, got 1.5"),
        ("catalog_cross_entropy", "label_smoothing", "0.1", TypeError, "number, got str"),
        ("catalog_cross_entropy", "ignore_index", 1.5, TypeError, "integer, got float"),
        ("catalog_cross_entropy", "ignore_index", "0", TypeError, "integer, got str"),
        ("catalog_cross_entropy", "negatives", torch.tensor([6]), ValueError, r"\(5\), got 6"),
        ("catalog_cross_entropy", "negatives", torch.tensor([-100]), ValueError, "got -100"),
        ("catalog_cross_entropy", "negatives", torch.tensor([[1]]), ValueError, r"\[M\]"),
        ("catalog_cross_entropy", "negatives", "batch", ValueError, "in-batch"),
        ("catalog_cross_entropy", "reduction", "median", ValueError, "got 'median'"),
    ]
)


def arguments(function, **changes):
    return {name: x for name, x in (GOOD[function] | changes).items() if x is not None}


@pytest.fixture(params=["reference", "cpu"] if RUNNER.backend is None else [RUNNER.backend])
def backend(request):
    attnrec.debug(True)  # values are checked on a GPU too
    with attnrec.use_backend(None if request.param == "cpu" else request.param):
        yield request.param
    attnrec.debug(False)


def skip_without_kernel(backend, function):
    if backend == "cpu" and function not in CPU.kernels:
        pytest.skip(f"no CPU kernel of {function}")


@pytest.mark.parametrize("function", list(GOOD))
def test_good_arguments_pass(backend, function):
    skip_without_kernel(backend, function)
    getattr(attnrec, function)(**arguments(function))


@pytest.mark.parametrize(
    ("function", "name", "bad", "error", "message"),
    CASES,
    ids=[f"{function}-{name}-{i}" for i, (function, name, *_) in enumerate(CASES)],
)
def test_bad_argument(backend, function, name, bad, error, message):
    skip_without_kernel(backend, function)
    with pytest.raises(error, match=message) as caught:
        getattr(attnrec, function)(**arguments(function, **{name: bad}))
    named = {"users": "users|table|catalog", "exclude": "exclude"}.get(name, name)
    assert any(part in str(caught.value) for part in named.split("|")), caught.value
    assert function in str(caught.value)


@pytest.mark.parametrize("option", ["dropout_p", "time_bias", "activation"])
def test_an_option_that_does_not_exist_is_a_type_error(option):
    with pytest.raises(TypeError, match=option):
        attnrec.target_attention(*ATTENTION.args, **{option: 0.1})


def test_label_smoothing_with_negatives(backend):
    skip_without_kernel(backend, "catalog_cross_entropy")
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 with negatives, got 0.1"):
        attnrec.catalog_cross_entropy(
            **arguments("catalog_cross_entropy", negatives="in-batch", label_smoothing=0.1)
        )


def test_no_integer_requires_a_gradient():
    with pytest.raises(RuntimeError, match="floating point"):
        torch.ones(3, dtype=torch.int64).requires_grad_()


@pytest.mark.parametrize(
    ("function", "items"),
    [("softmax_score", "items"), ("catalog_topk", "catalog"), ("catalog_cross_entropy", "table")],
)
def test_vectors_without_elements(backend, function, items):
    good = arguments(function)
    with pytest.raises(ValueError, match=f"{function}: users must have a dim D of at least 1, got"):
        getattr(attnrec, function)(**good | {name: good[name][:, :0] for name in ("users", items)})


class TestDense:
    @pytest.mark.parametrize(
        ("name", "bad", "error", "message"),
        [
            ("query", torch.ones(2, 4, 8), ValueError, r"query must have shape \[B, H, C, D\]"),
            ("query", torch.ones(2, 3, 5, 8), ValueError, "multiple of key's H_kv = 2, got 3"),
            ("key", torch.ones(3, 2, 6, 8), ValueError, r"key .* \[2, any, any, 8\], got \[3, 2, 6, 8\]"),
            ("value", torch.ones(2, 2, 5, 8), ValueError, r"value .* \[2, 2, 6, 8\], got \[2, 2, 5, 8\]"),
            ("value", torch.ones(4, 2, 3, 8), ValueError, "value"),
            ("value", None, TypeError, "value must be a tensor"),
            ("kv_lengths", torch.tensor([7, 0]), ValueError, "kv_lengths"),
            ("kv_lengths", torch.tensor([1]), ValueError, r"kv_lengths .* \[2\]"),
            ("visible", torch.ones(5, dtype=torch.int64), ValueError, r"visible .* \[2, 5\], got \[5\]"),
            ("key_bias", torch.zeros(2, 6, 4), ValueError, r"key_bias .* \[2, 4, 6\]"),
            ("self_key", torch.ones(2, 5, 2, 8), ValueError, r"self_key .* \[2, 2, 5, 8\]"),
            ("self_key", torch.zeros(2, 2, 5, 8).to_sparse(), TypeError, "self_key must be a strided tensor"),
            (
                "visible",
                torch.ones(2, 5, dtype=torch.int64, device="meta"),
                ValueError,
                "visible must be on cpu",
            ),
            ("key_padding_mask", torch.zeros(2, 6), TypeError, "key_padding_mask must be bool"),
            ("key_padding_mask", torch.zeros(6, 2) > 0, ValueError, r"key_padding_mask .* \[2, 6\]"),
        ],
        ids=str,
    )
    def test_bad_argument(self, backend, name, bad, error, message):
        skip_without_kernel(backend, "target_attention")
        good = {
            "query": torch.ones(2, 4, 5, 8),
            "key": torch.ones(2, 2, 6, 8),
            "value": torch.ones(2, 2, 6, 8),
        }
        with pytest.raises(error, match=message):
            attnrec.target_attention(**(good | {name: bad}))

    def test_mask_and_lengths(self):
        with pytest.raises(ValueError, match="key_padding_mask and kv_lengths"):
            attnrec.target_attention(
                *[torch.ones(1, 1, 2, 4)] * 3,
                kv_lengths=torch.tensor([1]),
                key_padding_mask=torch.tensor([[False, True]]),
            )

    def test_softmax_score(self):
        with pytest.raises(ValueError, match=r"users .* \[2, 4\], got \[3, 4\]"):
            attnrec.softmax_score(torch.ones(3, 4), torch.ones(2, 5, 4))
        with pytest.raises(ValueError, match=r"items .* \[B, C, D\]"):
            attnrec.softmax_score(torch.ones(3, 4), torch.ones(5, 4))
        with pytest.raises(ValueError, match=r"bias .* \[2, 5\]"):
            attnrec.softmax_score(torch.ones(2, 4), torch.ones(2, 5, 4), bias=torch.ones(10))


class TestNested:
    def nested(self, *shape):
        return torch.nested.nested_tensor([torch.ones(n, *shape) for n in (2, 3)], layout=torch.jagged)

    def test_key_is_dense(self):
        with pytest.raises(TypeError, match="key must be nested"):
            attnrec.target_attention(self.nested(2, 4), torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 4))

    def test_rank(self):
        with pytest.raises(ValueError, match="query must be nested"):
            attnrec.target_attention(self.nested(4), self.nested(2, 4), self.nested(2, 4))

    def test_other_rows_of_a_user(self):
        """As many in all, so that the packed tensors fit."""
        key = self.nested(2, 4)
        value = torch.nested.nested_tensor([torch.ones(n, 2, 4) for n in (3, 2)], layout=torch.jagged)
        with pytest.raises(ValueError, match=r"value must have key's .* \[2, 3\], got \[3, 2\]"):
            attnrec.target_attention(key, key, value)
        bias = torch.nested.nested_tensor([torch.ones(n, 2) for n in (3, 2)], layout=torch.jagged)
        with pytest.raises(ValueError, match="key_bias must have key's"):
            attnrec.target_attention(key, key, key, key_bias=bias)
        scores = torch.nested.nested_tensor([torch.ones(n) for n in (3, 2)], layout=torch.jagged)
        with pytest.raises(ValueError, match="bias must have items's"):
            attnrec.softmax_score(torch.ones(2, 4), self.nested(4), bias=scores)
        attnrec.target_attention(key, key, self.nested(2, 4))  # offsets of its own, and the same

    def test_mask(self):
        with pytest.raises(ValueError, match="key_padding_mask"):
            attnrec.target_attention(*[self.nested(2, 4)] * 3, key_padding_mask=torch.ones(2, 3) > 0)


@pytest.mark.cpu_only("the compiled kernels' own checks")
def test_the_op_itself_refuses_what_would_read_out_of_bounds():
    """Callers of torch.ops go around the public functions: the kernel's own check protects memory."""
    if "target_attention" not in CPU.kernels:
        pytest.skip("no CPU kernel of target_attention")
    batch = ATTENTION.with_(kv_offsets=torch.tensor([0, 3, 1 << 40]))
    with attnrec.use_backend("cpu"), pytest.raises(RuntimeError, match="kv_offsets"):
        torch.ops.attnrec.target_attention(*batch.args, **batch.options)


@pytest.mark.cpu_only("the compiled kernels' own checks")
@pytest.mark.parametrize(
    "op",
    ["target_attention", "target_attention_weights", "target_attention_top", "target_attention_backward"],
)
def test_the_op_itself_refuses_no_heads(op):
    if op not in CPU.kernels:
        pytest.skip(f"no CPU kernel of {op}")
    query, key = torch.ones(3, 0, 8), torch.ones(5, 2, 8)
    offsets = make_offsets([2, 1]), make_offsets([3, 2])
    arguments = {
        "target_attention": (query, key, key, *offsets),
        "target_attention_weights": (query, key, *offsets),
        "target_attention_top": (query, key, *offsets, 2),
        "target_attention_backward": (query, None, query, key, key, query, query[..., 0], *offsets),
    }
    with attnrec.use_backend("cpu"), pytest.raises(RuntimeError, match=r"heads must be one or more, .*got 0"):
        getattr(torch.ops.attnrec, op)(*arguments[op])


def test_values_on_other_devices_are_read_in_debug_mode_only():
    try:
        assert not ops.checks.reads_values(torch.device("cuda"))
        attnrec.debug(True)
        assert ops.checks.reads_values(torch.device("cuda"))
        assert not ops.checks.reads_values(torch.device("meta"))
    finally:
        attnrec.debug(False)
    assert ops.checks.reads_values(torch.device("cpu"))


def test_bad_arguments_on_a_device_without_autocast():
    with pytest.raises(ValueError, match="key must have shape"):
        attnrec.target_attention(
            *(x.to("meta") for x in (ATTENTION.query, META[..., :4], *ATTENTION.args[2:]))
        )
