"""The forms of the public functions: dense and nested answer as the native form does, without copies."""

from functools import partial

import pytest
import torch
from helpers import make_jagged, make_offsets
from runners import RUNNER
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import attnrec
from attnrec import layout
from attnrec.ops.backends import CPU

USERS, HEADS, KV_HEADS, CANDIDATES, EVENTS, DIM = 3, 4, 2, 5, 7, 8


def dense(heads_first: bool, kv_heads: int = HEADS, dtype: torch.dtype = torch.float32):
    """Query, key and value `[B, H, n, D]`: contiguous, or a view of contiguous `[B, n, H, D]`."""

    def one(n: int, heads: int) -> torch.Tensor:
        if heads_first:
            return torch.randn(USERS, heads, n, DIM, dtype=dtype)
        return torch.randn(USERS, n, heads, DIM, dtype=dtype).transpose(1, 2)

    return one(CANDIDATES, HEADS), one(EVENTS, kv_heads), one(EVENTS, kv_heads)


def options(kv_heads: int = HEADS):
    return {
        "kv_lengths": torch.tensor([0, 7, 4]),
        "visible": torch.randint(0, EVENTS + 1, (USERS, CANDIDATES)),
        "self_key": torch.randn(USERS, kv_heads, CANDIDATES, DIM),
        "self_value": torch.randn(USERS, kv_heads, CANDIDATES, DIM),
        "key_bias": torch.randn(USERS, HEADS, EVENTS),
    }


def natively(query, key, value, function=attnrec.target_attention, **options):
    """The jagged call for dense arguments, packed here by hand."""

    def packed(x):
        return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()

    q_offsets = torch.arange(USERS + 1) * CANDIDATES
    kv_offsets = torch.arange(USERS + 1) * EVENTS
    arguments = [packed(query), packed(key)] + ([] if value is None else [packed(value)])
    how = {"kv_lengths": lambda x: x, "visible": lambda x: x.reshape(-1)}
    how["key_bias"] = lambda x: x.transpose(1, 2).reshape(-1, HEADS)
    options = {name: how.get(name, packed)(x) for name, x in options.items() if x is not None}
    return function(*arguments, q_offsets, kv_offsets, **options)


def to_dense(x):
    return x.unflatten(0, (USERS, CANDIDATES)).transpose(1, 2)


FORMS = pytest.mark.parametrize("heads_first", [True, False], ids=["[B,H,n,D]", "[B,n,H,D]"])
GROUPS = pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS, 1])


