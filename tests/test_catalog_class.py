"""`Catalog`: searches as `catalog_topk` over its rows, whatever was updated and appended."""

import contextlib
import copy
import pickle
import re

import pytest
import torch
from helpers import DTYPES, make_offsets
from hypothesis import given
from hypothesis import strategies as st
from runners import RUNNER

import attnrec
from attnrec import Catalog
from attnrec.catalog import filters, items

FILTERS = ["fp32", "bf16", "int8"]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator(RUNNER.device).manual_seed(seed)).to(dtype)


def assert_same_answers(got, expected, *, filtered):
    """Ids and scores to the bit; the log-sum-exp too, unless a filter estimates it."""
    for x, y in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(got[2], expected[2], rtol=0, atol=0.1 if filtered else 0)


def assert_holds(catalog, table, bias=None):
    """Tensors, answers and sizes of a catalogue as packed from this table."""
    fresh = Catalog.pack(table, catalog.dtype, bias=bias)
    seen, expected = catalog._items.visible.tensors, fresh._items.visible.tensors
    assert seen.keys() == expected.keys()
    for name, x in seen.items():
        assert torch.equal(x, expected[name]), name
    assert (len(catalog), catalog.dim) == table.shape
    if RUNNER.divisor > 1:
        return  # what is searched are these tensors: a slow runner need not do it each time
    users = random(3, table.shape[1], dtype=table.dtype, seed=99)
    k = min(20, len(table))
    assert_same_answers(
        catalog.topk(users, k),
        attnrec.catalog_topk(users, table, k, bias=bias),
        filtered=catalog._items.filter is not None,
    )


