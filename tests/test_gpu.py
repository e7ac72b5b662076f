"""What only a GPU can say: streams, graphs, synchronisation, a second device, sizes.

That the numbers are right there is said by the ops' own tests on the `device` runner (`make test-gpu`).
"""

from contextlib import contextmanager

import pytest
import torch
from helpers import OPTIONS, make_jagged, make_offsets
from helpers_ops import DIFFERENTIABLE, FORWARD_ONLY
from runners import RUNNER

import attnrec
from attnrec import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        RUNNER.name != "device", reason="only with ATTNREC_TEST_RUNNER=device (make test-gpu)"
    ),
]
# The number of all weights is a value, which the host has to read.
WITHOUT_READING = [name for name in DIFFERENTIABLE + FORWARD_ONLY if name != "target_attention_weights"]


def arguments(name, seed=0):
    """Of a size that takes several blocks; gradients wanted where there are any."""
    generator = torch.Generator(RUNNER.device).manual_seed(seed)
    batch = make_jagged([70, 0, 9], [129, 17, 1300], kv_heads=2, options=OPTIONS, seed=seed)
    users, items, bias = (
        torch.randn(*shape, generator=generator) for shape in [(40, 32), (3000, 32), (3000,)]
    )
    given = {
        "target_attention": (batch.args, batch.options),
        "target_attention_weights": (batch.weights_args, batch.weights_options),
        "target_attention_top": ((*batch.weights_args, 7), batch.weights_options),
        "softmax_score": ((users[:3], items, make_offsets([1000, 0, 2000])), {"bias": bias}),
        "catalog_topk": (
            (users, items, 20),
            {"exclude_ids": torch.arange(40), "exclude_offsets": make_offsets([1] * 40), "bias": bias},
        ),
        "catalog_cross_entropy": ((users, items, torch.arange(40)), {"bias": bias, "label_smoothing": 0.1}),
    }[name]
    arguments = ops.OPS[name].bind(*given)
    if name in DIFFERENTIABLE:
        for key in ops.OPS[name].gradient.of:
            if arguments[key] is not None:
                arguments[key].requires_grad_()
    return arguments


def run(name, arguments):
    """The op's results and, where it has gradients, those of a fixed projection of the first one."""
    args, options = ops.OPS[name].split(arguments)
    result = getattr(torch.ops.attnrec, name)(*args, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    if not leaves:
        return outputs
    grad = torch.linspace(-1, 1, outputs[0].numel()).view(outputs[0].shape).to(outputs[0].dtype)
    return (*(x.detach() for x in outputs), *torch.autograd.grad(outputs[0], leaves, grad))


def assert_equal(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@contextmanager
def unforced():
    with attnrec.use_backend(None):
        yield


def test_the_backend_is_chosen_without_being_forced():
    batch = make_jagged([3], [5])
    with unforced():
        said = attnrec.explain(attnrec.target_attention, *batch.args)
        assert said.backend == RUNNER.backend
        wide = batch.with_(query=batch.query.double(), key=batch.key.double(), value=batch.value.double())
        said = attnrec.explain(attnrec.target_attention, *wide.args)
        assert said.backend == "reference"
        assert "float64" in said.reasons["triton"]


@pytest.mark.parametrize("name", WITHOUT_READING)
def test_nothing_waits_for_the_device(name):
    given = arguments(name)
    run(name, given)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, given)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", DIFFERENTIABLE + FORWARD_ONLY)
def test_on_the_current_stream(name):
    """Inputs arrive late on a side stream: a kernel on another one would read what was there before."""
    want = run(name, arguments(name))
    late, stream = arguments(name, seed=1), torch.cuda.Stream()
    source = arguments(name)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)
        for key, x in late.items():
            if isinstance(x, torch.Tensor):
                x.copy_(source[key])
        with torch.enable_grad():
            got = run(name, late)
    stream.synchronize()
    assert_equal(got, want)


@pytest.mark.parametrize("name", WITHOUT_READING)
def test_in_a_cuda_graph(name):
    """Captured with one batch, replayed with another of the same shapes and other offsets."""
    given, other = arguments(name), arguments(name, seed=1)
    for key, offsets in {
        "q_offsets": [20, 50, 9],
        "kv_offsets": [17, 1300, 129],
        "offsets": [0, 2999, 1],
        "exclude_offsets": [0] * 39 + [40],
    }.items():
        if key in other:
            other[key] = make_offsets(offsets)
    for key, most in {"kv_lengths": 17, "visible": 17}.items():
        if other.get(key) is not None:
            other[key] = other[key].clamp(max=most)
    want = run(name, other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(name, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(name, given)
    for _ in range(2):
        with torch.no_grad():
            for key, x in given.items():
                if isinstance(x, torch.Tensor):
                    x.copy_(other[key])
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("name", DIFFERENTIABLE + FORWARD_ONLY)
def test_on_a_device_that_is_not_current(name):
    want = run(name, arguments(name))
    elsewhere = {
        key: x.detach().to("cuda:1").requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for key, x in arguments(name).items()
    }
    got = run(name, elsewhere)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    assert_equal([x.to("cuda:0") for x in got], want)


def test_more_than_two_to_the_31_elements():
    """The last user of a batch whose keys have 2^32 elements, against the same user alone."""
    rows, events, dim = 40, 1 << 25, 128
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of the GPU's memory")
    key = torch.zeros(events, 1, dim, dtype=torch.bfloat16)
    last = make_jagged([rows], [300], heads=1, dim=dim, dtype=torch.bfloat16)
    key[-300:] = last.key
    batch = last.with_(
        key=key,
        value=key,
        q_offsets=make_offsets([0, rows]),
        kv_offsets=make_offsets([events - 300, 300]),
    )
    got = attnrec.target_attention(*batch.args, return_lse=True)
    assert_equal(got, attnrec.target_attention(*last.with_(value=last.key).args, return_lse=True))


def test_memory_is_not_that_of_all_scores():
    batch = make_jagged([3000], [40000], heads=1, dim=16).with_()
    leaves = [x.requires_grad_() for x in batch.args[:3]]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attnrec.target_attention(*leaves, *batch.args[3:]).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 60e6  # 480 MB of scores