class TestDense:
    @FORMS
    @GROUPS
    @pytest.mark.parametrize(
        "given", [(), ("kv_lengths", "visible"), ("key_bias",), ("self_key", "self_value")]
    )
    def test_as_the_native_form(self, heads_first, kv_heads, given):
        query, key, value = (x.requires_grad_() for x in dense(heads_first, kv_heads))
        chosen = {name: x for name, x in options(kv_heads).items() if name in given}
        out, lse = attnrec.target_attention(query, key, value, **chosen, return_lse=True)
        with_lse = partial(attnrec.target_attention, return_lse=True)
        want, want_lse = natively(query, key, value, with_lse, **chosen)
        torch.testing.assert_close(out, to_dense(want))
        torch.testing.assert_close(lse, to_dense(want_lse))
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, [query, key, value], grad)
        expected = torch.autograd.grad(to_dense(want), [query, key, value], grad)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)

    @FORMS
    @GROUPS
    def test_all_options_at_once(self, heads_first, kv_heads):
        query, key, value = dense(heads_first, kv_heads)
        chosen = options(kv_heads)
        torch.testing.assert_close(
            attnrec.target_attention(query, key, value, **chosen),
            to_dense(natively(query, key, value, **chosen)),
        )

    @FORMS
    @GROUPS
    def test_as_torch(self, heads_first, kv_heads):
        query, key, value = dense(heads_first, kv_heads, RUNNER.widest)
        mask = torch.rand(USERS, EVENTS) < 0.4
        mask[:, 2] = False
        want = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask.logical_not()[:, None, None], enable_gqa=True
        )
        out = attnrec.target_attention(query, key, value, key_padding_mask=mask)
        torch.testing.assert_close(out, want)

    @FORMS
    @pytest.mark.parametrize("kv_heads", [HEADS, 1])
    def test_nothing_is_copied(self, heads_first, kv_heads):
        query, key, value = dense(heads_first, kv_heads)
        native = layout.from_dense("target_attention", query, key, value, {})
        for given, seen in ((query, native.query), (key, native.key), (value, native.value)):
            assert given.data_ptr() == seen.data_ptr()
            assert given.untyped_storage().data_ptr() == seen.untyped_storage().data_ptr()
        assert native.query.shape[1] == (1 if heads_first else HEADS)

    def test_a_fused_projection_is_read_in_place(self):
        projected = torch.randn(USERS, EVENTS, 3, HEADS, DIM)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        native = layout.from_dense("target_attention", query, key, value, {})
        storage = projected.untyped_storage().data_ptr()
        assert all(
            x.untyped_storage().data_ptr() == storage for x in (native.query, native.key, native.value)
        )

    def test_offsets_that_are_kept_serve_every_kind_of_call(self):
        """Made in one kind of call, they come back in the others."""
        layout._kept_offsets.cache_clear()
        query, key, value = (x[:1] for x in dense(True, HEADS, torch.float32))
        with torch.inference_mode():
            want = attnrec.target_attention(query, key, value)
        leaf = query.clone().requires_grad_()
        out = attnrec.target_attention(leaf, key, value)
        out.sum().backward()
        assert torch.equal(out, want)
        assert leaf.grad is not None
        mapped = torch.vmap(attnrec.target_attention)(query[None], key[None], value[None])[0]
        torch.testing.assert_close(mapped, want)
        traced = make_fx(lambda *given: attnrec.target_attention(*given))(query, key, value)
        assert torch.equal(traced(query, key, value), want)
        assert layout._kept_offsets.cache_info().hits >= 2

    def test_what_must_be_copied_is_the_smaller(self):
        query, key, value = dense(True)
        query = query.transpose(1, 2).contiguous().transpose(1, 2)  # the others have their heads first
        native = layout.from_dense("target_attention", query, key, value, {})
        assert native.query.data_ptr() != query.data_ptr()
        assert native.key.data_ptr() == key.data_ptr()

    @pytest.mark.parametrize("sizes", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (1, 1, 1)], ids=str)
    @pytest.mark.parametrize("mask", [False, True])
    def test_empty(self, sizes, mask):
        users, candidates, events = sizes
        query, key = torch.randn(users, 2, candidates, 4), torch.randn(users, 2, events, 4)
        mask = torch.zeros(users, events, dtype=torch.bool) if mask else None
        out, lse = attnrec.target_attention(query, key, key, key_padding_mask=mask, return_lse=True)
        assert out.shape == query.shape
        assert lse.shape == query.shape[:3]
        if events == 0:
            assert torch.equal(out, torch.zeros_like(out))
            assert torch.equal(lse, torch.full_like(lse, -torch.inf))

    @FORMS
    @GROUPS
    def test_weights(self, heads_first, kv_heads):
        query, key, value = dense(heads_first, kv_heads)
        chosen = {name: x for name, x in options(kv_heads).items() if not name.startswith("self")}
        weights = attnrec.target_attention_weights(query, key, **chosen)
        out = attnrec.target_attention(query, key, value, **chosen)
        assert weights.shape == (USERS, HEADS, CANDIDATES, EVENTS)
        torch.testing.assert_close(weights @ value.repeat_interleave(HEADS // kv_heads, 1), out)
        top, events = attnrec.target_attention_weights(query, key, **chosen, top=3)
        assert top.shape == events.shape == (USERS, HEADS, CANDIDATES, 3)
        torch.testing.assert_close(top, weights.sort(dim=-1, descending=True).values[..., :3])
        found = weights.gather(-1, events.clamp(min=0)).masked_fill(events < 0, 0)
        torch.testing.assert_close(found, top)

    def test_softmax_score(self):
        users, items, bias = torch.randn(3, 4), torch.randn(3, 5, 4), torch.randn(3, 5)
        got = attnrec.softmax_score(users, items, temperature=0.5, bias=bias)
        want = (torch.einsum("bd,bcd->bc", users, items) / 0.5 + bias).softmax(-1)
        torch.testing.assert_close(got, want)


# On a GPU every mask becomes a bias, because holes would have to be read; on CPU tensors one without becomes
# lengths, and the Triton kernels, which never see that on a GPU, may have other tiles where there is a bias.
HOLE = pytest.param(
    "a hole beside",
    marks=pytest.mark.skipif(RUNNER.backend is not None and RUNNER.device == "cpu", reason="not so on a GPU"),
)


@pytest.mark.skipif(
    RUNNER.backend is None and "target_attention" not in CPU.kernels,
    reason="the reference's bits are torch.matmul's",
)
class TestBatchInvariance:
    """The form that a call takes inside depends on the batch (heads in place or folded, a mask with holes or
    without); the bits of a user's result must not."""

    @pytest.fixture(autouse=True)
    def kernels(self):
        with attnrec.use_backend(RUNNER.backend or "cpu"):
            yield

    @FORMS
    @GROUPS
    @pytest.mark.parametrize("mask", [None, "lengths", HOLE])
    def test_a_user_alone(self, heads_first, kv_heads, mask):
        query, key, value = dense(heads_first, kv_heads)
        if mask is not None:
            mask, holed = torch.zeros(USERS, EVENTS, dtype=torch.bool), mask == "a hole beside"
            mask[0, 5:], mask[2, 2:] = True, True
            mask[1, 3] = holed
        out = attnrec.target_attention(query, key, value, key_padding_mask=mask)
        for user in (0, 2):
            one = slice(user, user + 1)
            alone = attnrec.target_attention(
                query[one], key[one], value[one], key_padding_mask=None if mask is None else mask[one]
            )
            assert torch.equal(alone, out[one])


class TestPaddingMask:
    @pytest.mark.parametrize("hole", [False, True])
    def test_lengths_and_holes(self, hole):
        mask = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, int(hole), 0, 0]], dtype=torch.bool)
        lengths, bias = layout.lengths_of_mask(mask)
        assert lengths.tolist() == [3, 0, 4]
        if not hole and RUNNER.device == "cpu":  # elsewhere it would have to be read
            assert bias is None
        else:
            assert torch.equal(bias == -torch.inf, mask)

    def test_a_hidden_event_is_not_looked_at(self):
        query, key, value = dense(True)
        mask = torch.zeros(USERS, EVENTS, dtype=torch.bool)
        mask[0, 3:], mask[1, 2], mask[2] = True, True, True
        want = attnrec.target_attention(query, key, value, key_padding_mask=mask)
        hidden = mask[:, None, :, None]
        for nan in (key, value):
            nan.masked_fill_(hidden, torch.nan)
        out = attnrec.target_attention(query, key, value, key_padding_mask=mask)
        assert torch.equal(out, want)
        assert torch.equal(out[2], torch.zeros_like(out[2]))

    def test_with_a_bias(self):
        query, key, value = dense(False)
        mask = torch.rand(USERS, EVENTS) < 0.5
        bias = torch.randn(USERS, HEADS, EVENTS, requires_grad=True)
        out = attnrec.target_attention(query, key, value, key_bias=bias, key_padding_mask=mask)
        want = attnrec.target_attention(
            query, key, value, key_bias=bias.masked_fill(mask[:, None], -torch.inf)
        )
        torch.testing.assert_close(out, want)
        (grad,) = torch.autograd.grad(out.square().sum(), bias)
        assert torch.equal(
            grad.masked_select(mask[:, None].expand_as(grad)), grad.new_zeros(HEADS * int(mask.sum()))
        )


