"""The reference against a brute-force dense softmax, term by term."""

import math

import pytest
import torch
from helpers import OPTIONS, Jagged, jagged_batches, make_jagged, make_offsets
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from attnrec import reference

NAN = float("nan")
INF = float("inf")


def brute_force(batch: Jagged, scale: float | None = None):
    """Loops over users, candidates and heads, each softmax written out: out, lse, weights by (row, head)."""
    heads, kv_heads, dim = batch.query.shape[1], batch.key.shape[1], batch.query.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out, lse = torch.zeros_like(batch.query), batch.query.new_full(batch.query.shape[:2], -INF)
    weights = {}
    for user in range(len(batch.q_offsets) - 1):
        first, room = int(batch.kv_offsets[user]), int(batch.kv_offsets[user + 1] - batch.kv_offsets[user])
        length = room if batch.kv_lengths is None else int(batch.kv_lengths[user])
        for row in range(int(batch.q_offsets[user]), int(batch.q_offsets[user + 1])):
            seen = length if batch.visible is None else min(length, int(batch.visible[row]))
            for head in range(heads):
                of = head * kv_heads // heads
                scores, values = [], []
                for event in range(first, first + seen):
                    score = scale * float(batch.query[row, head] @ batch.key[event, of])
                    if batch.key_bias is not None:
                        score += float(batch.key_bias[event, head])
                    scores.append(score)
                    values.append(batch.value[event, of])
                if batch.self_key is not None:
                    scores.append(scale * float(batch.query[row, head] @ batch.self_key[row, of]))
                    values.append(batch.self_value[row, of])
                mass = [math.exp(score) for score in scores]
                total = sum(mass)
                weights[row, head] = [m / total if total else 0.0 for m in mass[:seen]] + [0.0] * (
                    room - seen
                )
                if total:
                    lse[row, head] = math.log(total)
                    out[row, head] = sum(m / total * v for m, v in zip(mass, values, strict=True))
    return out, lse, weights


small_batches = jagged_batches(dtypes=[torch.float64], dims=[1, 8, 20], users=4, candidates=5, events=9)


