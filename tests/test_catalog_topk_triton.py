"""The Triton kernels' own steps of `catalog_topk`: the floor from a sample, the selection, the order."""

import pytest
import torch
from runners import RUNNER
from test_catalog_topk import INF, NAN, check_exactly, integers, options_for

import attnrec

pytestmark = pytest.mark.skipif(RUNNER.backend != "triton", reason="steps of the Triton kernels")


class Recorded:
    """A kernel, and the grid and the arguments of its last launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.grid, self.args, self.kwargs = grid, args, kwargs
            return self.kernel[grid](*args, **kwargs)

        return launch


def keys_of(scores):
    """The kernels' keys of `scores [B, n]` fp32 of items 0 … n: the higher score first, then the lower id."""
    from attnrec.kernels import selection

    bits = scores.where(scores != 0, 0.0).view(torch.int32).long()
    rising = bits ^ (bits >> 31 & 0x7FFFFFFF)
    keys = rising << 32 | torch.arange(scores.shape[1]) ^ selection.LAST_ID.value
    return keys.where(scores > -INF, selection.NOTHING.value)


def check_floor(best, scores, k, floor, highest):
    """`floor [B]` is reached by k of `best [B, n]`, or a few more; `highest [B]` is the best of `scores`."""
    nothing = keys_of(torch.tensor([[-INF]])).item()
    reach = (best >= floor.unsqueeze(1)).sum(1)
    enough = (best > nothing).sum(1) >= k
    assert ((reach >= k) & (reach <= k + k // 8) & (floor > nothing))[enough].all()
    assert (floor[~enough] == nothing).all()
    assert torch.equal(highest, scores.amax(1))


@pytest.mark.parametrize(
    ("names", "dtype", "blocks"),
    [
        (("exclude",), torch.float32, 4),  # some blocks look at two tiles
        (("exclude", "bias"), torch.float32, 4),
        (("bias",), torch.bfloat16, 2048),
    ],
    ids=str,
)
def test_a_sample_gives_the_best_of_its_groups(names, dtype, blocks, monkeypatch):
    """A floor that is too low costs time and changes no result, so that nothing else would tell."""
    from attnrec.kernels import catalog_topk as module

    k, items, batch = 20, 1000, 21
    users, catalog = integers(batch, 8, dtype=dtype), integers(items, 8, dtype=dtype, seed=1)
    options = options_for(names, batch, items) | {"temperature": 0.5}  # scores stay exact
    scores = users.float() @ catalog.float().T * 2
    if "bias" in names:
        scores += options["bias"]
        catalog[options["bias"] == -INF] = NAN
    if "exclude" in names:
        ids, offsets = options["exclude"]
        for user in range(batch):
            scores[user, ids[offsets[user] : offsets[user + 1]]] = -INF
    sample, floor = Recorded(module._sample), Recorded(module._floor)
    for name, value in (("_sample", sample), ("_floor", floor), ("BLOCKS", blocks)):
        monkeypatch.setattr(module, name, value)
    attnrec.catalog_topk(users, catalog, k, **options)

    groups, width = sample.kwargs["GROUPS"], sample.kwargs["BLOCK_N"]
    tiles, of_sample = sample.args[8], sample.grid[1]
    assert tiles == items // (width * module.EVERY)
    sampled = torch.full_like(scores, -INF)
    best = keys_of(torch.full((batch, of_sample * groups), -INF)).view(batch, of_sample, groups)
    for tile in range(tiles):
        first = (tile * module.EVERY + (tile * 5 + tile // 8) % module.EVERY) * width
        here = slice(first, first + width)
        sampled[:, here] = scores[:, here]
        of_tile = keys_of(scores)[:, here].view(batch, groups, -1).amax(2)
        best[:, tile % of_sample] = best[:, tile % of_sample].maximum(of_tile)
    assert torch.equal(sample.args[5], best.flatten(1))
    check_floor(best.flatten(1), sampled, k, *floor.args[1:3])


@pytest.mark.parametrize("names", [(), ("exclude", "bias")], ids=str)
def test_several_tiles_to_a_part(names, monkeypatch):
    """As large catalogues have: what was summed before is scaled where a higher score comes, whole tiles are
    hidden, and most of what reaches the floor of a sample without the best comes late."""
    from attnrec.kernels import catalog_topk as module

    monkeypatch.setattr(module, "BLOCKS", 2)
    users, catalog = integers(7, 8, largest=2), integers(1000, 8, seed=1, largest=2)
    catalog[900:] += 1
    options = options_for(names, 7, 1000)
    if "bias" in names:
        options["bias"][:300] = -INF
    check_exactly(users, catalog, 20, temperature=5.0, **options)


def test_a_floor_of_any_number_of_groups():
    from attnrec.kernels import catalog_topk as module
    from attnrec.kernels.launch import most_registers

    for groups in (17, 128, 129, 256, 300, 384, 512, 700):
        scores = torch.randn(3, groups)
        scores[1, 5:] = -INF
        best, floor, highest = keys_of(scores), torch.empty(3, dtype=torch.int64), torch.empty(3)
        for k in (5, groups // 3, groups, groups + 1):
            module._floor[3,](best, floor, highest, groups, k, CHUNK=512, maxnreg=most_registers(4))
            check_floor(best, scores, k, floor, highest)


def test_selection_from_any_number_of_lists():
    """What is in a list's memory behind its keys is not read; the softmaxes of all lists are made one."""
    from attnrec.kernels import catalog_topk as module

    for splits, capacity, k in ((1, 40, 10), (3, 20, 70), (300, 4, 50), (500, 2, 9), (700, 1, 30)):
        lists = keys_of(torch.randn(2, capacity * splits)).view(2, capacity, splits)
        counts = torch.randint(0, capacity + 1, (2, splits), dtype=torch.int32)
        held = torch.arange(capacity).unsqueeze(1) < counts.unsqueeze(1)
        maxima, sums = torch.randn(2, splits) * 3 - 300, torch.rand(2, splits)
        maxima[1, 1::2], sums[1, 1::2], sums[:, 0] = -INF, 0.0, 1.0
        best, lse = torch.empty(2, k, dtype=torch.int64), torch.empty(2)
        module._select[2,](
            lists.where(held, 1 << 62), counts, maxima, sums, best, lse, splits, capacity, k, CHUNK=512
        )
        nothing = keys_of(torch.tensor([[-INF]])).item()
        ordered = lists.where(held, nothing).flatten(1).sort(dim=1, descending=True).values
        want = torch.full((2, k), nothing)
        want[:, : ordered.shape[1]] = ordered[:, :k]
        assert torch.equal(best.sort(dim=1, descending=True).values, want)
        torch.testing.assert_close(lse, (maxima + sums.log()).logsumexp(1))


@pytest.mark.parametrize(
    ("k", "batches"),
    [(1, range(128, 1025, 128)), (20, range(4, 41, 4)), (50, range(1, 18))],
    ids=["1", "20", "50"],
)
def test_ranks_of_any_number_of_rows(k, batches):
    """The order, the scores and the ids of k keys a row, many rows to a block."""
    from attnrec.kernels import catalog_topk as module

    log_k = (k - 1).bit_length()
    rows = 1024 >> log_k
    for batch in batches:
        scores = torch.randn(batch, k)
        scores[::3, k // 2 :] = -INF
        shuffled = scores.argsort(1) if batch % 2 else torch.rand(batch, k).argsort(1)
        keys = keys_of(scores).gather(1, shuffled)
        got, ids = torch.empty(batch, k), torch.empty(batch, k, dtype=torch.int64)
        grid = -(-batch // rows), 1
        module._rank[grid](keys, got, ids, batch, k, R=rows, LOG_K=log_k, SORT=True)
        want = scores.sort(stable=True, dim=1, descending=True)
        assert torch.equal(got, want.values)
        assert torch.equal(ids, want.indices.where(want.values > -INF, -1))
