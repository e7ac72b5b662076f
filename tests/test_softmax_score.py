"""`softmax_score` against the reference, and what its contract says beside the numbers."""

from itertools import pairwise, product

import pytest
import torch
from helpers import DTYPES, assert_close_to_reference, assert_matches_reference, lengths, make_offsets
from hypothesis import given
from hypothesis import strategies as st
from runners import RUNNER

import attnrec
from attnrec import reference

INF, NAN = float("inf"), float("nan")
BEYOND_GPU_KERNELS = pytest.param(300, marks=pytest.mark.cpu_only("head dims above 256"))


def make(counts, dim, dtype=torch.float32, bias=None, seed=0, spread=1.0):
    """Users, items, offsets and a bias (None, or its dtype) that hides a tenth of the items."""
    generator = torch.Generator(RUNNER.device).manual_seed(seed)
    total = sum(counts)
    users = torch.randn(len(counts), dim, generator=generator, dtype=torch.float64) * spread / dim**0.5
    items = torch.randn(total, dim, generator=generator, dtype=torch.float64)
    if bias is not None:
        hidden = torch.rand(total, generator=generator) < 0.1
        bias = torch.randn(total, generator=generator).to(bias).masked_fill(hidden, -INF)
    return users.to(dtype), items.to(dtype), make_offsets(counts), bias