OPTIONS = {
    "plain": {},
    "exclude": {"exclude": (torch.arange(100), make_offsets([40, 0, 60]))},
    "temperature and bias": {"temperature": 0.3, "bias": random(150, seed=2)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_searches_as_the_table(options, filter, dtype):
    table, users = random(150, 20, dtype=dtype), random(3, 20, dtype=dtype, seed=1)
    catalog, options = Catalog.pack(table, filter), OPTIONS[options]
    expected = attnrec.catalog_topk(users, table, 30, **options)
    filtered = catalog._items.filter is not None
    assert_same_answers(catalog.topk(users, 30, **options), expected, filtered=filtered)
    if not options:
        assert_same_answers(attnrec.catalog_topk(users, catalog, 30), expected, filtered=filtered)


@pytest.mark.parametrize("filter", FILTERS)
def test_the_table_is_referred_to_and_never_written(filter):
    table = random(100, 8)
    before = table.clone()
    catalog = Catalog.pack(table, filter)
    assert catalog.rows.data_ptr() == table.data_ptr()
    catalog.update([], random(0, 8))
    catalog.append(random(0, 8))
    assert catalog.rows.data_ptr() == table.data_ptr()
    catalog.update([3], random(1, 8, seed=1))
    catalog.append(random(5, 8, seed=2))
    assert torch.equal(table, before)
    assert not torch.equal(catalog.rows[3], table[3])


def test_rows_changed_behind_its_back_are_read_as_they_are():
    table = random(100, 8)
    catalog = Catalog.pack(table)
    table[7] = 100.0
    assert catalog.topk(torch.ones(1, 8), 1)[1].tolist() == [[7]]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(filter, dtype):
    table = random(200, 12, dtype=dtype)
    catalog = Catalog.pack(table, filter)
    for round, ids in enumerate(([5], [199, 0, 31, 32], range(200))):
        rows = random(len(ids), 12, dtype=dtype, seed=round + 1)
        catalog.update(torch.tensor(ids, dtype=torch.int32), rows)
        table = table.index_copy(0, torch.tensor(ids), rows)
        assert_holds(catalog, table)


def assert_bounds_hold(catalog):
    """Of an int8 filter: no item's row is farther from its codes than the filter says."""
    seen, count = catalog._items.visible, len(catalog)
    codes = seen.filter.codes.movedim(2, 1).reshape(-1, seen.filter.codes.shape[1] * 4)[:count]
    rounded = (codes.double() - 128) * seen.filter.scale.double().unsqueeze(1)
    off = (seen.rows.double() - rounded[:, : catalog.dim]).norm(dim=1)
    assert (off <= seen.filter.error[:, 0].double()).all()


@pytest.mark.cpu_only("there is no filter on other devices")
@pytest.mark.parametrize("at", range(5))
def test_an_update_that_is_interrupted_loses_no_item(at, monkeypatch):
    """Whichever write it was that did not happen."""
    table = random(600, 4)
    catalog = Catalog.pack(table, "int8")
    catalog.update([0], table[:1])
    put, calls = items.put, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls > at:
            raise KeyboardInterrupt
        put(*arguments)

    for module in (items, filters):
        monkeypatch.setattr(module, "put", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        catalog.update([3, 5, 40], random(3, 4, seed=1) * 100)
    monkeypatch.undo()
    assert_bounds_hold(catalog)
    users = random(4, 4, seed=2)
    assert_same_answers(catalog.topk(users, 20), attnrec.catalog_topk(users, catalog.rows, 20), filtered=True)
    catalog.update([3], random(1, 4, seed=3))  # and nobody waits


def test_the_last_row_of_a_repeated_id_holds():
    table, rows = random(50, 4), random(5, 4, seed=1)
    catalog = Catalog.pack(table, "int8")
    catalog.update([9, 7, 9, 9, 7], rows)
    expected = table.clone()
    expected[9], expected[7] = rows[3], rows[4]
    assert_holds(catalog, expected)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("count", [0, 1, 31, 32, 100])
def test_append(filter, count):
    table = random(count, 12)
    catalog = Catalog.pack(table, filter)
    for more in (1, 0, 31, 33, 200):
        rows = random(more, 12, seed=more)
        assert catalog.append(rows) == range(len(table), len(table) + more)
        table = torch.cat([table, rows])
        assert_holds(catalog, table)


def test_rows_of_its_own():
    """The catalogue's memory is where the new rows come from, and where they go."""
    table = random(100, 4)
    catalog = Catalog.pack(table, "int8")
    catalog.append(catalog.rows[:10])
    catalog.append(catalog.rows[:10])  # there is room: the same memory
    catalog.update(range(10), catalog.rows[5:15])
    table = torch.cat([table, table[:10], table[:10]])
    table[:10] = table[5:15].clone()
    assert_holds(catalog, table)


@given(
    filter=st.sampled_from(FILTERS),
    dtype=st.sampled_from(DTYPES),
    dim=st.sampled_from([1, 3, 8, 17]),
    count=st.integers(0, 70),
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 70)), max_size=6),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_sequence_of_changes(filter, dtype, dim, count, changes, biased, seed):
    table, bias = random(count, dim, dtype=dtype, seed=seed), random(count, seed=seed) if biased else None
    catalog = Catalog.pack(table, filter, bias=bias)
    for number, (appends, size) in enumerate(changes):
        rows = random(size, dim, dtype=dtype, seed=seed + number)
        added = random(size, seed=seed + number) if biased else None
        if appends:
            catalog.append(rows, bias=added)
            table, bias = torch.cat([table, rows]), torch.cat([bias, added]) if biased else None
        elif count:
            ids = torch.randint(0, count, (size,), generator=torch.Generator(RUNNER.device).manual_seed(seed))
            catalog.update(ids, rows, bias=added)
            table, bias = table.clone(), bias.clone() if biased else None
            for i, row in enumerate(rows):
                table[ids[i]] = row
                if biased:
                    bias[ids[i]] = added[i]
    assert_holds(catalog, table, bias)


def test_the_catalogues_bias():
    table, bias, users = random(80, 8), random(80, seed=1), random(2, 8, seed=2)
    catalog = Catalog.pack(table, "int8", bias=bias)
    catalog.update([4], random(1, 8, seed=3))
    expected = table.index_copy(0, torch.tensor([4]), random(1, 8, seed=3))
    assert_holds(catalog, expected, bias)  # left as they were
    own = torch.zeros(80)
    assert_same_answers(
        catalog.topk(users, 9, bias=own), attnrec.catalog_topk(users, expected, 9), filtered=True
    )


def test_biases_alone():
    """-inf hides an item, and the rows stay where they were."""
    table, bias = random(80, 8), random(80, seed=1)
    catalog = Catalog.pack(table, "int8", bias=bias)
    catalog.update([4, 79, 4], bias=torch.tensor([0.0, 1.0, -torch.inf]))
    assert_holds(catalog, table, bias.index_copy(0, torch.tensor([79, 4]), torch.tensor([1.0, -torch.inf])))
    assert 4 not in catalog.topk(table[4:5] * 100, 80)[1]


def test_empty_catalogue():
    catalog = Catalog.pack(torch.ones(0, 4), "int8")
    scores, ids, lse = catalog.topk(torch.ones(2, 4), 0)
    assert scores.shape == ids.shape == (2, 0)
    assert lse.tolist() == [-torch.inf] * 2
    catalog.update([], torch.ones(0, 4))
    assert len(catalog) == 0


def test_room_grows_by_doubling():
    catalog = Catalog.pack(random(100, 4), "int8")
    places = set()
    for _ in range(400):
        catalog.append(random(1, 4))
        places.add(catalog.rows.data_ptr())
        assert catalog._items.capacity <= 2 * len(catalog)
    assert len(places) <= 3  # 200, 400, 800


@pytest.mark.cpu_only("peak memory of the process")
def test_memory_of_changes(peak_memory):
    """Of the first change the table's, of the next ones that of their rows, of growth twice the items'."""
    table, mib = torch.randn(250_000, 64), 2**20
    catalog = Catalog.pack(table, "int8")
    ids, rows = torch.randperm(250_000)[:1000], torch.randn(1000, 64)
    with peak_memory() as grown:
        catalog.update(ids, rows)
    assert table.nbytes / 2 < grown() < 1.2 * table.nbytes + 10 * mib  # sanitizers keep some
    with peak_memory() as grown:
        catalog.update(ids, rows)
    assert grown() < 10 * mib
    before = catalog.memory
    with peak_memory() as grown:
        catalog.append(rows)
    assert catalog.memory <= 2 * before
    assert grown() < 1.2 * catalog.memory + 10 * mib
    with peak_memory() as grown:
        catalog.append(rows)
    assert grown() < 10 * mib


@pytest.mark.cpu_only("compiled with Python's own calls")
def test_a_compiled_function_sees_the_changes():
    """A catalogue is no constant of a graph: the search is a break in it."""
    catalog, users = Catalog.pack(random(50, 4)), torch.ones(1, 4)
    compiled = torch.compile(lambda users: catalog.topk(users * 2, 1)[1] + 0, backend="eager")
    compiled(users)
    catalog.update([7], torch.full((1, 4), 9.0))
    assert compiled(users).tolist() == [[7]]
    catalog.append(torch.full((1, 4), 99.0))
    assert compiled(users).tolist() == [[50]]


@pytest.mark.parametrize("packed_there", [True, False])
def test_inference_mode(packed_there):
    with torch.inference_mode(packed_there):
        catalog = Catalog.pack(random(50, 4), "int8")
        catalog.append(random(1, 4))
    with torch.inference_mode(not packed_there):
        catalog.update([50], torch.full((1, 4), 9.0))
        assert catalog.topk(torch.ones(1, 4), 1)[1].tolist() == [[50]]


def test_parameters_of_a_model():
    embedding = torch.nn.Embedding(50, 4)
    catalog = Catalog.pack(embedding.weight, bias=torch.zeros(50, requires_grad=True))
    assert catalog.rows.data_ptr() == embedding.weight.data_ptr()
    assert not catalog.rows.requires_grad
    catalog.update([1], torch.ones(1, 4, requires_grad=True), bias=torch.ones(1, requires_grad=True))
    catalog.append(torch.ones(1, 4, requires_grad=True), bias=torch.ones(1))
    assert not catalog.rows.requires_grad


def test_any_strides():
    table = random(4, 90).t()
    catalog = Catalog.pack(table, "bf16", bias=random(180)[::2])
    assert catalog.rows.data_ptr() == table.data_ptr()
    assert_holds(catalog, table, random(180)[::2])
    catalog.update([0], random(4, 1, seed=1).t())
    assert_holds(catalog, table.index_copy(0, torch.tensor([0]), random(4, 1, seed=1).t()), random(180)[::2])


def test_rows_that_are_not_finite():
    table = random(100, 4)
    catalog = Catalog.pack(table, "int8")
    rows = torch.tensor([[torch.nan] * 4, [torch.inf] * 4])
    catalog.update([5, 6], rows)
    expected = attnrec.catalog_topk(torch.ones(1, 4), catalog.rows, 100)
    got = catalog.topk(torch.ones(1, 4), 100)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[1][0, 0] == 6


@pytest.mark.cpu_only("of another backend by name")
@pytest.mark.parametrize("filter", FILTERS)
def test_the_reference_ignores_the_filter(filter):
    table, users, rows = random(100, 8), random(3, 8, seed=1), random(2, 8, seed=2)
    catalog = Catalog.pack(table, filter)
    with attnrec.use_backend("reference"):
        got, expected = catalog.topk(users, 10), attnrec.catalog_topk(users, table, 10)
        assert_same_answers(got, expected, filtered=False)
        catalog.update([7, 9], rows)
    assert_holds(catalog, table.index_copy(0, torch.tensor([7, 9]), rows))


def test_explain():
    catalog = Catalog.pack(random(100, 8), "int8")
    told = attnrec.explain(catalog.topk, random(3, 8), 10)
    assert told == attnrec.explain(attnrec.catalog_topk, random(3, 8), catalog, 10)
    assert told.op == "catalog_topk"
    catalog.update([1], random(1, 8))  # nobody is left searching


def test_sizes_in_words():
    catalog = Catalog.pack(random(1000, 8), "fp32")
    assert (catalog.dtype, catalog.dim, len(catalog), catalog.device.type) == (
        "fp32",
        8,
        1000,
        RUNNER.device,
    )
    assert catalog.memory == 1000 * 8 * 4
    assert "1,000 items of dim 8, float32, no filter" in repr(catalog)
    assert "rows not copied" in repr(catalog)
    catalog.append(random(1, 8))
    assert catalog.memory == 2000 * 8 * 4
    assert "room for 2,000" in repr(catalog)


@pytest.mark.cpu_only("there is no filter on other devices")
@pytest.mark.parametrize(("filter", "bytes_an_item"), [("bf16", 2 * 8 + 4), ("int8", 8 + 4 + 4)])
def test_memory_of_the_filter(filter, bytes_an_item):
    catalog = Catalog.pack(random(3200, 8), filter)
    assert catalog.memory == 3200 * (8 * 4 + bytes_an_item)
    assert f"{filter} filter" in repr(catalog)


def test_neither_pickled_nor_copied():
    catalog = Catalog.pack(random(5, 4))
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="save and load"):
            attempt(catalog)