class TestTargetAttention:
    @given(small_batches, st.none() | st.floats(-2, 2))
    def test_is_the_softmax_written_out(self, batch, scale):
        out, lse = reference.target_attention(*batch.args, scale=scale, **batch.options)
        want_out, want_lse, _ = brute_force(batch, scale)
        torch.testing.assert_close(out, want_out)
        torch.testing.assert_close(lse, want_lse)

    @pytest.mark.parametrize("options", [(), OPTIONS, ("kv_lengths", "self")], ids=str)
    def test_gradients(self, options):
        batch = make_jagged(
            [2, 0, 3, 1], [3, 2, 0, 4], heads=4, kv_heads=2, dim=3, dtype=torch.float64, options=options
        )
        if batch.key_bias is not None:  # gradcheck takes differences, so not around infinity
            batch = batch.with_(key_bias=batch.key_bias.clamp(min=-3))
        names = ["query", "key", "value", "self_key", "self_value", "key_bias"]
        given_names = [name for name in names if getattr(batch, name) is not None]

        def function(*tensors):
            changed = batch.with_(**dict(zip(given_names, tensors, strict=True)))
            out, lse = reference.target_attention(*changed.args, **changed.options)
            return out, lse[lse.isfinite()]

        leaves = [getattr(batch, name).requires_grad_() for name in given_names]
        assert torch.autograd.gradcheck(function, leaves)

    @pytest.mark.parametrize("hidden_by", ["kv_lengths", "visible", "key_bias"])
    def test_nan_in_a_hidden_event_does_not_leak(self, hidden_by):
        batch = make_jagged([3, 2], [4, 3], heads=2, dim=4, dtype=torch.float64)
        hides = {
            "kv_lengths": torch.tensor([3, 3]),
            "visible": torch.tensor([0, 2, 3, 3, 3]),
            "key_bias": torch.zeros(7, 2).index_fill(0, torch.tensor([3]), -INF),
        }
        batch = batch.with_(**{hidden_by: hides[hidden_by]})
        poisoned = batch.with_(
            key=batch.key.index_fill(0, torch.tensor([3]), NAN),
            value=batch.value.index_fill(0, torch.tensor([3]), NAN),
        )
        results = []
        for case in (batch, poisoned):
            leaves = [x.detach().requires_grad_() for x in case.args[:3]]
            out, lse = reference.target_attention(*leaves, *case.args[3:], **case.options)
            finite = lse.isfinite()
            results.append((out, lse, *torch.autograd.grad(out.sum() + lse[finite].sum(), leaves)))
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)

    def test_nothing_to_see(self):
        batch = make_jagged([2, 1, 1], [0, 3, 2], heads=2, dim=4, dtype=torch.float64)
        batch = batch.with_(kv_lengths=torch.tensor([0, 0, 2]), key_bias=torch.full((5, 2), -INF))
        leaves = [x.requires_grad_() for x in batch.args[:3]]
        out, lse = reference.target_attention(*leaves, *batch.args[3:], **batch.options)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, -INF))
        for grad in torch.autograd.grad((out * 3).sum(), leaves):
            assert torch.equal(grad, torch.zeros_like(grad))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes_of_results(self, dtype):
        batch = make_jagged([2], [3], dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out, lse = reference.target_attention(*batch.args)
        assert (out.dtype, lse.dtype) == (dtype, wide)
        weights, offsets = reference.target_attention_weights(*batch.weights_args)
        assert (weights.dtype, offsets.dtype) == (dtype, torch.int64)
        weights, events = reference.target_attention_top(*batch.weights_args, 2)
        assert (weights.dtype, events.dtype) == (dtype, torch.int64)


class TestWeights:
    @given(small_batches)
    def test_all_of_them(self, batch):
        weights, offsets = reference.target_attention_weights(*batch.weights_args, **batch.weights_options)
        _, _, by_row = brute_force(batch)
        users = len(batch.q_offsets) - 1
        pieces = []
        for user in range(users):
            rows = range(int(batch.q_offsets[user]), int(batch.q_offsets[user + 1]))
            heads = batch.query.shape[1]
            pieces.append([torch.tensor([by_row[row, h] for h in range(heads)]).T for row in rows])
        flat = [x.double().reshape(-1, batch.query.shape[1]) for user in pieces for x in user]
        want = torch.cat(flat) if flat else weights.new_zeros(0, batch.query.shape[1])
        torch.testing.assert_close(weights, want, atol=1e-6, rtol=0)
        assert torch.equal(offsets, make_offsets([sum(len(x) for x in user) for user in pieces]))

    @given(small_batches, st.integers(0, 12))
    def test_the_heaviest(self, batch, top):
        weights, events = reference.target_attention_top(*batch.weights_args, top, **batch.weights_options)
        _, _, by_row = brute_force(batch)
        for (row, head), all_weights in by_row.items():
            ids = [i for i in events[row, head].tolist() if i >= 0]
            found = weights[row, head].tolist()
            best = sorted(range(len(all_weights)), key=lambda i: -all_weights[i])
            seen = [i for i in best if all_weights[i] > 0]
            assert ids == seen[:top]
            assert found == pytest.approx([all_weights[i] for i in ids] + [0.0] * (top - len(ids)))

    def test_ties_and_weights_that_underflow(self):
        query, key = torch.ones(1, 1, 1), torch.tensor([0.0, 500.0, 0.0, 500.0, 100.0]).view(5, 1, 1)
        offsets = make_offsets([1]), make_offsets([5])
        weights, events = reference.target_attention_top(query, key, *offsets, 5)
        assert events.flatten().tolist() == [1, 3, 4, 0, 2]
        assert weights.flatten().tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]


class TestSoftmaxScore:
    def test_is_the_softmax_of_each_user(self):
        users, items = torch.randn(3, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
        bias = torch.randn(7, dtype=torch.float64)
        got = reference.softmax_score(users, items, make_offsets([2, 0, 5]), temperature=0.7, bias=bias)
        logits = (items * users[[0, 0, 2, 2, 2, 2, 2]]).sum(1) / 0.7 + bias
        torch.testing.assert_close(got, torch.cat([logits[:2].softmax(0), logits[2:].softmax(0)]))

    def test_gradients(self):
        leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (7, 4), (7,))]
        offsets = make_offsets([2, 0, 5])

        def function(users, items, bias):
            return reference.softmax_score(users, items, offsets, temperature=0.7, bias=bias)

        assert torch.autograd.gradcheck(function, leaves)

    def test_hidden_candidates(self):
        users, items = torch.ones(2, 2), torch.ones(4, 2)
        items[1] = NAN
        bias = torch.tensor([0.0, -INF, -INF, -INF])
        got = reference.softmax_score(users, items, make_offsets([2, 2]), bias=bias)
        assert got.tolist() == [1.0, 0.0, 0.0, 0.0]