class TestNested:
    @pytest.mark.parametrize("heads_first", [True, False], ids=["[B,H,j,D]", "[B,j,H,D]"])
    def test_as_the_jagged_form(self, heads_first):
        batch = make_jagged(
            [2, 0, 3], [3, 2, 4], heads=4, kv_heads=2, dim=8, options=("self", "visible", "key_bias")
        )
        want, want_lse = attnrec.target_attention(*batch.args, **batch.options, return_lse=True)

        def nested(x, offsets):
            x = torch.nested.nested_tensor_from_jagged(x.detach().clone(), offsets)
            return (
                (x.transpose(1, 2) if heads_first and x.dim() == 4 else x)
                .detach()
                .requires_grad_(x.is_floating_point())
            )

        query = nested(batch.query, batch.q_offsets)
        self_key, self_value = (
            nested(batch.self_key, batch.q_offsets),
            nested(batch.self_value, batch.q_offsets),
        )
        key, value = nested(batch.key, batch.kv_offsets), nested(batch.value, batch.kv_offsets)
        out, lse = attnrec.target_attention(
            query,
            key,
            value,
            self_key=self_key,
            self_value=self_value,
            visible=nested(batch.visible, batch.q_offsets),
            key_bias=nested(batch.key_bias, batch.kv_offsets),
            return_lse=True,
        )
        assert out.is_nested
        assert out.shape == query.shape  # also the ragged size is the query's own
        assert torch.equal(layout.nested_values(out), want)
        assert torch.equal(lse.transpose(1, 2).values() if heads_first else lse.values(), want_lse)
        layout.nested_values(out).sum().backward()
        assert query.grad.shape == query.shape

    def test_weights(self):
        batch = make_jagged([2, 0, 3], [3, 2, 4], heads=2, dim=4)
        query = torch.nested.nested_tensor_from_jagged(batch.query, batch.q_offsets)
        key = torch.nested.nested_tensor_from_jagged(batch.key, batch.kv_offsets)
        weights = attnrec.target_attention_weights(query, key)
        want, offsets = attnrec.target_attention_weights(*batch.weights_args)
        assert torch.equal(weights.values(), want)
        assert torch.equal(weights.offsets(), offsets)
        top, events = attnrec.target_attention_weights(query, key, top=2)
        want, want_events = attnrec.target_attention_weights(*batch.weights_args, top=2)
        assert torch.equal(top.values(), want)
        assert torch.equal(events.values(), want_events)

    def test_narrowed(self):
        """A narrowed nested tensor has room between its users."""
        padded = torch.randn(3, 6, 2, 4)
        lengths = torch.tensor([2, 6, 0])
        narrow = torch.nested.narrow(
            padded, 1, torch.zeros(3, dtype=torch.int64), lengths, layout=torch.jagged
        )
        query = torch.nested.nested_tensor([torch.randn(2, 2, 4) for _ in range(3)], layout=torch.jagged)
        got = attnrec.target_attention(query, narrow, narrow).values()
        key = padded.transpose(1, 2)
        want = attnrec.target_attention(
            query.values().view(3, 2, 2, 4).transpose(1, 2), key, key, kv_lengths=lengths
        )
        torch.testing.assert_close(got, want.transpose(1, 2).reshape(6, 2, 4))

    def test_softmax_score(self):
        users, items, offsets = torch.randn(3, 4), torch.randn(5, 4), make_offsets([2, 0, 3])
        nested = torch.nested.nested_tensor_from_jagged(items, offsets)
        got = attnrec.softmax_score(users, nested)
        assert got.is_nested
        assert torch.equal(got.values(), attnrec.softmax_score(users, items, offsets))


