"""On a GPU nobody checks values before a kernel starts (outside of debug mode): whatever offsets, lengths and
ids hold, a kernel must not touch memory outside of its tensors. The emulators check every address.
"""

import pytest
import torch
from helpers import OPTIONS, make_jagged, make_offsets
from helpers_ops import of_backward
from runners import RUNNER

from attnrec import kernels, ops
from attnrec.ops import backends

pytestmark = pytest.mark.skipif(
    RUNNER.name not in ("emulator", "cuda-emulator", "device"),
    reason="the other runners do not check addresses",
)
FAR = 1 << 40
BATCH = make_jagged([70, 0, 9], [129, 17, 64], heads=4, kv_heads=2, dim=16, options=OPTIONS)
# In place of [0, n, n, n + m].
OFFSETS = {
    "falling": [0, 40, 20, 79],
    "past the end": [0, 70, 300, 400],
    "far past the end": [0, 70, FAR, FAR + 9],
    "negative": [-7, 70, -1, 79],
    "far below": [-FAR, -FAR + 70, 70, 79],
    "all at the end": [FAR, FAR, FAR, FAR],
}
LENGTHS = {"negative": [-1, -FAR, 3], "too long": [130, FAR, 1 << 31]}


@pytest.fixture(autouse=True)
def overlapping_users(monkeypatch):
    """Falling offsets make users overlap, so that two blocks write one row: in bounds."""
    if "emulator" in RUNNER.name:
        from ptxemu import session

        monkeypatch.setattr(session, "races", False)


def integers(values):
    return torch.tensor(values, device=RUNNER.device)


def attention(name):
    args = BATCH.args if name == "target_attention" else BATCH.weights_args
    options = BATCH.options if name == "target_attention" else BATCH.weights_options
    return ops.OPS[name].bind((*args, 5) if name == "target_attention_top" else args, options)


def scoring(name):
    users, items, bias = torch.randn(3, 16), torch.randn(79, 16), torch.randn(79)
    if name == "softmax_score":
        return ops.OPS[name].bind((users, items, make_offsets([70, 0, 9])), {"bias": bias})
    if name == "catalog_topk":
        exclude = {"exclude_ids": torch.arange(79), "exclude_offsets": make_offsets([70, 0, 9])}
        return ops.OPS[name].bind((users, items, 5), {"bias": bias, **exclude})
    target = torch.tensor([0, 78, -100])
    return ops.OPS[name].bind((users, items, target), {"bias": bias, "negatives": torch.arange(40)})


def kernel(name, arguments):
    """The runner's kernel of an op, without the op's checks."""
    if RUNNER.backend == "triton":
        return kernels.kernel(name)(**arguments)
    if name not in backends.CUDA.kernels:
        pytest.skip(f"there is no CUDA kernel of {name}")
    return backends.CUDA.run(backends.Call(ops.OPS[name], arguments))


def run(name, arguments, **bad):
    """The op and its gradient, with arguments of which some are bad."""
    spoilt = arguments | bad
    result = kernel(name, spoilt)
    backward = f"{name}_backward"
    if backward in ops.OPS and (RUNNER.backend == "triton" or backward in backends.CUDA.kernels):
        op = ops.OPS[backward]
        args, options = ops.OPS[name].split(spoilt)
        kernel(op.name, op.bind(of_backward(name, args, result), options))
    if RUNNER.device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("values", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("name", ["target_attention", "target_attention_top"])
@pytest.mark.parametrize("which", ["q_offsets", "kv_offsets"])
def test_offsets_of_attention(name, which, values):
    run(name, attention(name), **{which: integers(values)})


@pytest.mark.parametrize("values", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("which", ["kv_lengths", "visible"])
@pytest.mark.parametrize("name", ["target_attention", "target_attention_top", "target_attention_weights"])
def test_what_a_row_sees(name, which, values):
    count = 3 if which == "kv_lengths" else BATCH.query.shape[0]
    run(name, attention(name), **{which: integers(values).repeat(count)[:count]})


@pytest.mark.parametrize("values", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("which", ["q_offsets", "kv_offsets"])
def test_offsets_of_all_weights(which, values):
    if RUNNER.backend == "triton" and values != OFFSETS["past the end"]:
        pytest.skip("weights are as many as the offsets say, which makes no sense where they fall")
    run("target_attention_weights", attention("target_attention_weights"), **{which: integers(values)})


@pytest.mark.parametrize("values", OFFSETS.values(), ids=OFFSETS)
def test_offsets_of_softmax_score(values):
    run("softmax_score", scoring("softmax_score"), offsets=integers(values))


@pytest.mark.parametrize(
    "name", ["target_attention", "target_attention_top", "target_attention_weights", "softmax_score"]
)
def test_rows_without_a_user(name):
    """Offsets of one element, and rows for whom there is nobody."""
    none = integers([0])
    if name == "softmax_score":
        run(name, scoring(name), users=torch.randn(0, 16), offsets=none)
    else:
        run(name, attention(name), kv_lengths=None, q_offsets=none, kv_offsets=none)


@pytest.mark.parametrize("values", OFFSETS.values(), ids=OFFSETS)
def test_offsets_of_exclusions(values):
    run("catalog_topk", scoring("catalog_topk"), exclude_offsets=integers(values))


@pytest.mark.parametrize("id", [-1, 79, FAR, -FAR])
def test_ids_outside_the_catalogue(id):
    run("catalog_topk", scoring("catalog_topk"), exclude_ids=integers([id, 3, id]).repeat(27)[:79])
    run("catalog_cross_entropy", scoring("catalog_cross_entropy"), target=integers([id, 78, 0]))
    run(
        "catalog_cross_entropy",
        scoring("catalog_cross_entropy"),
        target=integers([id, 78, 0]),
        negatives=None,
    )
    run("catalog_cross_entropy", scoring("catalog_cross_entropy"), negatives=integers([id, 5, id]))