def check(users, items, offsets, **options):
    function = attnrec.softmax_score
    assert_matches_reference(
        "softmax_score", users, items, offsets, function=function, differentiate=(0,), **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "float32", "own"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_every_dtype_and_option(dtype, bias, temperature):
    bias_dtype = {"none": None, "float32": torch.float32, "own": dtype}[bias]
    users, items, offsets, bias = make([3, 0, 200, 129, 1, 0, 77], 24, dtype, bias_dtype)
    check(users, items, offsets, temperature=temperature, bias=bias)


@pytest.mark.parametrize("dim", [1, 3, 8, 15, 16, 17, 33, 64, 100, 128, 256, BEYOND_GPU_KERNELS])
def test_every_dim(dim):
    check(*make([5, 40, 130, 64], dim)[:3])


@pytest.mark.parametrize("count", [1, 127, 128, 129, 255, 256, 257, 1025, 4095, 4096, 4097, 9000])
def test_sizes_around_tiles_and_chunks(count):
    # Many users, so that plain PyTorch has its usual error in some of them.
    users, items, offsets, bias = make([count, *[30] * 12, count], 16, bias=torch.float32)
    check(users, items, offsets, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_users_and_chunks(dtype):
    """Around a chunk of the GPU kernels, and more users than their search looks at at a time."""
    users, items, offsets, bias = make(
        [300, 5, 0, 1023, 1024, 1025, 17, 2100, *[3, 0, 1] * 42], 24, dtype, torch.float32
    )
    check(users, items, offsets, bias=bias, temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_a_users_items_counts(dtype):
    """Logits far below 0, which is that of a row of zeros, with which nothing else would count."""
    users, items, offsets, _ = make(range(1, 73), 16, dtype)
    users[:, 0], items[:, 0] = 6, -6
    check(users, items, offsets, temperature=1.5)


@given(
    counts=st.lists(lengths(300), max_size=5),
    dim=st.sampled_from([4, 16, 20, 64]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.05, 7.0]),
    seed=st.integers(0, 2**31),
)
def test_random_batches(counts, dim, dtype, bias, temperature, seed):
    # The more users, the less the comparison depends on PyTorch's luck with its worst element.
    counts = [*counts, *[64] * 12]
    bias = torch.float32 if bias else None
    users, items, offsets, bias = make(counts, dim, dtype, bias, seed, spread=min(1.0, 2 * temperature))
    check(users, items, offsets, temperature=temperature, bias=bias)


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_nothing_to_score(counts):
    users, items, offsets, _ = make(counts, 8)
    users.requires_grad_()
    items.requires_grad_()
    scores = attnrec.softmax_score(users, items, offsets)
    assert scores.shape == (0,)
    grads = torch.autograd.grad(scores.sum(), [users, items])
    assert torch.equal(grads[0], torch.zeros_like(users))
    assert grads[1].shape == items.shape


def test_a_user_with_every_item_hidden_gets_zeros():
    users, items, offsets, _ = make([3, 4], 8)
    bias = torch.tensor([-INF, -INF, -INF, 0.0, -INF, 1.0, 2.0])
    items[0] = NAN  # hidden: never computed with
    leaves = [x.requires_grad_() for x in (users, items, bias)]
    scores = attnrec.softmax_score(users, items, offsets, bias=bias)
    assert torch.equal(scores[:3], torch.zeros(3))
    assert scores[4] == 0
    assert torch.allclose(scores[3:].sum(), torch.tensor(1.0))
    grad_users, grad_items, grad_bias = torch.autograd.grad(scores, leaves, torch.randn(7))
    assert torch.equal(grad_users[0], torch.zeros(8))
    assert torch.equal(grad_items[:3], torch.zeros(3, 8))
    assert torch.equal(grad_bias[:3], torch.zeros(3))
    assert grad_users.isfinite().all()
    assert grad_items.isfinite().all()


def test_the_gradient_at_a_hidden_item_is_not_computed_with():
    users, items, offsets, _ = make([6], 8)
    bias = torch.tensor([0.0, -INF, 1.0, 0.0, -INF, 2.0])
    leaves = [x.requires_grad_() for x in (users, items, bias)]
    scores = attnrec.softmax_score(users, items, offsets, bias=bias)
    upstream = torch.randn(6).index_fill(0, torch.tensor([1, 4]), NAN)
    for grad in torch.autograd.grad(scores, leaves, upstream):
        assert grad.isfinite().all()


@pytest.mark.parametrize("where", ["user", "item"])
def test_nan_stays_with_its_user(where):
    users, items, offsets, bias = make([5, 130, 7], 16, bias=torch.float32)
    check(users, items, offsets, bias=bias, temperature=0.3)
    expected = attnrec.softmax_score(users, items, offsets, bias=bias)
    bias[40] = 0.0
    if where == "user":
        users[1] = NAN
    else:
        items[40] = NAN
    leaves = [x.requires_grad_() for x in (users, items, bias)]
    scores = attnrec.softmax_score(users, items, offsets, bias=bias)
    others = torch.ones(142, dtype=torch.bool)
    others[5:135] = False
    assert torch.equal(scores[others], expected[others])
    assert scores[5:135].isnan().any()
    grad_users, grad_items, grad_bias = torch.autograd.grad(scores, leaves, torch.randn(142))
    assert grad_users[[0, 2]].isfinite().all()
    assert grad_items[others].isfinite().all()
    assert grad_bias[others].isfinite().all()


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_huge_logits(size):
    """The winner takes all, exactly; no overflow, no NaN."""
    users = torch.tensor([[size], [-size]], requires_grad=True)
    items = torch.tensor([[1.0], [3.0], [2.0], [1.0], [3.0], [2.0]], requires_grad=True)
    scores = attnrec.softmax_score(users, items, make_offsets([3, 3]))
    assert torch.equal(scores, torch.tensor([0.0, 1, 0, 1, 0, 0]))
    for grad in torch.autograd.grad(scores, [users, items], torch.randn(6)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_equal_logits_are_equally_likely():
    scores = attnrec.softmax_score(torch.zeros(1, 8), torch.randn(7, 8), make_offsets([7]))
    assert torch.equal(scores, torch.full((7,), 1 / 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_and_gradients_of_exactly_1(dtype):
    """Where only a 0 is passed over: an item alone, and two alike whose logits' gradients are 1 and -1."""
    users, items, offsets, _ = make([1, 2], 16, dtype)
    items[2] = items[1]
    leaves = [x.requires_grad_() for x in (users, items)]
    scores = attnrec.softmax_score(users, items, offsets)
    grads = torch.autograd.grad(scores, leaves, torch.tensor([3.0, 4.0, 0.0], dtype=dtype))
    assert torch.equal(grads[0], torch.zeros_like(users))
    assert torch.equal(grads[1], torch.stack([torch.zeros_like(users[0]), users[1], -users[1]]))


def test_more_chunks_than_a_block_sums_at_a_time():
    users, items, offsets, _ = make([40, 8200], 256)
    check(users, items, offsets)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "rows of a wider tensor": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    users, items, offsets, bias = make([5, 130, 7], 16, bias=torch.float32)
    expected = attnrec.softmax_score(users, items, offsets, bias=bias)
    change = LAYOUTS[layout]
    bias = bias.repeat_interleave(3)[::3]
    assert torch.equal(attnrec.softmax_score(change(users), change(items), offsets, bias=bias), expected)
    check(change(users), change(items), offsets, bias=bias, temperature=0.7)


def test_one_item_expanded_to_all():
    users, _, offsets, _ = make([5, 130], 16)
    items = torch.randn(1, 16).expand(135, 16)
    scores = attnrec.softmax_score(users, items, offsets)
    assert torch.allclose(scores, torch.tensor([1 / 5] * 5 + [1 / 130] * 130))


def test_gradient_of_stride_0():
    users, items, offsets, _ = make([5, 130], 16)
    items.requires_grad_()
    scores = attnrec.softmax_score(users, items, offsets)
    weight = torch.tensor(2.0)
    grads = [torch.autograd.grad(scores, items, g, retain_graph=True)[0] for g in
             (weight.expand(135), torch.full((135,), 2.0))]  # fmt: skip
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_either_integer(dtype):
    users, items, offsets, _ = make([5, 130], 16)
    expected = attnrec.softmax_score(users, items, offsets)
    assert torch.equal(attnrec.softmax_score(users, items, offsets.to(dtype)), expected)
    strided = offsets.to(dtype).repeat_interleave(2)[::2]
    assert torch.equal(attnrec.softmax_score(users, items, strided), expected)


def outcome(users, items, offsets, bias):
    leaves = [x.detach().clone().requires_grad_() for x in (users, items, bias)]
    scores = attnrec.softmax_score(leaves[0], leaves[1], offsets, bias=leaves[2])
    grad = torch.sin(torch.arange(scores.shape[0]).to(scores.dtype))  # depends on the place alone
    return scores.detach(), *torch.autograd.grad(scores, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_user_alone_gets_the_same_bits(dtype):
    long = RUNNER.smaller(9000)
    counts = [300, 5, 0, long, 17]
    users, items, offsets, bias = make(counts, 24, dtype, torch.float32)
    together = attnrec.softmax_score(users, items, offsets, bias=bias)
    bounds = offsets.tolist()
    for user, (first, last) in enumerate(pairwise(bounds)):
        own = slice(first, last)
        count = make_offsets([last - first])
        alone = attnrec.softmax_score(users[user : user + 1], items[own], count, bias=bias[own])
        assert torch.equal(alone, together[own])
    # Gradients: the fourth user alone, and followed by the first.
    own, other = slice(305, 305 + long), slice(0, 300)
    alone = outcome(users[3:4], items[own], make_offsets([long]), bias[own])
    both = make_offsets([long, 300])
    again = outcome(
        users[[3, 0]], torch.cat([items[own], items[other]]), both, torch.cat([bias[own], bias[other]])
    )
    assert torch.equal(again[1][:1], alone[1])
    assert torch.equal(again[2][:long], alone[2])
    assert torch.equal(again[3][:long], alone[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again_and_on_any_number_of_threads(dtype, threads):
    counts = [300, 5, 0, RUNNER.smaller(20000), 17, RUNNER.smaller(4096), 33]
    arguments = make(counts, 24, dtype, torch.float32)
    results = []
    for n in RUNNER.threads:
        threads(n)
        results.append(outcome(*arguments))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.cpu_only("float64")
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    users, items, offsets, _ = make([3, 0, 9, 1], 5, torch.float64)
    leaves = [users.requires_grad_(), items.requires_grad_()]
    if bias:
        leaves.append(torch.randn(13, dtype=torch.float64, requires_grad=True))

    def function(users, items, bias=None):
        return attnrec.softmax_score(users, items, offsets, temperature=0.7, bias=bias)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_not_that_of_rounded_probabilities(dtype):
    """The probabilities come rounded to 16 bits; a bias in float32 would show it."""
    users, items, offsets, bias = make([500, 40], 16, dtype, torch.float32, spread=0.0)
    grads = []
    for function, cast in (
        (attnrec.softmax_score, lambda x: x),
        (reference.softmax_score, lambda x: x.double()),
    ):
        leaf = cast(bias).requires_grad_()
        scores = function(cast(users), cast(items), offsets, bias=leaf)
        upstream = torch.linspace(-1, 1, 540).to(dtype).to(scores.dtype)
        grads.append(torch.autograd.grad(scores, leaf, upstream)[0])
    assert_close_to_reference(grads[0], grads[0].double().float(), grads[1], what="gradient of the bias")
    assert (grads[0].double() - grads[1]).abs().max() < 1e-6


def test_dense_and_nested_forms_agree_with_the_jagged_one():
    users, items, offsets, _ = make([6, 6, 6], 16)
    expected = attnrec.softmax_score(users, items, offsets)
    dense = attnrec.softmax_score(users, items.view(3, 6, 16))
    assert torch.equal(dense.flatten(), expected)
    nested = torch.nested.nested_tensor_from_jagged(items, offsets)
    assert torch.equal(attnrec.softmax_score(users, nested).values(), expected)


def test_no_option_pair_is_left_out():
    """Every combination of what can be given or left."""
    for dtype, bias, temperature, counts in product(
        (torch.float32, torch.float16), (None, torch.float32), (1.0, 2.5), ([64, 129, 70], [4100, 0, 300])
    ):
        users, items, offsets, of_items = make(counts, 20, dtype, bias)
        check(users, items, offsets, temperature=temperature, bias=of_items)
