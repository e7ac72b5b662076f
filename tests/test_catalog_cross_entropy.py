"""`catalog_cross_entropy` against the reference, and what its contract says beside the numbers."""

from itertools import product

import pytest
import torch
from helpers import DTYPES, assert_matches_reference
from hypothesis import given
from hypothesis import strategies as st
from runners import RUNNER
from torch.nn import functional as F

import attnrec

INF, NAN = float("inf"), float("nan")
BEYOND_GPU_KERNELS = pytest.param(300, marks=pytest.mark.cpu_only("head dims above 256"))
IGNORED = -100
OPTIONS = ("bias", "logq", "temperature", "label_smoothing", "ignored", "negatives", "in_batch")


def make(rows, items, dim, dtype=torch.float32, options=(), seed=0, ignore_index=IGNORED):
    """Arguments of the op, with options by name."""
    generator = torch.Generator(RUNNER.device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    users, table = (normal(rows, dim) * 2 / dim**0.5).to(dtype), normal(items, dim).to(dtype)
    target = torch.randint(0, items, (rows,), generator=generator)
    if "ignored" in options:
        target = target.masked_fill(torch.rand(rows, generator=generator) < 0.3, ignore_index)
    arguments = {"ignore_index": ignore_index}
    if "bias" in options:
        arguments["bias"] = normal(items).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if "logq" in options:
        arguments["logq"] = normal(items).to(dtype)
    if "temperature" in options:
        arguments["temperature"] = 0.4
    if "label_smoothing" in options:
        arguments["label_smoothing"] = 0.15
    if "negatives" in options:  # with repeats, and accidental hits
        drawn = torch.randint(0, items, (items // 2 + 3,), generator=generator)
        arguments["negatives"] = torch.cat([drawn, target[target != ignore_index][:5]])
    if "in_batch" in options:
        arguments |= {"negatives": target, "in_batch": True}
    return (users, table, target), arguments


def public(users, table, target, *, in_batch=False, negatives=None, **options):
    """The op's arguments to the public function, which returns no lse."""
    negatives = "in-batch" if in_batch else negatives
    return attnrec.catalog_cross_entropy(
        users, table, target, reduction="none", negatives=negatives, **options
    )


def check(arguments, options):
    # The gradient recomputes probabilities from the log-sum-exp, rounded: at 20 that is 1e-6 of a probability
    # near 1, where plain PyTorch, which keeps log-probabilities, has almost no error.
    how = {"differentiate": (0,), "without_grad": ("logq",), "slack": 1.5}
    assert_matches_reference("catalog_cross_entropy", *arguments, **how, **options)
    loss, _ = torch.ops.attnrec.catalog_cross_entropy(*arguments, **options)
    assert torch.equal(public(*arguments, **options), loss)


def combinations():
    for chosen in product((False, True), repeat=len(OPTIONS)):
        names = {name for name, take in zip(OPTIONS, chosen, strict=True) if take}
        sampled = names & {"negatives", "in_batch"}
        if len(sampled) < 2 and not (sampled and "label_smoothing" in names):
            yield sorted(names)


@pytest.mark.parametrize("names", list(combinations()), ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination_of_options(dtype, names):
    check(*make(45, 140, 20, dtype, names))


@pytest.mark.parametrize("dim", [1, 3, 8, 15, 16, 17, 33, 64, 100, 128, 256, BEYOND_GPU_KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dim(dim, dtype):
    check(*make(100, 150, dim, dtype, ("bias", "label_smoothing")))


@pytest.mark.cpu_only("head dims above 256")
def test_infinite_items_of_many_dims():
    """In bf16 what is not finite is added up apart, in rows that had room for 256 dims only."""
    users, table = torch.zeros(9, 301, dtype=torch.bfloat16), torch.zeros(131, 301, dtype=torch.bfloat16)
    table[130, 300] = INF  # times 0 in every logit
    leaves = [x.requires_grad_() for x in (users, table)]
    loss = public(users, table, torch.arange(9))
    assert loss.isnan().all()
    grad_users, grad_table = torch.autograd.grad(loss.sum(), leaves)
    assert grad_users.isnan().all()
    assert grad_table.isnan().all()


@pytest.mark.parametrize("items", [1, 2, 127, 128, 129, 255, 256, 257, 1025, 4100])
@pytest.mark.parametrize("names", [(), ("bias", "label_smoothing", "ignored"), ("negatives",)], ids=str)
def test_tables_around_tiles_and_chunks(items, names):
    check(*make(33, items, 16, options=names))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_the_table_counts(dtype):
    """Logits far below 0, which is that of a row of zeros, with which nothing else would count."""
    for n in range(1, 74, 18):
        (users, table, target), options = make(n, n, 16, dtype)
        users[:, 0], table[:, 0] = 3, -4
        check((users, table, target), options)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 32, 33, 1023, 1024, 1025, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_around_blocks_and_groups(rows, dtype):
    check(*make(rows, 200, 8, dtype, ("bias", "ignored")))
    check(*make(rows, 200, 8, dtype, ("bias", "in_batch")))


@pytest.mark.skipif(RUNNER.backend != "triton", reason="how the Triton kernels cut the work")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "names",
    [("temperature",), ("temperature", "bias", "label_smoothing"), ("temperature", "negatives")],
    ids=str,
)
def test_many_pieces(dtype, names, monkeypatch):
    """As many as large sizes have: splits of the items, parts of the rows, and rows group by group."""
    from attnrec.kernels import catalog_cross_entropy, catalog_cross_entropy_backward

    monkeypatch.setattr(catalog_cross_entropy, "FEWEST_ITEMS", 32)
    monkeypatch.setattr(catalog_cross_entropy, "SUMMED", 16)
    monkeypatch.setattr(catalog_cross_entropy_backward, "FEWEST_ROWS", 16)
    monkeypatch.setattr(catalog_cross_entropy_backward, "GROUP", 24)
    check(*make(45, 140, 20, dtype, ("temperature", *names)))


@given(
    rows=st.integers(0, 40) | st.integers(0, RUNNER.smaller(150)),
    items=st.integers(1, 300) | st.integers(1, RUNNER.smaller(9000)),
    dim=st.sampled_from([4, 16, 20]) | st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    names=st.sampled_from(list(combinations())),
    ignore_index=st.sampled_from([IGNORED, -1, 0, 3]),
    seed=st.integers(0, 2**31),
)
def test_random_sizes(rows, items, dim, dtype, names, ignore_index, seed):
    # The more rows, the less the comparison depends on PyTorch's luck with its worst element.
    rows += 16 if rows else 0
    check(*make(rows, items, dim, dtype, names, seed, ignore_index))


@pytest.mark.cpu_only("float64")
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_is_torchs_cross_entropy(smoothing, reduction):
    (users, table, target), _ = make(60, 300, 16, torch.float64, ("ignored",))
    options = {"label_smoothing": smoothing, "reduction": reduction}
    leaves = [x.requires_grad_() for x in (users, table)]
    ours = attnrec.catalog_cross_entropy(users, table, target, **options)
    torchs = F.cross_entropy(users @ table.T, target, **options)
    torch.testing.assert_close(ours, torchs)
    for x, y in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(torchs.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("users", "table"), [(True, False), (False, True), (False, False)], ids=["users", "table", "bias alone"]
)
@pytest.mark.parametrize("names", [("bias", "ignored"), ("bias", "negatives")], ids=str)
def test_only_the_gradients_that_are_asked_for(users, table, names):
    arguments, options = make(50, 200, 16, options=("temperature", *names))
    check(arguments, options)
    loss, lse = torch.ops.attnrec.catalog_cross_entropy(*arguments, **options)
    grad = torch.randn_like(loss)
    backward = torch.ops.attnrec.catalog_cross_entropy_backward
    every = backward(grad, *arguments, lse, **options)
    some = backward(grad, *arguments, lse, **options, needs_users=users, needs_table=table)
    for got, whole, needed in zip(some, every, (users, table, True), strict=True):
        assert torch.equal(got, whole) if needed else got.shape == (0,)


@pytest.mark.parametrize("names", [(), ("label_smoothing",), ("negatives",), ("in_batch",)], ids=str)
def test_ignored_rows_count_for_nothing(names):
    arguments, options = make(43, 130, 16, options=("ignored", "bias", *names))
    users, table, target = arguments
    ignored = target == IGNORED
    assert ignored.any()
    users[ignored] = NAN
    leaves = [x.requires_grad_() for x in (users, table, options["bias"])]
    loss = public(*arguments, **options)
    assert torch.equal(loss[ignored], torch.zeros(int(ignored.sum())))
    grad_users, grad_table, grad_bias = torch.autograd.grad(loss.sum(), leaves)
    assert torch.equal(grad_users[ignored], torch.zeros(int(ignored.sum()), 16))
    assert grad_table.isfinite().all()
    assert grad_bias.isfinite().all()


@pytest.mark.parametrize("names", [(), ("in_batch",)], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_all_rows_ignored_or_none_there(names, rows):
    (users, table, target), options = make(rows, 30, 8, options=("bias", *names))
    target.fill_(IGNORED)
    leaves = [x.requires_grad_() for x in (users, table, options["bias"])]
    loss = public(users, table, target, **options)
    assert torch.equal(loss, torch.zeros(rows))
    for grad, of in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


def test_no_items_and_every_row_ignored():
    users, target = torch.ones(3, 4), torch.full((3,), IGNORED)
    assert torch.equal(public(users, torch.ones(0, 4), target), torch.zeros(3))


def test_without_negatives_the_target_is_certain():
    (users, table, target), _ = make(6, 30, 8)
    loss = public(users, table, target, negatives=torch.tensor([], dtype=torch.int64))
    assert torch.equal(loss, torch.zeros(6))
    only_hits = public(users[:1], table, target[:1], negatives=target[:1].repeat(200))
    assert torch.equal(only_hits, torch.zeros(1))


@pytest.mark.parametrize("names", [("negatives",), ("in_batch",)], ids=str)
def test_one_item_that_many_rows_and_negatives_name(names):
    """Its gradient is the sum over more of them than a kernel takes at a time."""
    (users, table, target), options = make(300, 40, 16, options=("bias", *names))
    target.remainder_(3)
    options["negatives"] = target if "in_batch" in names else options["negatives"] % 3
    check((users, table, target), options)


def test_accidental_hits_are_masked_row_by_row():
    users, table = torch.randn(2, 8), torch.randn(5, 8)
    loss = public(users, table, torch.tensor([3, 1]), negatives=torch.tensor([3, 0, 3, 1]))
    logits = users @ table.T
    expected = torch.stack(
        [
            torch.cat([logits[0, [3]], logits[0, [0, 1]]]).log_softmax(0)[0],
            torch.cat([logits[1, [1]], logits[1, [3, 0, 3]]]).log_softmax(0)[0],
        ]
    )
    torch.testing.assert_close(loss, -expected)


def test_a_table_of_one_item():
    (users, table, _), _ = make(5, 1, 8)
    assert torch.equal(public(users, table, torch.zeros(5, dtype=torch.int64)), torch.zeros(5))


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_huge_logits(size):
    """Where one item takes all, loss and gradient are exact; no overflow, no NaN."""
    users = torch.tensor([[size], [size]], requires_grad=True)
    table = torch.tensor([[1.0], [3.0], [2.0]], requires_grad=True)
    loss = public(users, table, torch.tensor([1, 0]))
    assert torch.equal(loss, torch.tensor([0.0, 2 * size]))
    grad_users, grad_table = torch.autograd.grad(loss.sum(), [users, table])
    assert torch.equal(grad_users, torch.tensor([[0.0], [2.0]]))
    assert torch.equal(grad_table, torch.tensor([[-size], [size], [0.0]]))


def test_a_hidden_item_is_not_computed_with():
    arguments, options = make(40, 200, 16, options=("bias", "label_smoothing"))
    options["label_smoothing"] = 0.0
    users, table, target = arguments
    target[target == 130] = 0
    options["bias"][130] = -INF
    check(arguments, options)
    expected = public(*arguments, **options)
    table[130] = NAN
    leaves = [x.requires_grad_() for x in (users, table)]
    loss = public(*arguments, **options)
    assert torch.equal(loss, expected)
    grad_users, grad_table = torch.autograd.grad(loss.sum(), leaves)
    assert grad_users.isfinite().all()
    assert torch.equal(grad_table[130], torch.zeros(16))


def test_a_hidden_item_under_label_smoothing_gets_no_gradient():
    """Its share of the target makes the loss infinite and is the bias's gradient; it is not read."""
    (users, table, target), options = make(40, 200, 16, options=("bias", "label_smoothing"))
    options["bias"][::7] = -INF
    hidden = options["bias"] == -INF
    target[hidden[target]] = int((~hidden).nonzero()[0])
    table[hidden] = NAN
    leaves = [x.requires_grad_() for x in (users, table, options["bias"])]
    loss = public(users, table, target, **options)
    assert torch.equal(loss, torch.full((40,), INF))
    _, grad_table, grad_bias = torch.autograd.grad(loss.sum(), leaves)
    assert torch.equal(grad_table[hidden], torch.zeros(int(hidden.sum()), 16))
    torch.testing.assert_close(grad_bias[hidden], torch.full((int(hidden.sum()),), -40 * 0.15 / 200))


def test_nan_stays_with_its_row():
    rows = 100  # some in each quarter of a block of the Triton kernel that finishes their gradients
    (users, table, target), _ = make(rows, 200, 16)
    expected = public(users, table, target)
    users[7] = NAN
    users.requires_grad_()
    loss = public(users, table, target)
    others = torch.arange(rows) != 7
    assert torch.equal(loss[others], expected[others])
    assert loss[7].isnan()
    (grad,) = torch.autograd.grad(loss.sum(), users)
    assert grad[others].isfinite().all()


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "rows of a wider tensor": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [("ignored",), ("negatives",)], ids=str)
def test_any_strides(layout, names):
    (users, table, target), options = make(43, 150, 16, options=("bias", "logq", "temperature", *names))
    change = LAYOUTS[layout]
    strided = {k: x.repeat_interleave(3)[::3] if k in ("bias", "logq") else x for k, x in options.items()}
    arguments = change(users), change(table), target.repeat_interleave(2)[::2]
    assert torch.equal(public(*arguments, **strided), public(users, table, target, **options))
    check(arguments, strided)


def test_one_item_expanded_to_all():
    users, table = torch.randn(6, 16), torch.randn(1, 16).expand(50, 16)
    loss = public(users, table, torch.arange(6))
    torch.testing.assert_close(loss, torch.full((6,), 50.0).log())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_integer(dtype):
    (users, table, target), options = make(40, 150, 16, options=("ignored", "negatives"))
    expected = public(users, table, target, **options)
    options["negatives"] = options["negatives"].to(dtype)
    assert torch.equal(public(users, table, target.to(dtype), **options), expected)


def outcome(arguments, options, weight):
    leaves = [x.detach().clone().requires_grad_() for x in arguments[:2]]
    loss = public(*leaves, arguments[2], **options)
    return loss.detach(), *torch.autograd.grad((loss * weight).sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [("bias", "label_smoothing"), ("negatives", "logq")], ids=str)
def test_a_row_alone_gets_the_same_bits(dtype, names):
    (users, table, target), options = make(1100, 400, 24, dtype, names)
    weight = torch.rand(1100, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss, grad_users, _ = outcome((users, table, target), options, weight)
    for rows in ([0], [1099], [5, 1050, 3], [*range(500, 517)]):
        alone = outcome((users[rows], table, target[rows]), options, weight[rows])
        assert torch.equal(alone[0], loss[rows])
        assert torch.equal(alone[1], grad_users[rows])


@pytest.mark.parametrize("names", [("bias", "ignored"), ("in_batch",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again_and_on_any_number_of_threads(names, dtype, threads):
    rows = RUNNER.smaller(1200)
    arguments, options = make(rows, 700, 24, dtype, names)
    results = []
    for n in RUNNER.threads:
        threads(n)
        results.append(outcome(arguments, options, torch.linspace(0, 1, rows)))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.cpu_only("float64")
@pytest.mark.parametrize(
    "names", list(combinations())[::3], ids=lambda names: "+".join(sorted(names)) or "plain"
)
def test_gradcheck(names):
    (users, table, target), options = make(5, 7, 3, torch.float64, names)
    leaves = [users.requires_grad_(), table.requires_grad_()]
    if "bias" in options:
        leaves.append(options.pop("bias").requires_grad_())

    def function(users, table, bias=None):
        return public(users, table, target, bias=bias, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.cpu_only("peak memory of the process")
def test_memory_is_not_that_of_all_scores(peak_memory):
    """Forward and backward of 2,000 rows by 200,000 items would be 1.6 GB for each matrix of scores."""
    users, table = torch.randn(2000, 4, requires_grad=True), torch.randn(200_000, 4, requires_grad=True)
    target = torch.randint(0, 200_000, (2000,))
    with peak_memory() as grown:
        attnrec.catalog_cross_entropy(users, table, target).backward()
    assert grown() < 200 << 20