class TestCatalogTopk:
    @given(
        items=st.integers(1, 12),
        values=st.integers(1, 3),
        excluded=st.lists(st.lists(st.integers(0, 11), max_size=15), max_size=4),
        data=st.data(),
    )
    def test_by_sorting(self, items, values, excluded, data):
        """Few different values, so that there are ties."""
        excluded = [[i % items for i in ids] for ids in excluded]
        k = data.draw(st.integers(0, items))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        catalog = torch.randint(values, (items, 2), generator=generator).double()
        users = torch.randint(values, (len(excluded), 2), generator=generator).double()
        bias = torch.randint(values, (items,), generator=generator).double()
        ids = torch.tensor([i for ids in excluded for i in ids], dtype=torch.int64)
        scores, found, lse = reference.catalog_topk(
            users,
            catalog,
            k,
            exclude_ids=ids,
            exclude_offsets=make_offsets([len(ids) for ids in excluded]),
            bias=bias,
            temperature=2.0,
        )
        for user, seen in enumerate(excluded):
            logits = (catalog @ users[user] / 2 + bias).tolist()
            left = [i for i in range(items) if i not in set(seen)]
            best = sorted(left, key=lambda i: (-logits[i], i))[:k]
            assert found[user].tolist() == best + [-1] * (k - len(best))
            assert scores[user].tolist() == [logits[i] for i in best] + [-INF] * (k - len(best))
            want = math.log(sum(math.exp(logits[i]) for i in left)) if left else -INF
            assert float(lse[user]) == pytest.approx(want)

    def test_half_precision_is_widened_before_the_product(self):
        """Rounded scores would tie, and the lower id would win."""
        users = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
        catalog = torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.bfloat16)
        scores, ids, _ = reference.catalog_topk(users, catalog, 2)
        assert ids.tolist() == [[1, 0]]
        assert scores.tolist() == [[256.5, 256.0]]


class TestCatalogCrossEntropy:
    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    @pytest.mark.parametrize("ignore_index", [-100, 3])
    def test_is_torchs(self, smoothing, ignore_index):
        generator = torch.Generator().manual_seed(0)
        users = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        table = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        bias, logq = torch.randn(2, 9, generator=generator, dtype=torch.float64)
        bias.requires_grad_()
        target = torch.tensor([3, 0, ignore_index, 8, 3, 1])
        loss, lse = reference.catalog_cross_entropy(
            users,
            table,
            target,
            temperature=0.5,
            bias=bias,
            logq=logq,
            label_smoothing=smoothing,
            ignore_index=ignore_index,
        )
        logits = users @ table.T / 0.5 + bias - logq
        want = F.cross_entropy(
            logits, target, label_smoothing=smoothing, ignore_index=ignore_index, reduction="none"
        )
        torch.testing.assert_close(loss, want)
        kept = target != ignore_index
        torch.testing.assert_close(lse[kept], logits.logsumexp(1)[kept])
        for got, expected in zip(
            torch.autograd.grad(loss.sum(), [users, table, bias]),
            torch.autograd.grad(want.sum(), [users, table, bias]),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("in_batch", [False, True])
    def test_negatives_written_out(self, in_batch):
        generator = torch.Generator().manual_seed(0)
        users, table = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 9))
        bias, logq = torch.randn(2, 9, generator=generator, dtype=torch.float64)
        target = torch.tensor([3, 3, -100, 8, 1])
        negatives = target if in_batch else torch.tensor([3, 5, 5, 0])
        loss, lse = reference.catalog_cross_entropy(
            users, table, target, bias=bias, logq=logq, negatives=negatives, in_batch=in_batch
        )
        logits = (users @ table.T + bias - logq).tolist()
        for row, own in enumerate(target.tolist()):
            if own == -100:
                assert (float(loss[row]), float(lse[row])) == (0.0, -INF)
                continue
            others = [i for i in negatives.tolist() if i not in (own, -100)]
            total = math.log(sum(math.exp(logits[row][i]) for i in [own, *others]))
            assert float(lse[row]) == pytest.approx(total)
            assert float(loss[row]) == pytest.approx(total - logits[row][own])

    def test_nan_in_an_ignored_row_does_not_leak(self):
        users, table = torch.ones(3, 2), torch.ones(4, 2, requires_grad=True)
        users[1] = NAN
        loss, _ = reference.catalog_cross_entropy(users, table, torch.tensor([0, -100, 2]))
        loss.sum().backward()
        assert loss.isfinite().all()
        assert table.grad.isfinite().all()