class TestCrossEntropy:
    def test_reductions(self):
        users, table = torch.randn(4, 3), torch.randn(6, 3)
        target = torch.tensor([0, -100, 5, 2])
        each = attnrec.catalog_cross_entropy(users, table, target, reduction="none")
        assert each.shape == (4,)
        assert each[1] == 0
        logits = users @ table.T
        for reduction in ("mean", "sum"):
            got = attnrec.catalog_cross_entropy(users, table, target, reduction=reduction)
            torch.testing.assert_close(got, F.cross_entropy(logits, target, reduction=reduction))

    def test_in_batch_negatives(self):
        users, table = torch.randn(4, 3), torch.randn(6, 3)
        target = torch.tensor([0, -100, 5, 0])
        got = attnrec.catalog_cross_entropy(users, table, target, negatives="in-batch")
        want = attnrec.catalog_cross_entropy(users, table, target, negatives=torch.tensor([0, 5, 0]))
        torch.testing.assert_close(got, want)


class TestLongestHistory:
    """What a form tells of it reaches the op, without a look at offsets."""

    @pytest.fixture
    def said(self, monkeypatch):
        said = []
        call = attnrec.functional.ops.call

        def watched(name, *args, **kwargs):
            said.append(kwargs.get("max_kv_length"))
            return call(name, *args, **kwargs)

        monkeypatch.setattr(attnrec.functional.ops, "call", watched)
        return said

    @FORMS
    def test_dense(self, heads_first, said):
        on_cpu = dense(heads_first)
        attnrec.target_attention(*on_cpu)  # where kernels look at offsets
        attnrec.target_attention(*on_cpu, kv_lengths=torch.tensor([0, 3, 4]), max_kv_length=5)
        elsewhere = [x.to("meta") for x in on_cpu]
        attnrec.target_attention(*elsewhere)
        attnrec.target_attention(*elsewhere, max_kv_length=5)
        assert said == [None, 5, EVENTS, 5]

    def test_nested(self, said):
        offsets = make_offsets([2, 0, 4]).to("meta")
        rows = torch.randn(6, HEADS, DIM, device="meta")
        unknown = torch.nested.nested_tensor_from_jagged(rows, offsets)
        known = torch.nested.nested_tensor_from_jagged(rows, offsets, max_seqlen=4)
        attnrec.target_attention(unknown, unknown, unknown)
        attnrec.target_attention(known, known, known)
        assert said == [None, 4]

    def test_packed(self, said):
        batch = make_jagged([2, 1], [3, 2], heads=HEADS, dim=DIM)
        attnrec.target_attention(*batch.args)
        attnrec.target_attention(*batch.args, max_kv_length=3)
        assert said == [None, 3]