def refusals():
    """What is refused, with which words: a call on the catalogue, the message."""
    rows = torch.ones(2, 4)
    return {
        "update: a float id": (lambda c: c.update(torch.ones(2), rows), "ids must be int32 or int64"),
        "update: half an id": (lambda c: c.update([0, 1.5], rows), "ids must be int32 or int64"),
        "update: ids of no kind": (lambda c: c.update("ab", rows), "ids must be a tensor or .*, got 'ab'"),
        "update: ragged ids": (lambda c: c.update([[0], [1, 2]], rows), "ids must be a tensor or a sequence"),
        "update: ids of two dims": (lambda c: c.update(torch.ones(1, 2).long(), rows), r"ids .* \[m\]"),
        "update: too large an id": (lambda c: c.update([0, 10], rows), r"ids must be .* \(9\), got 10"),
        "update: a negative id": (lambda c: c.update([0, -1], rows), "ids must be from 0"),
        "update: fewer rows": (lambda c: c.update([0, 1, 2], rows), r"rows must have shape"),
        "update: another dim": (lambda c: c.update([0, 1], torch.ones(2, 5)), "rows must have shape"),
        "update: another dtype": (lambda c: c.update([0, 1], rows.half()), "rows must be float32"),
        "update: no tensor": (lambda c: c.update([0], [[1.0] * 4]), "rows must be a tensor"),
        "update: a bias": (lambda c: c.update([0, 1], rows, bias=torch.ones(2)), "bias must be left out"),
        "update: nothing": (lambda c: c.update([0, 1]), "rows must be given, or bias"),
        "append: no rows": (lambda c: c.append(None), "rows must be a tensor, got NoneType"),
        "append: another dim": (lambda c: c.append(torch.ones(2, 5)), "rows must have shape"),
        "append: one row": (lambda c: c.append(torch.ones(4)), "rows must have shape"),
        "append: another dtype": (lambda c: c.append(rows.bfloat16()), "rows must be float32"),
        "append: another device": (lambda c: c.append(rows.to("meta")), "rows must be on"),
        "append: a bias": (lambda c: c.append(rows, bias=torch.ones(2)), "bias must be left out"),
        "topk: k": (lambda c: c.topk(rows, 11), "k must be from 0 to the size of the catalogue N = 10"),
        "topk: users of another dim": (lambda c: c.topk(torch.ones(2, 5), 1), r"\[any, 5\], got \[10, 4\]"),
        "topk: exclude": (lambda c: c.topk(rows, 1, exclude=torch.ones(2)), "exclude must be a pair"),
        "pack: dtype": (lambda c: Catalog.pack(rows, "int4"), "dtype must be one of fp32, bf16, int8"),
        "pack: table": (lambda c: Catalog.pack(torch.ones(4)), "table must have shape"),
        "pack: no dims": (lambda c: Catalog.pack(torch.ones(4, 0)), "table must have a dim D of at least 1"),
        "pack: integers": (lambda c: Catalog.pack(rows.int()), "table must be float32"),
        "pack: bias": (lambda c: Catalog.pack(rows, bias=torch.ones(3)), "bias must have shape"),
    }


@pytest.mark.parametrize("name", refusals())
def test_refused(name):
    call, message = refusals()[name]
    table = random(10, 4)
    catalog = Catalog.pack(table, "int8")
    with pytest.raises((TypeError, ValueError), match=message):
        call(catalog)
    assert_holds(catalog, table)


def test_a_bias_cannot_be_left_out_of_new_items():
    catalog = Catalog.pack(random(10, 4), bias=torch.zeros(10))
    with pytest.raises(ValueError, match=re.escape("Catalog.append: bias must be given")):
        catalog.append(random(1, 4))
    with pytest.raises(ValueError, match="bias must have shape"):
        catalog.append(random(1, 4), bias=torch.zeros(2))
