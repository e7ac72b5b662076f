"""`torch.compile(fullgraph=True)` and `torch.export`: static and dynamic shapes, forward and backward.

Most through "aot_eager", which traces as much as Inductor does and compiles nothing.
"""

import pytest
import torch
from helpers import make_jagged, make_offsets
from runners import RUNNER

import attnrec
from attnrec._extension import extension, reason

pytestmark = pytest.mark.skipif(extension is None, reason=f"no ops without the extension: {reason}")

ALL = ("kv_lengths", "visible", "self", "key_bias")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def batch(seed: int, rows: int = 0):
    return make_jagged([2 + rows, 0, 3], [3, 2, 4 + rows], heads=4, kv_heads=2, dim=8, options=ALL, seed=seed)


def attention(query, key, value, q_offsets, kv_offsets, options):
    out, lse = attnrec.target_attention(
        query * 2, key, value, q_offsets, kv_offsets, **options, return_lse=True
    )
    return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()


def loss_and_grads(function, args, options):
    leaves = [x.detach().clone().requires_grad_() for x in args[:3]]
    loss = function(*leaves, *args[3:], options)
    return loss, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_attention_forward_and_backward(compiler, dynamic):
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (0, 1, 3):
        case = batch(rows, rows)
        got = loss_and_grads(compiled, case.args, case.options)
        want = loss_and_grads(attention, case.args, case.options)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (1 if dynamic else 3)


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_dense_with_a_mask(dynamic, heads_first):
    def function(query, key, mask):
        return attnrec.target_attention(query, key, key, key_padding_mask=mask)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for events in (5, 7):
        query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 4, events, 8)
        if not heads_first:
            query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
        mask = torch.rand(2, events) < 0.5
        torch.testing.assert_close(compiled(query, key, mask), function(query, key, mask))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_weights_whose_number_depends_on_the_data(dynamic):
    def jagged(query, key, q_offsets, kv_offsets):
        weights, offsets = attnrec.target_attention_weights(query, key, q_offsets, kv_offsets)
        return weights * 2, offsets

    def dense(query, key):
        return attnrec.target_attention_weights(query, key) * 2

    compiled = torch.compile(jagged, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (0, 1):
        case = batch(rows, rows)
        for x, y in zip(compiled(*case.weights_args), jagged(*case.weights_args), strict=True):
            assert torch.equal(x, y)
    compiled = torch.compile(dense, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8)
    assert torch.equal(compiled(query, key), dense(query, key))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_scoring_top_k_and_loss(dynamic):
    def function(users, table, target, offsets, exclude):
        scores = attnrec.softmax_score(users, table, offsets, temperature=0.5)
        loss = attnrec.catalog_cross_entropy(users, table, target, label_smoothing=0.1)
        in_batch = attnrec.catalog_cross_entropy(users, table, target, negatives="in-batch")
        _, ids, _ = attnrec.catalog_topk(users.detach(), table.detach(), 3, exclude=exclude)
        events = attnrec.target_attention_weights(
            users[:, None].detach(), table[:, None].detach(), make_offsets([1] * len(users)), offsets, top=2
        )
        return scores.square().sum() + loss + in_batch, ids, events

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for items in (6, 8):
        target, offsets = torch.tensor([0, 5, -100]), make_offsets([2, 0, items - 2])
        exclude = torch.tensor([1, 0, 2]), make_offsets([1, 2, 0])
        results = []
        for run in (compiled, function):
            torch.manual_seed(0)
            users, table = torch.randn(3, 8).requires_grad_(), torch.randn(items, 8).requires_grad_()
            loss, ids, events = run(users, table, target, offsets, exclude)
            results.append((loss, ids, *events, *torch.autograd.grad(loss, [users, table])))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)


def test_nested():
    def function(query, key):
        return attnrec.target_attention(query, key, key)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    case = make_jagged([2, 0, 3], [3, 2, 4], heads=2, dim=8)
    query = torch.nested.nested_tensor_from_jagged(case.query, case.q_offsets)
    key = torch.nested.nested_tensor_from_jagged(case.key, case.kv_offsets)
    assert torch.equal(compiled(query, key).values(), function(query, key).values())


def test_autocast_inside():
    def function(query, key, q_offsets, kv_offsets):
        with torch.autocast(RUNNER.device, torch.bfloat16):
            return attnrec.target_attention(query, key, key, q_offsets, kv_offsets)

    case = make_jagged([2, 1], [3, 2], dim=8)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*case.weights_args)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, function(*case.weights_args))


@pytest.mark.cpu_only("another backend is forced")
def test_a_compiled_graph_obeys_use_backend():
    def function(*args):
        return attnrec.target_attention(*args)

    case = make_jagged([2, 1], [3, 2], dim=8)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.args), function(*case.args))
    with (
        attnrec.use_backend("triton"),
        pytest.raises(RuntimeError, match="triton can't serve target_attention"),
    ):
        compiled(*case.args)


def test_gradients_of_a_forced_reference():
    """Compiled graphs run with autograd cut off, by which the reference finds its gradients: once zeros."""
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    case = batch(0)
    with attnrec.use_backend("reference"):
        got = loss_and_grads(compiled, case.args, case.options)
    for x, y in zip(got, loss_and_grads(attention, case.args, case.options), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    case = make_jagged([2, 1], [3, 2], dim=8)
    args = [case.query.requires_grad_(), *case.args[1:]]
    compiled = torch.compile(
        lambda *args: attnrec.target_attention(*args), fullgraph=True, backend="aot_eager"
    )
    with mode():
        got = compiled(*args)
    assert not got.requires_grad
    torch.testing.assert_close(got, attnrec.target_attention(*args))


def test_bad_shapes_are_named_while_tracing():
    compiled = torch.compile(
        lambda *args: attnrec.target_attention(*args), fullgraph=True, backend="aot_eager"
    )
    case = make_jagged([2, 1], [3, 2], dim=8)
    with pytest.raises(Exception, match=r"key must have shape \[T_l, H_kv, D\] = \[any, any, 8\]"):
        compiled(case.query, case.key[..., :4], *case.args[2:])


class Model(torch.nn.Module):
    def forward(self, query, key, q_offsets, kv_offsets):
        out = attnrec.target_attention(query, key, key, q_offsets, kv_offsets)
        weights, events = attnrec.target_attention_weights(query, key, q_offsets, kv_offsets, top=2)
        return out, weights, events


def test_export(tmp_path):
    rows, events, bounds = (torch.export.Dim(name) for name in ("rows", "events", "bounds"))
    case = make_jagged([2, 0, 3], [3, 2, 4], dim=8)
    program = torch.export.export(
        Model(), case.weights_args, dynamic_shapes=({0: rows}, {0: events}, {0: bounds}, {0: bounds})
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    other = make_jagged([1, 5, 0, 2], [4, 1, 0, 3], dim=8, seed=1)
    for x, y in zip(loaded(*other.weights_args), Model()(*other.weights_args), strict=True):
        assert torch.equal(x, y)
